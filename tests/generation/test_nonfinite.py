"""The search for the first NaN: exact across chunks, and honest when it finds none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import hyaena
from hyaena.config import ModelConfig
from hyaena.errors import NonFiniteError
from hyaena.generation import nonfinite
from hyaena.generation.nonfinite import explain_non_finite, remedy
from hyaena.model import StripedHyena
from hyaena.scoring.edits import Edit, iter_edit_scores
from hyaena.tokenizers import ByteTokenizer

CONFIG = ModelConfig(
    vocab_size=16,
    hidden_size=16,
    layer_types=("hyena", "attention"),
    intermediate_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    state_size=1,
)


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_the_position_is_that_of_the_whole_sequence(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonfinite, "CHUNK", chunk)
    model = StripedHyena(CONFIG)
    with torch.no_grad():
        model.embed_tokens.weight[9] = math.inf
    usual = "check the weights with `hyaena info`, or compute in float32"
    assert (
        explain_non_finite(model, [1, 2, 3, 4, 9, 5, 9]) == f"they first appear in the embedding, at token 4; {usual}"
    )
    model.cache_dtype = "float16"
    assert (
        explain_non_finite(model, [1, 2, 3, 4, 9, 5, 9]) == f"they first appear in the embedding, at token 4; {usual}"
    )


@pytest.mark.parametrize("method", ["recurrence", "blocked"])
def test_a_pole_outside_the_unit_circle_is_found_where_it_overflows(method: str) -> None:
    model = StripedHyena(CONFIG)
    with torch.no_grad():
        model.layers[0].mixer.long_filter.poles.fill_(4.0)  # pyright: ignore
    assert explain_non_finite(model, [1] * 100, method=method).startswith(
        "they first appear in layer 0 (hyena), at token"
    )


def test_nothing_found_is_said_so() -> None:
    assert "finite when the tokens were read again" in explain_non_finite(StripedHyena(CONFIG), [1, 2, 3])


def test_keys_that_the_cache_cannot_hold_are_what_the_error_names() -> None:
    torch.manual_seed(0)
    model = StripedHyena(replace(CONFIG, vocab_size=259))
    with torch.no_grad():
        model.layers[1].mixer.qkv_proj.weight *= 1e6  # pyright: ignore
    ids, tokenizer = list(range(60, 90)), ByteTokenizer()
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: hyaena.generate(model, tokenizer, ids, max_new_tokens=2),
        "score": lambda: hyaena.score(model, tokenizer, ids),
        "embed": lambda: hyaena.embed(model, tokenizer, [ids]),
        "continuations": lambda: hyaena.score_continuations(model, [(ids, [[7], [8]])]),
        "edits": lambda: list(iter_edit_scores(model, tokenizer, [("abcdef", [Edit(2, "c", "x")])])),
    }
    for call in calls.values():
        call()  # the model's own dtype holds them
    model.cache_dtype = "float16"
    for name, call in calls.items():
        with pytest.raises(NonFiniteError) as caught:
            call()
        message = str(caught.value)
        assert "beyond the range of float16, the cache's dtype: load the model with cache_dtype='auto'" in message
        assert ("hyaena info" in message) == (name not in {"generate", "score"}), "where it is known it is said so"
        assert "\n" not in message
    for kept in ("int8", "bfloat16", "auto"):
        model.cache_dtype = kept
        assert "cache" not in remedy(model)
