"""Static decoding equals the model's own forward, token by token, whatever rows join and leave."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from configs import TINY_EVO2
from device import DEVICE
from hyaena.config import ModelConfig
from hyaena.decoding import Decoder, PipelinedDecoder, StepOutput, resolve_decoding
from hyaena.decoding.decoder import Graph, Shape
from hyaena.errors import CapacityError, InputError, UnsupportedError
from hyaena.model import StripedHyena
from hyaena.ops import HyenaState, KVState
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


def decoder_of(
    model: StripedHyena,
    cache: Any,
    ids: Tensor,
    params: list[SamplingParams],
    seen: Tensor | None = None,
    **options: Any,
) -> Decoder:
    """A decoder with the rows of one cache."""
    decoder = Decoder(model, len(params), **options)
    decoder.add(cache, ids, params, [p.generator() for p in params], seen=seen)
    return decoder


PARAMS = {
    "greedy": [SamplingParams()] * 3,
    "drawn": [SamplingParams(temperature=1.0, seed=s) for s in (1, 2, 3)],
    "mixed": [
        SamplingParams(temperature=0.8, top_k=7, min_p=0.01, seed=5),
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(temperature=1.2, top_p=0.8, repetition_penalty=1.1, seed=6),
    ],
}


@pytest.mark.parametrize("config", [SH, EVO, TINY_EVO2], ids=["sh", "evo", "evo2"])
@pytest.mark.parametrize("kind", PARAMS)
def test_a_decoder_says_what_forward_and_sample_say(config: ModelConfig, kind: str) -> None:
    model, params = make(config), PARAMS[kind]
    cache, ids, seen = prefill(model, PADDINGS)
    twin, _, _ = prefill(model, PADDINGS)
    decoder = decoder_of(model, twin, ids, params, seen.clone(), top=3)
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
    decoder = decoder_of(model, twin, ids, params)
    for _ in range(9):
        with torch.inference_mode():
            ids = model(ids[:, None], cache=cache)[:, -1].argmax(-1)
        decoder.launch()
    held = decoder.cache()
    assert held.lengths == cache.lengths and held.limits == cache.limits
    for got, want in zip(held.states, cache.states, strict=True):
        if isinstance(got, HyenaState):
            torch.testing.assert_close(got.short, want.short)
            torch.testing.assert_close(got.long, want.long)
        else:
            assert isinstance(got, KVState)
            for row, length in enumerate(held.lengths):
                torch.testing.assert_close(got.keys(row)[:, :length], want.keys(row)[:, :length])
                torch.testing.assert_close(got.values(row)[:, :length], want.values(row)[:, :length])
    with torch.inference_mode():  # and the ordinary path goes on from it
        torch.testing.assert_close(model(ids[:, None], cache=held), model(ids[:, None], cache=cache))


@pytest.mark.parametrize("config", [SH, EVO, TINY_EVO2], ids=["sh", "evo", "evo2"])
def test_the_kernels_say_the_same(config: ModelConfig) -> None:
    """From three rows down to one."""
    pytest.importorskip("triton", reason="the kernels need triton, which is made for Linux")
    from hyaena.ops.triton.decode.operators import FusedDecodeOperators

    model, params = make(config, torch.float32).to(DEVICE), [SamplingParams()] * 3

    def run(operators: DecodeOperators) -> list[StepOutput]:
        cache, ids, _ = prefill(model, PADDINGS)
        decoder = decoder_of(model, cache, ids, params, operators=operators)
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
        decoder = decoder_of(model, cache, ids, params, seen)
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
    together = decoder_of(model, cache, ids, params, seen)
    for _ in range(15):
        together.launch()
    tokens = [together.fetch().tokens for _ in range(15)]
    for row, (own, first, own_seen) in enumerate(alone):
        decoder = decoder_of(model, own, first, [params[row]], own_seen)
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
        decoder = decoder_of(model, cache, ids, params)
        for _ in range(14):
            decoder.launch()
        tokens.append([decoder.fetch().tokens for _ in range(14)])
    assert tokens[0] == tokens[1]


def test_tokens_are_fetched_late() -> None:
    model = make()
    cache, ids, _ = prefill(model, [0])
    decoder = decoder_of(model, cache, ids, [SamplingParams()])
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
        cache.states[0].long[1] = math.nan
    params = [SamplingParams(temperature=temperature, seed=0)] * 3
    decoder = decoder_of(model, cache, ids, params)
    decoder.launch()
    decoder.launch()
    for _ in range(2):
        choice = decoder.fetch()
        assert choice.finite == [True, False, True]
        assert choice.tokens[1] == 0


def test_a_full_memory_refuses() -> None:
    model = make()
    cache, ids, _ = prefill(model, [0], capacity=LENGTH + 2)
    decoder = decoder_of(model, cache, ids, [SamplingParams()])
    decoder.launch()
    decoder.launch()
    with pytest.raises(CapacityError, match="row 0 holds 14 of at most 14 tokens: make its cache with a larger"):
        decoder.launch()
    decoder.fetch()
    decoder.fetch()


def test_what_a_step_would_not_call_is_refused() -> None:
    model = make()
    assert model.unsupported_reason() is None
    cache, ids, _ = prefill(model, [0])

    def refused(message: str, cuda_graph: bool = False) -> None:
        with pytest.raises(UnsupportedError, match=message + ".*decode with decoding='eager'") as caught:
            decoder_of(model, cache, ids, [SamplingParams()], cuda_graph=cuda_graph)
        assert "\n" not in str(caught.value)

    refused("graphs are captured on CUDA devices, and the model is on cpu", cuda_graph=True)
    handle = model.layers[1].register_forward_hook(lambda *_: None)
    refused("the layer of layer 1 has forward hooks")
    handle.remove()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refused("autocast is on")
    mlp = model.layers[1].mlp
    model.layers[1].mlp = torch.nn.Identity()
    refused("layer 1 has a Identity")
    model.layers[1].mlp = mlp
    model.layers[2].mixer = torch.nn.Identity()
    refused("the mixer of layer 2, a Identity, has no method step")


class Adapter(torch.nn.Module):
    """A linear layer with a low-rank update, as fine-tuning puts it in the place of one of ours."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = torch.nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_foreign_linear_layers_norms_and_hooks_are_called() -> None:
    """Every module below a mixer is called, by forward and by step: the head, too."""
    for config in (SH, EVO):
        model = make(config)
        cache, ids, _ = prefill(model, PADDINGS)
        plain = decoder_of(model, cache, ids, [SamplingParams()] * 3)
        plain.launch()
        for layer in model.layers:
            for parent in (layer.mixer, layer.mlp):
                for name, module in list(parent.named_children()):
                    if isinstance(module, torch.nn.Linear):
                        setattr(parent, name, Adapter(module))
        calls: list[Tensor] = []
        if model.lm_head is not None:
            model.lm_head.register_forward_hook(lambda module, x, y, calls=calls: calls.append(y))
        model.embed_tokens.register_forward_hook(lambda module, x, y: 2 * y)
        model.norm = torch.nn.LayerNorm(32, dtype=torch.float64)  # type: ignore[assignment]
        cache, ids, _ = prefill(model, PADDINGS)
        other, _, _ = prefill(model, PADDINGS)
        decoder = decoder_of(model, other, ids, [SamplingParams()] * 3)
        calls.clear()
        decoder.launch()
        assert len(calls) == (model.lm_head is not None)
        with torch.inference_mode():
            expected = model(ids[:, None], cache=cache)[:, -1]
        output = decoder.fetch()
        assert output.tokens == expected.argmax(-1).tolist()
        assert output.logprobs == pytest.approx(expected.log_softmax(-1).amax(-1).tolist(), abs=1e-9)
        assert output.logprobs != pytest.approx(plain.fetch().logprobs, abs=1e-3)


def test_rows_join_and_leave_at_any_step() -> None:
    """What a row decodes does not depend on the rows that come and go beside it, or on its place."""
    model, params = make(), PARAMS["mixed"]
    cache, ids, seen = prefill(model, PADDINGS)
    parts = [(cache.select([row]), ids[row : row + 1], seen[row : row + 1].clone()) for row in range(3)]
    whole = decoder_of(model, cache, ids, params, seen)
    for _ in range(16):
        whole.launch()
    expected = [whole.fetch().tokens for _ in range(16)]

    decoder = Decoder(model, 4)
    rows: list[int] = []
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in range(30):
        if step in (0, 3, 7):
            row = {0: 2, 3: 0, 7: 1}[step]
            own, first, own_seen = parts[row]
            decoder.add(own, first, [params[row]], [params[row].generator()], seen=own_seen)
            rows.append(row)
        decoder.launch()
        for row, token in zip(rows, decoder.fetch().tokens, strict=True):
            tokens[row].append(token)
        done = [row for row in rows if len(tokens[row]) == 16]
        if done:
            decoder.keep([place for place, row in enumerate(rows) if row not in done])
            rows = [row for row in rows if row not in done]
            if not rows:
                break
    assert [tokens[row] for row in range(3)] == [list(column) for column in zip(*expected, strict=True)]


def test_the_pipeline_names_its_rows() -> None:
    """Outputs that were computed before rows joined or left carry the rows of their own step."""
    model, params = make(), [SamplingParams()] * 3
    cache, ids, _ = prefill(model, PADDINGS)
    late = cache.select([0])
    whole = decoder_of(model, cache.select(range(3)), ids, params)
    for _ in range(12):
        whole.launch()
    expected = [list(column) for column in zip(*(whole.fetch().tokens for _ in range(12)), strict=True)]

    pipeline: PipelinedDecoder[str] = PipelinedDecoder(Decoder(model, 4))
    cache.keep([1, 2])
    pipeline.add(["b", "c"], [12, 5], cache, ids[1:], params[:2], [p.generator() for p in params[:2]])
    got: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    steps = {"a": 6, "b": 12, "c": 5}
    for step in range(40):
        if step == 4:
            pipeline.add(["a"], [6], late, ids[:1], params[:1], [params[0].generator()])
        keys, output = pipeline.next()
        for key, token in zip(keys, output.tokens, strict=True):
            if key in pipeline.left:
                got[key].append(token)
        pipeline.remove([key for key in list(pipeline.left) if len(got[key]) == steps[key]])
        if not pipeline.left:
            break
    assert got == {"a": expected[0][:6], "b": expected[1], "c": expected[2][:5]}


def test_memory_is_the_sum_of_the_rows() -> None:
    model = make()
    decoder = Decoder(model, 2)
    caches = [prefill(model, [0], capacity=capacity)[0] for capacity in (20, 4000)]
    bytes_of = [cache.states[1].tensors()[0].nbytes for cache in caches]
    for cache in caches:
        decoder.add(cache, torch.ones(1, dtype=torch.long), [SamplingParams()], [torch.Generator()])
    assert sum(t.nbytes for t in decoder.static.states[1].tensors()) == 2 * sum(bytes_of)
    decoder.launch()
    decoder.fetch()
    decoder.keep([0])  # the long row's storage is freed, and its place reads one slot of scratch
    assert sum(t.nbytes for t in decoder.static.states[1].tensors()) < 3 * bytes_of[0]


def test_mistakes_are_named() -> None:
    model = make()
    cache, ids, _ = prefill(model, PADDINGS)
    params, generators = [SamplingParams()] * 3, [torch.Generator()] * 3
    decoder = Decoder(model, 3)
    with pytest.raises(InputError, match="no rows"):
        decoder.launch()
    with pytest.raises(InputError, match="the cache holds 3 rows, and the decoder was given 2 ids"):
        decoder.add(cache, ids[:2], params, generators)
    with pytest.raises(InputError, match="make it with max_length"):
        decoder.add(model.make_cache(3), ids, params, generators)
    decoder.add(cache.select([0, 1, 2]), ids, params, generators)
    for rows in ([1, 0], [3], [0, 0]):
        with pytest.raises(InputError, match="in rising order"):
            decoder.keep(rows)
    with pytest.raises(CapacityError, match=r"4 places, and 3 \+ 3 rows"):
        decoder.add(cache, ids, params, generators)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"ids": a["ids"].double()}, "ids as a tensor of integers"),
        (lambda a: a | {"ids": a["ids"][:, None]}, "ids as a tensor of integers"),
        (lambda a: a | {"ids": a["ids"].tolist()}, "ids as a tensor of integers"),
        (lambda a: a | {"ids": a["ids"] + 50}, "outside the vocabulary of 50"),
        (lambda a: a | {"ids": a["ids"] - 50}, "outside the vocabulary of 50"),
        (lambda a: a | {"params": a["params"][:2]}, "3 rows, 2 params and 3 generators"),
        (lambda a: a | {"generators": a["generators"] * 2}, "3 rows, 3 params and 6 generators"),
        (lambda a: a | {"seen": a["seen"][:, :5]}, r"seen must be of shape \[3, 50\], not \[3, 5\]"),
        (lambda a: a | {"seen": None, "params": [SamplingParams(repetition_penalty=2.0)] * 3}, "needs seen"),
        (lambda a: a | {"cache": make().make_cache(3, max_length=20)}, "another model"),
        (lambda a: a | {"cache": a["model"].make_cache(3, max_length=20, dtype=torch.bfloat16)}, "one (method and )?d"),
        (lambda a: a | {"cache": a["model"].make_cache(3, max_length=20, method="truncated")}, "the same method"),
    ],
)
def test_rows_that_do_not_fit_change_nothing(change: Any, message: str) -> None:
    model = make()
    cache, ids, seen = prefill(model, PADDINGS)
    first = cache.snapshot()
    generators = [torch.Generator()] * 3
    alone = decoder_of(model, first.snapshot(), ids, [SamplingParams()] * 3)
    decoder = Decoder(model, 8)
    decoder.add(first, ids, [SamplingParams()] * 3, generators)
    arguments = {"cache": cache, "ids": ids, "params": [SamplingParams()] * 3, "generators": generators, "seen": seen}
    changed = change(arguments | {"model": model})
    changed.pop("model")
    with pytest.raises(InputError, match=message):
        decoder.add(**changed)
    assert decoder.rows == 3 and changed["cache"].batch_size == 3
    for state in decoder.static.states:  # free places hold nothing of the rows that were refused
        if isinstance(state, KVState):
            assert state.capacities[3:] == [1] * 5
    decoder.add(**arguments)
    for each in (alone, decoder):
        each.launch()
    assert decoder.fetch().tokens == alone.fetch().tokens * 2


def test_sizes_of_a_decoder_are_checked() -> None:
    model = make()
    for rows in (0, -1, 2.5, "2", True):
        with pytest.raises(InputError, match="max_rows must be a whole number"):
            Decoder(model, rows)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="top must be a whole number from 0 to 50"):
        Decoder(model, 2, top=51)
    with pytest.raises(InputError, match="no step is to be fetched"):
        Decoder(model, 2).fetch()


def test_a_compiled_model_is_decoded() -> None:
    model = make()
    compiled: Any = torch.compile(model, backend="eager")
    cache, ids, _ = prefill(model, PADDINGS)
    alone = decoder_of(model, cache.snapshot(), ids, [SamplingParams()] * 3)
    decoder = decoder_of(compiled, compiled.make_cache(3, max_length=40).select([0, 1, 2]), ids, [SamplingParams()] * 3)
    decoder.keep([])
    decoder.add(cache, ids, [SamplingParams()] * 3, [torch.Generator()] * 3)
    for each in (alone, decoder):
        each.launch()
    assert decoder.fetch().tokens == alone.fetch().tokens
    with torch.inference_mode():
        model(ids[:, None], cache=decoder.cache().snapshot())


def test_rows_of_a_pipeline_have_keys_of_their_own() -> None:
    model = make()
    cache, ids, _ = prefill(model, PADDINGS)
    decoder = PipelinedDecoder[str](Decoder(model, 8))
    rows = (cache, ids, [SamplingParams()] * 3, [torch.Generator()] * 3)
    for keys, steps in ((["a", "b", "a"], [2] * 3), (["a", "b"], [2] * 2), (["a", "b", "c"], [2] * 2)):
        with pytest.raises(InputError, match="as many keys"):
            decoder.add(keys, steps, *rows)
    assert cache.batch_size == 3 and decoder.keys == []
    decoder.add(["a", "b", "c"], [2] * 3, cache.snapshot(), *rows[1:])
    with pytest.raises(InputError, match="as many keys"):
        decoder.add(["c", "d", "e"], [2] * 3, *rows)


def test_rows_without_a_draw_take_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy rows with a repetition penalty, for longer than a block of numbers, before and after rows that draw."""
    monkeypatch.setattr("hyaena.decoding.sampler.BLOCK", 4)
    model = make()
    cache, ids, seen = prefill(model, PADDINGS)
    greedy, drawing = SamplingParams(repetition_penalty=1.5), SamplingParams(temperature=1.0, seed=3)

    def row(i: int, params: SamplingParams) -> tuple[Any, ...]:
        return cache.select([i]), ids[i : i + 1], [params], [params.generator()]

    expected = []
    for i, params in ((0, greedy), (1, drawing), (2, drawing)):
        alone, token, used = cache.select([i]), ids[i : i + 1], seen[i : i + 1].clone()
        generator, tokens = params.generator(), []
        for _ in range(15):
            with torch.inference_mode():
                logits = model(token[:, None], cache=alone)[:, -1]
            token = sample(logits, [params], [generator], seen=used)
            used[0, token] = True
            tokens.append(int(token))
        expected.append(tokens)

    decoder, got = Decoder(model, 4), [[], [], []]

    def run(steps: int, rows: list[int]) -> None:
        for _ in range(steps):
            decoder.launch()
            for i, token in zip(rows, decoder.fetch().tokens, strict=True):
                got[i].append(token)

    decoder.add(*row(0, greedy), seen=seen[:1])
    run(5, [0])
    decoder.add(*row(1, drawing), seen=seen[1:2])
    run(3, [0, 1])
    decoder.keep([0])
    run(2, [0])
    decoder.add(*row(2, drawing), seen=seen[2:])
    run(5, [0, 2])
    assert got == [expected[0], expected[1][:3], expected[2][:5]]


def test_a_graph_of_another_shape_is_never_replayed() -> None:
    replayed = []

    class Fake:
        def replay(self) -> None:
            replayed.append(self)

    shape = Shape(places=2, positions=64, features=SamplingFeatures(), top=0, seen=False)
    packed = torch.zeros(2, 3)
    graph = Graph(shape, Fake(), packed)  # type: ignore[arg-type]
    assert graph.replay(dataclasses.replace(shape)) is packed
    changes = {"places": 1, "positions": 128, "features": SamplingFeatures(draw=True), "top": 1, "seen": True}
    for name, value in changes.items():
        with pytest.raises(AssertionError, match="was to be replayed for"):
            graph.replay(dataclasses.replace(shape, **{name: value}))
    assert len(replayed) == 1


def test_ways_of_decoding() -> None:
    model = make()
    assert resolve_decoding(model, "auto", "auto") == "eager"
    assert resolve_decoding(model, "static", "truncated") == "static"  # the plain operators take any state
    with pytest.raises(InputError, match="unknown decoding 'quick': choose auto, eager, static, compiled, cuda_graph"):
        resolve_decoding(model, "quick", "auto")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="graphs are captured on CUDA devices"):
        resolve_decoding(model, "cuda_graph", "auto")
