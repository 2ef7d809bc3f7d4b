"""The models of ``hyaena.hf`` compute what the native ones do, whatever transformers hands them."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import hyaena
from hyaena import StripedHyena
from hyaena.errors import InputError, UnsupportedError
from hyaena.formats import read_config
from hyaena.hf import (
    StripedHyenaCache,
    StripedHyenaForCausalLM,
    StripedHyenaForSequenceClassification,
    StripedHyenaForTokenClassification,
    StripedHyenaModel,
)

ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
"""Sums in another order, over tens of terms of order 1 in float32."""


def ids(rows: int = 2, length: int = 11) -> Tensor:
    return torch.randint(0, 50, (rows, length))


def cache_of(outputs: object) -> StripedHyenaCache:
    found = getattr(outputs, "cache", None)
    return outputs.past_key_values if found is None else found  # type: ignore[attr-defined]


@torch.inference_mode()
def test_forward_is_the_native_one(native: StripedHyena) -> None:
    model, x = StripedHyenaForCausalLM.from_native(native), ids()
    assert torch.equal(model(x).logits, native(x))
    assert torch.equal(model(x, logits_to_keep=3).logits, native(x, logits_to_keep=3))
    assert torch.equal(model(x, logits_to_keep=torch.tensor([1, 4])).logits, native(x)[:, [1, 4]])
    assert torch.equal(model(inputs_embeds=native.embed_tokens(x)).logits, native(x))
    mask = torch.arange(11) >= torch.tensor([[0], [4]])
    assert torch.equal(model(x, attention_mask=mask.long()).logits, native(x, mask=mask))
    assert isinstance(model(x, return_dict=False), tuple)


@torch.inference_mode()
def test_forward_is_the_native_one_on_the_bundled_model() -> None:
    native, tokenizer = hyaena.load("cub")
    x = torch.tensor([tokenizer.encode("def main():\n    parser = argparse.ArgumentParser()\n")])
    difference = StripedHyenaForCausalLM.from_native(native)(x).logits - native(x)
    assert difference.abs().max() == 0


def test_golden_numbers_of_the_original(golden_case: Path) -> None:
    config, expected = read_config(golden_case / "config.yml"), load_file(golden_case / "expected.safetensors")
    model = StripedHyenaForCausalLM.from_pretrained(golden_case)
    assert model.config.to_native() == config
    x, largest = expected["input_ids"], expected["logits"].abs().max()
    with torch.inference_mode():
        outputs = model(x, attention_mask=torch.ones_like(x))  # a random token may be the one of padding
        assert (outputs.logits - expected["logits"]).abs().max() / largest < 1e-4
        count = expected["greedy_ids"].shape[1]
        greedy = model.generate(
            x, attention_mask=torch.ones_like(x), max_new_tokens=count, do_sample=False, eos_token_id=[], pad_token_id=0
        )
    assert torch.equal(greedy[:, x.shape[1] :], expected["greedy_ids"])


@torch.inference_mode()
def test_one_set_of_weights(native: StripedHyena) -> None:
    model = StripedHyenaForCausalLM.from_native(native)
    mine, theirs = dict(model.named_parameters()), dict(native.named_parameters())
    assert {name.removeprefix("model.") for name in mine} == set(theirs)
    assert all(mine[name if name == "lm_head.weight" else f"model.{name}"] is p for name, p in theirs.items())
    back, x = model.to_native(), ids()
    assert all(a is b for a, b in zip(back.parameters(), native.parameters(), strict=True))
    assert back.config == native.config and torch.equal(back(x), native(x))
    model.model.layers[0].mlp.up_proj.weight.zero_()
    assert torch.equal(model(x).logits, native(x))


def test_a_base_model_has_no_head_to_give(tiny: StripedHyena) -> None:
    base = StripedHyenaModel.from_native(tiny)
    with pytest.raises(UnsupportedError, match="load it as StripedHyenaForCausalLM"):
        base.to_native()


@torch.inference_mode()
def test_hidden_states(native: StripedHyena) -> None:
    model, x = StripedHyenaForCausalLM.from_native(native), ids()
    seen: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _a, out: seen.append(out[0])) for layer in native.layers]
    outputs = model(x, output_hidden_states=True, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    assert outputs.logits.shape == (2, 1, 50)
    states = outputs.hidden_states
    assert len(states) == native.config.num_layers + 1
    expected = [native.embed_tokens(x), *seen[:-1], native.norm(seen[-1])]
    assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))
    assert torch.equal(model.model(x).last_hidden_state, states[-1])


def test_attention_weights_are_refused(tiny: StripedHyena) -> None:
    with pytest.raises(UnsupportedError, match="attention weights are never formed"):
        StripedHyenaForCausalLM.from_native(tiny)(ids(), output_attentions=True)


@torch.inference_mode()
@pytest.mark.parametrize("cuts", [(1,), (3, 4), (5, 6, 7, 8)])
def test_caches_passed_back_and_forth(native: StripedHyena, cuts: tuple[int, ...]) -> None:
    model, x = StripedHyenaForCausalLM.from_native(native), ids()
    parts = torch.tensor_split(x, cuts, dim=1)
    for name in ("past_key_values", "cache"):  # both names work in every version
        cache, found = None, []
        for part in parts:
            outputs = model(part, use_cache=True, **{name: cache})
            cache = cache_of(outputs)
            found.append(outputs.logits)
        torch.testing.assert_close(torch.cat(found, dim=1), native(x), **ROUNDING)
        assert cache is not None and cache.get_seq_length() == 11
    for length in (11, 40):  # a static cache is read by steps after its first tokens
        cache = StripedHyenaCache(length)
        found = [model(part, cache=cache).logits for part in (x[:, :4], x[:, 4:5], x[:, 5:6], x[:, 6:9], x[:, 9:10])]
        found.append(model(x[:, 10:], cache=cache, output_hidden_states=True).logits)
        torch.testing.assert_close(torch.cat(found, dim=1), native(x), **ROUNDING)
        assert cache.get_seq_length() == 11 and cache.get_max_length() == length


def test_a_static_cache_that_is_full(tiny: StripedHyena) -> None:
    model, cache = StripedHyenaForCausalLM.from_native(tiny), StripedHyenaCache(5)
    with torch.inference_mode():
        model(ids(1, 4), cache=cache)
        model(ids(1, 1), cache=cache)
        for length in (1, 2):
            with pytest.raises(hyaena.errors.CapacityError, match="larger"):
                model(ids(1, length), cache=cache)


def test_no_cache_where_none_is_wanted(tiny: StripedHyena) -> None:
    model, x = StripedHyenaForCausalLM.from_native(tiny), ids()
    assert cache_of(model(x)) is not None
    assert cache_of(model(x, use_cache=False)) is None
    assert cache_of(model.train()(x)) is None
    model.config.use_cache = False
    assert cache_of(model.eval()(x)) is None


@torch.inference_mode()
def test_rows_of_a_padded_batch_are_those_alone(native: StripedHyena) -> None:
    model, x = StripedHyenaForCausalLM.from_native(native), ids(4)
    left, right = torch.tensor([0, 4, 0, 2]), torch.tensor([0, 0, 3, 2])
    steps = torch.arange(11)
    mask = ((steps >= left[:, None]) & (steps < 11 - right[:, None])).long()
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as generate makes them
    for logits in (
        model(x, attention_mask=mask).logits,
        model(x, attention_mask=mask, position_ids=positions).logits,
    ):
        for row in range(4):
            part = slice(int(left[row]), 11 - int(right[row]))
            torch.testing.assert_close(logits[row, part], native(x[row : row + 1, part])[0], **ROUNDING)
    assert cache_of(model(x, attention_mask=mask)) is None  # rows that end in padding cannot be continued
    with pytest.raises(InputError, match="cannot be cached"):
        model(x, attention_mask=mask, use_cache=True)


@torch.inference_mode()
def test_packed_documents_do_not_see_each_other(native: StripedHyena) -> None:
    model, x = StripedHyenaForCausalLM.from_native(native), ids()
    numbers = torch.tensor([[0] * 4 + [1] * 7, [5] * 2 + [6] * 5 + [5] * 4])
    positions = torch.tensor([[*range(4), *range(7)], [*range(2), *range(5), *range(4)]])
    expected = native(x, segment_ids=numbers)
    given = {
        "seq_idx": {"seq_idx": numbers.int()},
        "position_ids": {"position_ids": positions},
        "both": {"position_ids": positions, "seq_idx": numbers, "attention_mask": torch.ones_like(x)},
        "cu_seq_lens_q": {
            "cu_seq_lens_q": torch.tensor([0, 4, 11, 13, 18, 22], dtype=torch.int32),
            "cu_seq_lens_k": torch.tensor([0, 4, 11, 13, 18, 22], dtype=torch.int32),
            "max_length_q": 7,
            "max_length_k": 7,
        },
    }
    for name, options in given.items():
        outputs = model(x, **options)
        assert torch.equal(outputs.logits, expected), name
        assert cache_of(outputs) is None
    for row, start, stop in [(0, 0, 4), (0, 4, 11), (1, 0, 2), (1, 2, 7), (1, 7, 11)]:
        torch.testing.assert_close(expected[row, start:stop], native(x[row : row + 1, start:stop])[0], **ROUNDING)
    whole = torch.arange(3, 14).expand(2, 11)
    assert torch.equal(model(x, position_ids=whole).logits, native(x))  # one document, wherever it begins


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "between tokens"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask must have the shape"),
        ({"attention_mask": {"full_attention": None}}, "attention_mask must have the shape"),
        ({"seq_idx": torch.zeros(1, 3)}, "seq_idx must have the shape"),
        ({"position_ids": torch.zeros(1, 3)}, "position_ids must have the shape"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1]]), "use_cache": True}, "hold packed documents cannot be cached"),
        ({"inputs_embeds": torch.zeros(1, 4, 16)}, "either input_ids or inputs_embeds"),
        ({"past_key_values": [1]}, "the cache is a list"),
        ({"seq_idx": [[0, 0, 1, 1]]}, "seq_idx must have the shape"),
        ({"position_ids": [[0, 1, 2, 3]]}, "position_ids must have the shape"),
        *(
            ({"cu_seq_lens_q": ends}, "cu_seq_lens_q must be a tensor that rises from 0 to the 4 tokens")
            for ends in ([0, 4], *map(torch.tensor, ([], 4, [0, 9], [0, 9, 4], [0, -2, 4], [4, 2, 0], [2, 4])))
        ),
    ],
)
def test_bad_arguments(tiny: StripedHyena, options: dict, words: str) -> None:
    model = StripedHyenaForCausalLM.from_native(tiny)
    with pytest.raises(InputError, match=words):
        model(torch.zeros(1, 4, dtype=torch.long), **options)


def test_bad_ids_and_packed_rows_with_padding(tiny: StripedHyena) -> None:
    model = StripedHyenaForCausalLM.from_native(tiny)
    with pytest.raises(InputError, match="token id 50 is outside the vocabulary of 50"):
        model(torch.tensor([[50]]))
    for shape in ((4, 16), (1, 4, 15)):
        with pytest.raises(InputError, match=r"inputs_embeds must be of shape \[B, T, 16\], and is a float32 Tensor"):
            model(inputs_embeds=torch.zeros(shape))
    with pytest.raises(UnsupportedError, match="packed documents in rows with padding on the left"):
        mask, numbers = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1]])
        model(torch.zeros(1, 4, dtype=torch.long), attention_mask=mask, seq_idx=numbers)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "the cache holds 4 tokens, and no others were given"),
        ({"position_ids": torch.tensor([[4, 0]])}, "positions that restart"),
        ({"seq_idx": torch.tensor([[0, 1]])}, "packed documents cannot follow"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 1]])}, "before the first token"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}, "end in padding"),
    ],
)
def test_bad_continuations(tiny: StripedHyena, options: dict, words: str) -> None:
    model = StripedHyenaForCausalLM.from_native(tiny)
    x = torch.zeros(1, 4, dtype=torch.long)
    cache = cache_of(model(x))
    before = model(x[:, :1], cache=cache_of(model(x))).logits
    with pytest.raises(InputError, match=words):
        model(**{"input_ids": x[:, :2], "cache": cache, **options})
    assert torch.equal(model(x[:, :1], cache=cache).logits, before)  # nothing was lost


@torch.no_grad()
@pytest.mark.parametrize("length", [None, 16])
def test_what_fails_leaves_no_wrong_cache(tiny: StripedHyena, length: int | None) -> None:
    model, cache = StripedHyenaForCausalLM.from_native(tiny), StripedHyenaCache(length)

    def interrupted(x: Tensor) -> None:
        hook = tiny.layers[1].mlp.up_proj.register_forward_hook(Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model(x, cache=cache)
        hook.remove()

    x = ids(1, 9)
    whole = model(x, use_cache=False).logits
    interrupted(ids(2, 4))
    model(x[:, :4], cache=cache)  # another number of rows than those that were not read
    for count in (1, 2):
        with pytest.raises(InputError, match="the cache holds 1 rows and the ids 2"):
            model(ids(2, count), cache=cache)
    assert cache.get_seq_length() == 4
    assert torch.allclose(model(x[:, 4:5], cache=cache).logits, whole[:, 4:5], atol=1e-5)
    interrupted(x[:, 5:6])
    if length is None:
        assert torch.allclose(model(x[:, 5:6], cache=cache).logits, whole[:, 5:6], atol=1e-5)
        return
    with pytest.raises(InputError, match="failed midway"):  # its first layer has read the token, the others not
        model(x[:, 5:6], cache=cache)
    cache.reset()
    assert torch.allclose(model(x, cache=cache).logits, whole, atol=1e-5)


def test_a_cache_of_another_model(tiny: StripedHyena) -> None:
    cache = cache_of(StripedHyenaForCausalLM.from_native(tiny)(ids()))
    with pytest.raises(InputError, match="made by another model"):
        StripedHyenaForCausalLM.from_native(tiny)(ids(), cache=cache)


def test_loss_and_gradients(native: StripedHyena) -> None:
    model, x = StripedHyenaForCausalLM.from_native(native).train(), ids()
    labels = x.clone()
    labels[0, :3] = -100
    loss = model(x, labels=labels).loss
    logits = native(x)[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    shared = model(x, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(shared, expected * 18 / 100, rtol=1e-6, atol=1e-6)
    loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(plain) == len(list(model.parameters()))
    for reentrant in (False, True):
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        assert model.is_gradient_checkpointing
        model(x, labels=labels).loss.backward()
        assert all(torch.equal(p.grad, plain[name]) for name, p in model.named_parameters())
    with pytest.raises(InputError, match="gradient checkpointing and a cache"):
        model(x, use_cache=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_classes_of_texts(tiny: StripedHyena, side: str) -> None:
    model = StripedHyenaForSequenceClassification.from_native(tiny, num_labels=3, pad_token_id=0).eval()
    rows = [torch.randint(1, 50, (n,)) for n in (4, 7, 2)]
    x, mask = (torch.zeros(3, 7, dtype=torch.long) for _ in range(2))
    for i, row in enumerate(rows):
        part = slice(0, len(row)) if side == "right" else slice(7 - len(row), 7)
        x[i, part], mask[i, part] = row, 1
    outputs = model(x, attention_mask=mask, labels=torch.tensor([0, 2, 1]))
    with torch.no_grad():
        alone = torch.cat([model(row[None]).logits for row in rows])
        last = tiny.norm(hidden_of(tiny, rows[1][None]))[:, -1] @ model.score.weight.T
    torch.testing.assert_close(outputs.logits, alone, **ROUNDING)
    torch.testing.assert_close(alone[1:2], last, **ROUNDING)
    expected = torch.nn.functional.cross_entropy(outputs.logits, torch.tensor([0, 2, 1]))
    torch.testing.assert_close(outputs.loss, expected)
    outputs.loss.backward()
    assert model.score.weight.grad is not None
    if side == "right":  # without a mask, padding is what has its id
        torch.testing.assert_close(model(x).logits, alone, **ROUNDING)


def hidden_of(native: StripedHyena, x: Tensor) -> Tensor:
    """What the last layer leaves to the norm."""
    seen = []
    hook = native.layers[-1].register_forward_hook(lambda _m, _a, out: seen.append(out[0]))
    native(x)
    hook.remove()
    return seen[0]


def test_classes_of_tokens(tiny: StripedHyena) -> None:
    model = StripedHyenaForTokenClassification.from_native(tiny, num_labels=5)
    x, labels = ids(), torch.randint(0, 5, (2, 11))
    labels[0, :4] = -100
    outputs = model(x, labels=labels)
    expected = tiny.norm(hidden_of(tiny, x)) @ model.score.weight.T + model.score.bias
    torch.testing.assert_close(outputs.logits, expected, **ROUNDING)
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(outputs.loss, loss)


def test_initialisation_is_the_native_one(tiny: StripedHyena) -> None:
    config = StripedHyenaForCausalLM.from_native(tiny).config
    config.hidden_size, config.intermediate_size = 256, 512
    model = StripedHyenaForCausalLM(config)
    wide = StripedHyena(config.to_native())
    mine, theirs = (dict(m.named_parameters()) for m in (model.to_native(), wide))
    for name, parameter in theirs.items():
        torch.testing.assert_close(mine[name].std(), parameter.std(), rtol=0.2, atol=1e-6, msg=name)
