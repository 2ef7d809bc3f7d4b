"""``generate`` of transformers over our models: the tokens of ``hyaena.generate``, whatever the road."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, TextIteratorStreamer

import hyaena
from hf_models import ALL_KINDS, build
from hyaena import StripedHyena
from hyaena.errors import CapacityError, InputError, UnsupportedError
from hyaena.hf import StripedHyenaCache, StripedHyenaForCausalLM
from hyaena.tokenizers import Tokenizer

PROMPTS = ["import argparse\n", "def f(x):\n    return", "class", "#"]
NEW = 20


@pytest.fixture(scope="module")
def cub() -> tuple[StripedHyena, Tokenizer]:
    return hyaena.load("cub")


@pytest.fixture(scope="module")
def expected(cub: tuple[StripedHyena, Tokenizer]) -> list[list[int]]:
    return [done.tokens for done in hyaena.generate(*cub, PROMPTS, max_new_tokens=NEW)]


def batch(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The prompts with padding on the left."""
    rows = [tokenizer.encode(prompt) for prompt in PROMPTS]
    width = max(map(len, rows))
    padded = torch.tensor([[tokenizer.pad_id] * (width - len(row)) + row for row in rows])
    return {"input_ids": padded, "attention_mask": (padded != tokenizer.pad_id).long()}


def new_tokens(ids: Tensor, prompt: Tensor, expected: list[list[int]]) -> list[list[int]]:
    """What was generated, without the padding after a row's end."""
    return [row[prompt.shape[1] :].tolist()[: len(e)] for row, e in zip(ids, expected, strict=True)]


def compiled() -> dict[str, Any]:
    """A step as one graph; which compiler makes code of it is not ours to test, and takes minutes."""
    config = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False, "max_new_tokens": 4},
        {"prefill_chunk_size": 5},
        {"prefill_chunk_size": 1},
        {"cache_implementation": "static", "disable_compile": True},
        {"cache_implementation": "static", "prefill_chunk_size": 7, "disable_compile": True},
        {"cache_implementation": "static", "prefill_chunk_size": 1, "disable_compile": True},
        pytest.param(compiled(), marks=pytest.mark.integration),
    ],
    ids=lambda options: " ".join(options),
)
def test_greedy_tokens_are_those_of_hyaena(
    cub: tuple[StripedHyena, Tokenizer], expected: list[list[int]], options: dict[str, Any]
) -> None:
    """A batch of unequal prompts, token for token."""
    model, inputs = StripedHyenaForCausalLM.from_native(cub[0]), batch(cub[1])
    count = options.get("max_new_tokens", NEW)
    ids = model.generate(**inputs, do_sample=False, **{"max_new_tokens": NEW, **options})
    cut = [tokens[:count] for tokens in expected]
    assert new_tokens(ids, inputs["input_ids"], cut) == cut


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_every_kind_of_layer(native: StripedHyena, kind: str) -> None:
    model, x = StripedHyenaForCausalLM.from_native(native), torch.randint(2, 50, (2, 6))
    options = {"cache_implementation": kind, "disable_compile": True, "eos_token_id": [], "pad_token_id": 0}
    found = model.generate(x, max_new_tokens=8, do_sample=False, **options)
    assert torch.equal(found, greedy(native, x, 8))


def test_a_compiled_step_is_one_graph() -> None:
    native, x = build(ALL_KINDS), torch.randint(2, 50, (2, 6))
    model = StripedHyenaForCausalLM.from_native(native)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        options = {"eos_token_id": [], "pad_token_id": 0, **compiled()}
        found = model.generate(x, max_new_tokens=8, do_sample=False, **options)
        assert torch.equal(found, greedy(native, x, 8))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def greedy(native: StripedHyena, x: Tensor, count: int) -> Tensor:
    with torch.inference_mode():
        for _ in range(count):
            x = torch.cat([x, native(x, logits_to_keep=1).argmax(-1)], dim=1)
    return x


def test_beams_are_those_without_a_cache(tiny: StripedHyena) -> None:
    model, x = StripedHyenaForCausalLM.from_native(tiny), torch.randint(2, 50, (2, 5))
    options = {"num_beams": 3, "max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(x, use_cache=False, **options)
    assert torch.equal(model.generate(x, **options), plain)
    assert torch.equal(model.generate(x, cache_implementation="static", **options), plain)


def test_samples_follow_the_seed(tiny: StripedHyena) -> None:
    model, x = StripedHyenaForCausalLM.from_native(tiny), torch.randint(2, 50, (1, 5))
    options = {"do_sample": True, "top_k": 20, "max_new_tokens": 8, "num_return_sequences": 3, "pad_token_id": 0}
    torch.manual_seed(1)
    first = model.generate(x, **options)
    torch.manual_seed(1)
    assert torch.equal(model.generate(x, use_cache=False, **options), first)
    assert len({tuple(row) for row in first.tolist()}) == 3


def test_embeddings_as_a_prompt(tiny: StripedHyena) -> None:
    model, x = StripedHyenaForCausalLM.from_native(tiny), torch.randint(2, 50, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    given = model.generate(inputs_embeds=tiny.embed_tokens(x), **options)
    assert torch.equal(given, model.generate(x, **options)[:, 5:])


def test_a_prefix_that_is_read_once(cub: tuple[StripedHyena, Tokenizer], expected: list[list[int]]) -> None:
    """A cache of the first tokens, copied for each continuation, and one that goes on from turn to turn."""
    model, x = StripedHyenaForCausalLM.from_native(cub[0]), torch.tensor([cub[1].encode(PROMPTS[0])])
    cache = StripedHyenaCache()
    with torch.inference_mode():
        model(x[:, :7], cache=cache)
    for _ in range(2):
        ids = model.generate(x, past_key_values=copy.deepcopy(cache), max_new_tokens=NEW, do_sample=False)
        assert new_tokens(ids, x, expected[:1]) == expected[:1]
    for turn in (5, 5, 10):
        x = model.generate(x, past_key_values=cache, max_new_tokens=turn, do_sample=False)
    assert x[0, -20:].tolist() == expected[0]


def test_a_static_cache_in_every_mode_of_autograd(tiny: StripedHyena) -> None:
    """Steps update states in place, which autograd allows in some modes only; the results are the same in all."""
    model, x = StripedHyenaForCausalLM.from_native(tiny), torch.randint(2, 50, (2, 6))
    expected = tiny(x).detach()
    modes = (torch.inference_mode, torch.no_grad, torch.enable_grad)
    for first in modes:
        for second in modes:
            cache = StripedHyenaCache(8)
            with first():
                model(x[:, :3], cache=cache)
            with second():
                found = [model(part, cache=cache).logits for part in x[:, 3:].split(1, dim=1)]
                assert found[0].requires_grad == (second is torch.enable_grad)
            torch.testing.assert_close(torch.cat(found, dim=1), expected[:, 3:], rtol=1e-5, atol=1e-5)
            assert not any(t.requires_grad for t in cache.native.tensors())


def test_hidden_states_of_each_step(tiny: StripedHyena) -> None:
    model, x = StripedHyenaForCausalLM.from_native(tiny), torch.randint(2, 50, (1, 5))
    for kind in (None, "static"):
        done = model.generate(
            x, max_new_tokens=3, pad_token_id=0, cache_implementation=kind, disable_compile=True,
            output_hidden_states=True, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        assert [len(step) for step in done.hidden_states] == [4] * 3
        torch.testing.assert_close(tiny.lm_head(done.hidden_states[2][-1])[:, -1], done.logits[2])


def test_what_is_refused(tiny: StripedHyena) -> None:
    model, x = StripedHyenaForCausalLM.from_native(tiny), torch.randint(2, 50, (1, 5))
    options = {"max_new_tokens": 4, "pad_token_id": 0}
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(x, assistant_model=model, **options)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(x, prompt_lookup_num_tokens=2, **options)
    for kind in ("quantized", "offloaded"):
        with pytest.raises(UnsupportedError, match="choose 'dynamic'"):
            model.generate(x, cache_implementation=kind, **options)
    with pytest.raises(InputError, match="exclude each other"):
        model.generate(x, past_key_values=StripedHyenaCache(), cache_implementation="static", **options)
    with pytest.raises(CapacityError, match="made for 6 tokens"):
        model.generate(x, past_key_values=StripedHyenaCache(6), **options)
    with pytest.raises(UnsupportedError, match="cannot be cut"):
        StripedHyenaCache().crop(1)


def test_verbs_of_the_cache(tiny: StripedHyena) -> None:
    model, x = StripedHyenaForCausalLM.from_native(tiny), torch.randint(2, 50, (2, 5))
    for cache in (StripedHyenaCache(), StripedHyenaCache(9)):
        with torch.inference_mode():
            model(x, cache=cache)
            model(x[:, :1], cache=cache)
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([3, 0]))
            assert (cache.batch_size, len(cache), cache.get_seq_length()) == (2, 3, 6)
            expected = tiny(torch.cat([x, x[:, :1], x[:, 1:2]], dim=1), logits_to_keep=1)
            torch.testing.assert_close(model(x[[1, 0], 1:2], cache=cache).logits, expected[[1, 0]])
            assert "7 positions" in repr(cache)
            cache.reset()
            assert (cache.batch_size, cache.get_seq_length()) == (-1, 0)
            torch.testing.assert_close(model(x, cache=cache).logits, tiny(x))


def test_streaming(cub: tuple[StripedHyena, Tokenizer], expected: list[list[int]], tmp_path: Any) -> None:
    from transformers import AutoTokenizer

    from hyaena.tokenizers import transformers_files

    for name, content in transformers_files(cub[1]).items():
        (tmp_path / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model = StripedHyenaForCausalLM.from_native(cub[0])
    model.generate(**tokenizer(PROMPTS[0], return_tensors="pt"), streamer=streamer, max_new_tokens=NEW, do_sample=False)
    assert "".join(streamer) == cub[1].decode(expected[0])
