"""What the distributions under ``compat/`` share."""

from __future__ import annotations

import copy
import pickle
from typing import ClassVar

import pytest
import torch
from torch import nn

from hyaena.compat import CharLevelTokenizer, Renamed, dotdict, leading_mask, sample, with_room
from hyaena.errors import InputError, NonFiniteError


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.zeros(3))

    def forward(self) -> torch.Tensor:
        return self.weight.sum() + self.table.sum()


class Other(Renamed, Part):
    names: ClassVar = {"weight": "scale", "table": "freq"}


def test_parts_of_a_module_have_other_names_and_the_module_computes() -> None:
    module = Other()
    assert set(module.state_dict()) == {"scale", "freq"} and float(module()) == 2
    assert module.weight is module.scale
    module.load_state_dict({"scale": torch.zeros(2), "freq": torch.ones(3)})
    assert float(module()) == 3 and float(copy.deepcopy(module)()) == 3


def test_a_dotdict_has_no_missing_attribute_and_can_be_copied() -> None:
    config = dotdict({"a": 1}, Loader=print, b=2)
    assert (config.a, config.b, config.c, config.get("Loader")) == (1, 2, None, None)
    config.c = 3
    assert config.to_dict() == {"a": 1, "b": 2, "c": 3}
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_characters_are_lossless() -> None:
    tokenizer = CharLevelTokenizer()
    text = "Grüße,\n\x7f 鬣狗"
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(ids) == text and tokenizer.detokenize_batch(torch.tensor([ids])) == [text]
    assert tokenizer.detokenize([0, 65, 1, 300, 255]) == "A\ufffd" and tokenizer.tokenize_batch("A") == [65]


def test_sampling_keeps_to_its_limits() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(500, 4)
    before = logits.clone()
    assert set(sample(logits, top_k=2).tolist()) == {0, 1}
    assert set(sample(logits, top_k=0, top_p=0.7).tolist()) == {0, 1}
    assert set(sample(logits, top_k=0, temperature=0.0).tolist()) == {0} == set(sample(logits).tolist())
    assert torch.equal(logits, before)
    with pytest.raises(NonFiniteError, match="row 1"):
        sample(torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]))


def test_room_for_keys_and_values_doubles_and_keeps_what_is_stored() -> None:
    first = with_room(None, (2, 3, 2, 1, 4), torch.float32, torch.device("cpu"))
    assert first.shape == (2, 256, 2, 1, 4)
    first.normal_()
    assert with_room(first, (2, 256, 2, 1, 4), torch.float32, first.device) is first
    second = with_room(first, (2, 257, 2, 1, 4), torch.float32, first.device)
    assert second.shape[1] == 512 and torch.equal(second[:, :256], first) and not second[:, 256:].any()


@pytest.mark.parametrize(
    ("mask", "cached", "words"),
    [
        ([[0, 1, 1], [1, 1, 1]], True, None),
        ([[0, 1, 0], [1, 1, 1]], False, None),
        ([[0, 1, 0], [1, 1, 1]], True, "would be stored"),
        ([[1, 0, 1], [1, 1, 1]], False, "between others"),
        ([[1, 1], [1, 1]], False, "shape of the ids"),
    ],
)
def test_padding_stands_on_the_left_or_on_the_right(mask: list[list[int]], cached: bool, words: str | None) -> None:
    given = torch.tensor(mask)
    if words is None:
        assert torch.equal(leading_mask(given, (2, 3), cached=cached), given.cumsum(1) > 0)
    else:
        with pytest.raises(InputError, match=words):
            leading_mask(given, (2, 3), cached=cached)
