"""Decoding on fixed memory says what the model's own forward says, token by token."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from device import DEVICE
from hyaena.config import ModelConfig
from hyaena.decoding import Decoder, StepOutput, resolve_decoding, why_not
from hyaena.decoding.decoder import Graph, Shape
from hyaena.errors import CapacityError, InputError, UnsupportedError
from hyaena.model import StripedHyena
from hyaena.ops import HyenaState
from hyaena.ops.step import DecodeOperators
from hyaena.sampling import SamplingFeatures, SamplingParams, log_probabilities, sample

SH = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    layer_types=("hyena", "attention", "hyena"),
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    state_size=2,
)
EVO = dataclasses.replace(
    SH,
    layer_types=("attention", "hyena"),
    num_key_value_heads=4,
    state_size=5,
    activation="gelu",
    norm_eps=1e-2,
    norm_eps_inside_root=False,
    tie_embeddings=True,
    attention_qkv_bias=True,
    attention_out_bias=True,
    rope_scaling_factor=4.0,
)
PADDINGS = [0, 5, 11]
LENGTH = 12


def make(config: ModelConfig = SH, dtype: torch.dtype = torch.float64) -> StripedHyena:
    torch.manual_seed(3)
    model = StripedHyena(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "long_filter" not in name:
                p.normal_(std=0.3)
    return model.to(dtype)


@torch.inference_mode()
def prefill(model: StripedHyena, paddings: list[int], capacity: int = 40) -> tuple[Any, Tensor, Tensor]:
    """A cache of unequal prompts, the greedy tokens after them, and what the rows have seen."""
    torch.manual_seed(4)
    mask = (torch.arange(LENGTH) >= torch.tensor(paddings)[:, None]).to(model.device)
    ids = torch.randint(model.config.vocab_size, mask.shape).to(model.device)
    cache = model.make_cache(len(paddings), max_length=capacity)
    first = model(ids, cache=cache, mask=mask)[:, -1].argmax(-1)
    seen = ids.new_zeros(len(paddings), model.config.vocab_size, dtype=torch.bool)
    for row, padding in enumerate(paddings):
        seen[row, ids[row, padding:]] = True
        seen[row, first[row]] = True
    return cache, first, seen


PARAMS = {
    "greedy": [SamplingParams()] * 3,
    "drawn": [SamplingParams(temperature=1.0, seed=s) for s in (1, 2, 3)],
    "mixed": [
        SamplingParams(temperature=0.8, top_k=7, min_p=0.01, seed=5),
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(temperature=1.2, top_p=0.8, repetition_penalty=1.1, seed=6),
    ],
}


@pytest.mark.parametrize("config", [SH, EVO], ids=["sh", "evo"])
@pytest.mark.parametrize("kind", PARAMS)
def test_a_decoder_says_what_forward_and_sample_say(config: ModelConfig, kind: str) -> None:
    model, params = make(config), PARAMS[kind]
    cache, ids, seen = prefill(model, PADDINGS)
    twin, _, _ = prefill(model, PADDINGS)
    decoder = Decoder(model, twin, ids, params, [p.generator() for p in params], seen=seen.clone(), top=3)
    generators = [p.generator() for p in params]
    for _ in range(20):
        with torch.inference_mode():
            logits = model(ids[:, None], cache=cache)[:, -1]
            ids = sample(logits, params, generators, seen=seen)
            seen.scatter_(1, ids[:, None], True)
        decoder.launch()
        choice = decoder.fetch()
        assert choice.tokens == ids.tolist()
        assert choice.finite == [True] * 3
        chosen, values, indices = log_probabilities(logits, ids, 3)
        assert choice.logprobs == pytest.approx(chosen.tolist(), abs=1e-9)
        for row, pairs in enumerate(choice.top):
            assert [i for i, _ in pairs] == indices[row].tolist()
            assert [value for _, value in pairs] == pytest.approx(values[row].tolist(), abs=1e-9)


def test_the_memory_is_what_the_cache_would_hold() -> None:
    model = make()
    cache, ids, _ = prefill(model, PADDINGS)
    twin, _, _ = prefill(model, PADDINGS)
    params = [SamplingParams()] * 3
    decoder = Decoder(model, twin, ids, params, [p.generator() for p in params])
    for _ in range(9):
        with torch.inference_mode():
            ids = model(ids[:, None], cache=cache)[:, -1].argmax(-1)
        decoder.launch()
    held = decoder.cache()
    assert held.length == cache.length and held.max_length == cache.max_length
    assert held.padding is not None and held.padding.tolist() == PADDINGS
    for got, want in zip(held.layers, cache.layers, strict=True):
        if isinstance(got, HyenaState) and isinstance(want, HyenaState):
            torch.testing.assert_close(got.short, want.short)
            torch.testing.assert_close(got.long, want.long)
        elif not isinstance(got, HyenaState) and not isinstance(want, HyenaState):
            torch.testing.assert_close(got.keys, want.keys)
            torch.testing.assert_close(got.values, want.values)
    with torch.inference_mode():  # and the ordinary path goes on from it
        torch.testing.assert_close(model(ids[:, None], cache=held), model(ids[:, None], cache=cache))


@pytest.mark.parametrize("config", [SH, EVO], ids=["sh", "evo"])
def test_the_kernels_say_the_same(config: ModelConfig) -> None:
    """From three rows down to one."""
    pytest.importorskip("triton", reason="the kernels need triton, which is made for Linux")
    from hyaena.ops.triton.decode.operators import FusedDecodeOperators

    model, params = make(config, torch.float32).to(DEVICE), [SamplingParams()] * 3

    def run(operators: DecodeOperators) -> list[StepOutput]:
        cache, ids, _ = prefill(model, PADDINGS)
        decoder = Decoder(model, cache, ids, params, [p.generator() for p in params], operators=operators)
        choices = []
        for count in range(5):
            if count == 3:
                decoder.keep([1])
            decoder.launch()
            choices.append(decoder.fetch())
        return choices

    pairs = zip(run(FusedDecodeOperators()), run(DecodeOperators()), strict=True)
    for got, want in pairs:
        assert got.tokens == want.tokens
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4)


@pytest.mark.parametrize("kind", PARAMS)
def test_rows_leave_and_the_others_do_not_notice(kind: str) -> None:
    model, params = make(), PARAMS[kind]

    def run(leave: dict[int, list[int]]) -> dict[int, list[int]]:
        cache, ids, seen = prefill(model, PADDINGS)
        decoder = Decoder(model, cache, ids, params, [p.generator() for p in params], seen=seen)
        rows, tokens = [0, 1, 2], {row: [] for row in range(3)}
        for count in range(20):
            if count in leave:
                decoder.keep([rows.index(row) for row in leave[count]])
                rows = leave[count]
            decoder.launch()
            for row, token in zip(rows, decoder.fetch().tokens, strict=True):
                tokens[row].append(token)
        return tokens

    whole, parts = run({}), run({4: [1, 2], 9: [2]})
    assert whole[2] == parts[2] and whole[1][:9] == parts[1] and whole[0][:4] == parts[0]


def test_a_row_in_a_batch_is_the_row_alone() -> None:
    model, params = make(), PARAMS["mixed"]
    cache, ids, seen = prefill(model, PADDINGS)
    alone = [(cache.select([row]), ids[row : row + 1], seen[row : row + 1].clone()) for row in range(3)]
    together = Decoder(model, cache, ids, params, [p.generator() for p in params], seen=seen)
    for _ in range(15):
        together.launch()
    tokens = [together.fetch().tokens for _ in range(15)]
    for row, (own, first, own_seen) in enumerate(alone):
        decoder = Decoder(model, own, first, [params[row]], [params[row].generator()], seen=own_seen)
        for step in tokens:
            decoder.launch()
            assert decoder.fetch().tokens == [step[row]]


def test_numbers_are_drawn_in_blocks_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    params = PARAMS["drawn"]
    tokens = []
    for block in (256, 3):
        monkeypatch.setattr("hyaena.decoding.sampler.BLOCK", block)
        cache, ids, _ = prefill(model, PADDINGS)
        decoder = Decoder(model, cache, ids, params, [p.generator() for p in params])
        for _ in range(14):
            decoder.launch()
        tokens.append([decoder.fetch().tokens for _ in range(14)])
    assert tokens[0] == tokens[1]


def test_tokens_are_fetched_late() -> None:
    model = make()
    cache, ids, _ = prefill(model, [0])
    decoder = Decoder(model, cache, ids, [SamplingParams()], [torch.Generator()])
    decoder.launch()
    decoder.launch()
    first, second = decoder.fetch(), decoder.fetch()
    assert first.tokens != second.tokens
    decoder.launch()
    with pytest.raises(AssertionError, match="fetch what was launched"):
        decoder.keep([0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_reported_with_the_token(temperature: float) -> None:
    model = make()
    cache, ids, _ = prefill(model, PADDINGS)
    with torch.inference_mode():
        cache.layers[0].long[1] = math.nan
    params = [SamplingParams(temperature=temperature, seed=0)] * 3
    decoder = Decoder(model, cache, ids, params, [p.generator() for p in params])
    decoder.launch()
    decoder.launch()
    for _ in range(2):
        choice = decoder.fetch()
        assert choice.finite == [True, False, True]
        assert choice.tokens[1] == 0


def test_a_full_memory_refuses() -> None:
    model = make()
    cache, ids, _ = prefill(model, [0], capacity=LENGTH + 2)
    decoder = Decoder(model, cache, ids, [SamplingParams()], [torch.Generator()])
    decoder.launch()
    decoder.launch()
    with pytest.raises(CapacityError, match="14 of at most 14 tokens: make it with a larger max_length"):
        decoder.launch()
    decoder.fetch()
    decoder.fetch()


def test_what_a_step_would_not_call_is_refused() -> None:
    model = make()
    assert why_not(model) is None
    cache, ids, _ = prefill(model, [0])

    def refused(message: str, captured: bool = False) -> None:
        with pytest.raises(UnsupportedError, match=message + ".*decode with decoding='eager'") as caught:
            Decoder(model, cache, ids, [SamplingParams()], [torch.Generator()], captured=captured)
        assert "\n" not in str(caught.value)

    refused("graphs are captured on CUDA devices, and the model is on cpu", captured=True)
    handle = model.layers[1].register_forward_hook(lambda *_: None)
    refused(r"layers\.1 has forward hooks")
    handle.remove()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refused("autocast is on")
    model.norm.half()
    refused("several dtypes")
    model.norm.double()
    model.norm = torch.nn.LayerNorm(32)  # type: ignore[assignment]
    refused("norm is a LayerNorm")


def test_mistakes_are_named() -> None:
    model = make()
    cache, ids, _ = prefill(model, PADDINGS)
    params, generators = [SamplingParams()] * 3, [torch.Generator()] * 3
    with pytest.raises(InputError, match="the cache holds 3 rows, and the decoder was given 2 ids"):
        Decoder(model, cache, ids[:2], params, generators)
    with pytest.raises(InputError, match="make it with max_length"):
        Decoder(model, model.make_cache(3), ids, params, generators)
    decoder = Decoder(model, cache, ids, params, generators)
    for rows in ([], [1, 0], [3], [0, 0]):
        with pytest.raises(InputError, match="in rising order"):
            decoder.keep(rows)


def test_a_graph_of_another_shape_is_never_replayed() -> None:
    replayed = []

    class Fake:
        def replay(self) -> None:
            replayed.append(self)

    shape = Shape(rows=2, capacity=40, needs=SamplingFeatures(), top=0)
    packed = torch.zeros(2, 3)
    graph = Graph(shape, Fake(), packed)  # type: ignore[arg-type]
    assert graph.replay(Shape(rows=2, capacity=40, needs=SamplingFeatures(), top=0)) is packed
    for other in ({"rows": 1}, {"capacity": 41}, {"needs": SamplingFeatures(draw=True)}, {"top": 1}):
        with pytest.raises(AssertionError, match="was to be replayed for"):
            graph.replay(dataclasses.replace(shape, **other))
    assert len(replayed) == 1


def test_ways_of_decoding() -> None:
    model = make()
    assert resolve_decoding(model, "auto", "auto") == "eager"
    assert resolve_decoding(model, "static", "truncated") == "static"  # the plain operators take any state
    with pytest.raises(InputError, match="unknown decoding 'quick': choose auto, eager, static, cuda_graph"):
        resolve_decoding(model, "quick", "auto")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="graphs are captured on CUDA devices"):
        resolve_decoding(model, "cuda_graph", "auto")
