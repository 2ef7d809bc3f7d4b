"""Rows of a decoder that end, leave and join: what is counted, dropped and kept for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from decoding.test_decoder import EVO, PADDINGS, PARAMS, SH, decoder_of, make, prefill
from hyaena.cache import Cache
from hyaena.decoding import Decoder, EagerDecoder, PipelinedDecoder
from hyaena.errors import CapacityError, InputError
from hyaena.model import StripedHyena
from hyaena.sampling import SamplingFeatures, SamplingParams, sample


def steps(decoder: Decoder, count: int) -> list[list[int]]:
    tokens = []
    for _ in range(count):
        decoder.launch()
        tokens.append(decoder.fetch().tokens)
    return tokens


def rows_of_limits(model: StripedHyena, limits: list[int]) -> tuple[Decoder, list[Decoder]]:
    """A decoder of rows of 12 tokens with these limits, and a decoder with room for each of them alone."""
    decoder, alone = Decoder(model, len(limits)), []
    for limit in limits:
        for capacity, target in ((limit, decoder), (40, one := Decoder(model, 1))):
            cache, ids, _ = prefill(model, [0], capacity)
            target.add(cache, ids, [SamplingParams()], [torch.Generator()])
        alone.append(one)
    return decoder, alone


@torch.inference_mode()
def test_a_step_that_is_undone_leaves_no_trace() -> None:
    """As a capture does it: run a step, write back what ``mutated_tensors`` names, and run it again."""
    for config in (SH, EVO):
        model = make(config)
        results = []
        for undo in (False, True):
            cache, ids, seen = prefill(model, PADDINGS)
            decoder = decoder_of(model, cache, ids, PARAMS["mixed"], seen)
            if undo:
                decoder.sampler.prepare()
                decoder.sampler.left += 1  # the launch below prepares it once more
                changing = [*decoder.static.mutated_tensors(3), *decoder.sampler.mutated_tensors(3), decoder.ids]
                before = [t.clone() for t in changing]
                decoder._step(decoder._shape())
                for tensor, old in zip(changing, before, strict=True):
                    tensor.copy_(old)
            results.append(steps(decoder, 6))
        assert results[0] == results[1]


def test_added_rows_belong_to_the_decoder() -> None:
    model = make()
    cache, ids, _ = prefill(model, PADDINGS)
    decoder = decoder_of(model, cache, ids, [SamplingParams()] * 3)
    assert cache.batch_size == 0 and decoder.rows == 3
    with pytest.raises(InputError, match="moved to another cache or decoder"), torch.inference_mode():
        model(ids[:, None], cache=cache)


def test_a_retired_row_may_be_full_and_the_others_go_on() -> None:
    decoder, alone = rows_of_limits(make(), [14, 30])
    expected = steps(alone[1], 6)
    got = steps(decoder, 2)
    with pytest.raises(CapacityError, match="row 0 holds 14 of at most 14"):
        decoder.launch()
    decoder.retire(0)
    got += steps(decoder, 4)
    assert [row[1:] for row in got] == expected
    assert decoder.lengths == [14, 18]  # as the device counts: a full row overwrites its last slot
    assert decoder.static.device_lengths.tolist() == [14, 18]
    with torch.inference_mode():
        assert decoder.cache().lengths == [14, 18]


def test_who_is_retired_follows_the_rows() -> None:
    decoder, _ = rows_of_limits(make(), [20, 14, 14])
    steps(decoder, 2)
    decoder.retire(1)
    decoder.keep([1, 2])
    assert decoder.retired == {0}
    with pytest.raises(CapacityError, match="row 1 holds 14 of at most 14"):
        decoder.launch()
    decoder.keep([1])  # the retired row leaves, and the one that takes its place is not retired
    assert decoder.retired == set()
    with pytest.raises(CapacityError, match="row 0 holds 14 of at most 14"):
        decoder.launch()


def test_graphs_are_dropped_when_the_table_of_positions_moves() -> None:
    model = make()
    decoder = Decoder(model, 4)

    def add(capacity: int) -> None:
        cache, ids, _ = prefill(model, [0], capacity)
        decoder.add(cache, ids, [SamplingParams()], [torch.Generator()])

    add(40)  # 64 positions
    decoder.graphs[decoder._shape()] = None  # type: ignore[assignment]
    add(64)
    assert len(decoder.graphs) == 1
    add(65)
    assert len(decoder.graphs) == 0 and decoder._shape().positions == 128


def test_outputs_of_places_without_a_row_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph computes a power of two of places."""
    decoder, _ = rows_of_limits(make(), [20, 20, 20])
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=int, synchronize=int))
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    monkeypatch.setattr(decoder, "_step", lambda _: torch.tensor([[float(i), -1.0, 1.0] for i in range(4)]))
    assert decoder._launch()().tokens == [0, 1, 2]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([0, 49, 50]), "outside the vocabulary of 50"),
        (torch.tensor([0, -1, 49]), "outside the vocabulary of 50"),
        (torch.tensor([True, False, True]), "ids as a tensor of integers"),
    ],
)
def test_ids_at_the_edge_of_the_vocabulary(ids: Tensor, message: str) -> None:
    model = make()
    cache, _, _ = prefill(model, PADDINGS)
    rows: tuple[Any, ...] = ([SamplingParams()] * 3, [torch.Generator()] * 3)
    with pytest.raises(InputError, match=message):
        Decoder(model, 3).add(cache, ids, *rows)
    Decoder(model, 3).add(cache, torch.tensor([0, 49, 49]), *rows)


def test_numbers_are_the_rows_own_after_others_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of the blocks that are drawn after that."""
    monkeypatch.setattr("hyaena.decoding.sampler.BLOCK", 3)
    model, params = make(), PARAMS["drawn"]
    tokens = []
    for leave in (False, True):
        cache, ids, _ = prefill(model, PADDINGS)
        decoder = decoder_of(model, cache, ids, params)
        first = steps(decoder, 4)
        if leave:
            decoder.keep([1, 2])
        tokens.append([row[-2:] for row in first + steps(decoder, 8)])
    assert tokens[0] == tokens[1]


def test_what_no_row_needs_any_more_is_not_computed() -> None:
    model, params = make(), PARAMS["mixed"]
    cache, ids, seen = prefill(model, PADDINGS)
    decoder = decoder_of(model, cache, ids, [SamplingParams(), *params[:2]], seen)
    assert decoder.sampler.features == SamplingFeatures(draw=True, cut=True, penalty=True)
    decoder.keep([0, 2])
    assert decoder.sampler.features == SamplingFeatures(penalty=True)
    decoder.keep([0])
    assert decoder.sampler.features == SamplingFeatures()


def test_a_pipeline_frees_places_when_they_are_needed_or_half_are_free() -> None:
    model = make()
    cache, ids, _ = prefill(model, [*PADDINGS, 2])
    more = [cache.select([i]) for i in range(2)]
    pipeline = PipelinedDecoder[str](Decoder(model, 4))
    pipeline.add(list("abcd"), [20] * 4, cache, ids, [SamplingParams()] * 4, [torch.Generator()] * 4)
    pipeline.next()
    assert len(pipeline.decoder.pending) == 1  # one step ahead
    pipeline.remove(["b"])
    assert pipeline.decoder.rows == 4 and len(pipeline.decoder.pending) == 1  # nothing waits for the device
    pipeline.add(["e"], [20], more[0], ids[:1], [SamplingParams()], [torch.Generator()])
    assert pipeline.keys == list("acde") and pipeline.decoder.rows == 4
    keys, output = pipeline.next()  # was computed before the new row joined
    assert keys == list("abcd") and len(output.tokens) == 4
    pipeline.remove(["a"])
    pipeline.remove(["e"])
    assert pipeline.keys == list("cd") and pipeline.decoder.rows == 2
    pipeline.remove(["c", "d"])
    pipeline.add(["f"], [20], more[1], ids[1:2], [SamplingParams()], [torch.Generator()])
    while (keys := pipeline.next()[0]) != ["f"]:
        assert "f" not in keys


def test_a_row_without_steps_left_may_be_full_before_it_is_removed() -> None:
    model = make()
    pipeline = PipelinedDecoder[str](Decoder(model, 2))
    for key, steps_left, capacity in (("a", 3, 15), ("b", 9, 40)):
        cache, ids, _ = prefill(model, [0], capacity)
        pipeline.add([key], [steps_left], cache, ids, [SamplingParams()], [torch.Generator()])
    tokens = [pipeline.next()[1].tokens[1] for _ in range(9)]
    _, (_, alone) = rows_of_limits(model, [15, 40])
    assert tokens == [row[0] for row in steps(alone, 9)]


class Doubled(torch.nn.Linear):
    """A linear layer of a kind of its own, as quantized layers are."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def change_of(model: StripedHyena, kind: str) -> None:
    mlp, norm = model.layers[1].mlp, model.layers[1].mlp_norm
    assert isinstance(mlp.up_proj, torch.nn.Linear)
    if kind == "a subclass of Linear":
        up = Doubled(32, 48, bias=False, dtype=torch.float64)
        up.weight = mlp.up_proj.weight
        mlp.up_proj = up
    elif kind == "a hook on a norm":
        norm.register_forward_hook(lambda module, x, y: 2 * y)  # type: ignore[union-attr]
    elif kind == "a hook before a norm":
        norm.register_forward_pre_hook(lambda module, x: (x[0] + 1, *x[1:]))  # type: ignore[union-attr]
    elif kind == "a hook before a linear layer":
        mlp.up_proj.register_forward_pre_hook(lambda module, x: (2 * x[0],))
    elif kind == "a hook before the embedding":
        model.embed_tokens.register_forward_pre_hook(lambda module, x: ((x[0] + 1) % 50,))


@pytest.mark.parametrize(
    "kind",
    [
        "a subclass of Linear",
        "a hook on a norm",
        "a hook before a norm",
        "a hook before a linear layer",
        "a hook before the embedding",
    ],
)
def test_a_step_calls_what_is_not_plain(kind: str) -> None:
    plain, model = make(), make()
    change_of(model, kind)
    logprobs = []
    for each in (plain, model):
        cache, ids, _ = prefill(model, PADDINGS)
        other, _, _ = prefill(model, PADDINGS)
        with torch.inference_mode():
            expected = each(ids[:, None], cache=_owned(each, other))[:, -1].log_softmax(-1).amax(-1)
        decoder = decoder_of(each, _owned(each, cache), ids, [SamplingParams()] * 3)
        decoder.launch()
        logprobs.append(decoder.fetch().logprobs)
        assert logprobs[-1] == pytest.approx(expected.tolist(), abs=1e-9)
    assert logprobs[0] != pytest.approx(logprobs[1], abs=1e-3)  # the change is one


def _owned(model: StripedHyena, cache: Cache) -> Cache:
    return Cache(cache.states, cache.lengths, cache.limits, owner=model)


def test_outputs_keep_the_names_of_their_own_step() -> None:
    model = make()
    pipeline = PipelinedDecoder[str](Decoder(model, 4))
    cache, ids, _ = prefill(model, PADDINGS)
    pipeline.add(["a", "b"], [9, 9], cache.select([0, 1]), ids[:2], [SamplingParams()] * 2, [torch.Generator()] * 2)
    pipeline.next()
    pipeline.add(["c"], [9], cache.select([2]), ids[2:], [SamplingParams()], [torch.Generator()])
    assert [pipeline.next()[0] for _ in range(2)] == [["a", "b"], ["a", "b", "c"]]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_eager_rows_have_params_numbers_and_seen_tokens_of_their_own(order: list[int]) -> None:
    """Rows that need seen tokens join others that do not, and the reverse; the first row leaves before the others."""
    model = make()
    cache, ids, _ = prefill(model, PADDINGS)
    params = [SamplingParams(), SamplingParams(repetition_penalty=9.0), SamplingParams(temperature=1.0, seed=8)]

    def row(i: int) -> tuple[Any, ...]:
        return cache.select([i]), ids[i : i + 1], [params[i]], [params[i].generator()]

    def seen_of(i: int) -> Tensor | None:
        return torch.arange(50)[None] % 5 > 0 if params[i].repetition_penalty != 1 else None

    expected = {}
    for i in order:
        alone, token, own, generator = *row(i)[:3], params[i].generator()
        used, expected[i] = torch.zeros(1, 50, dtype=torch.bool), []
        used = used if (given := seen_of(i)) is None else given
        for _ in range(14):
            with torch.inference_mode():
                token = sample(model(token[:, None], cache=alone)[:, -1], own, [generator], seen=used)
            used[0, token] = True
            expected[i].append(int(token))
    together, got = EagerDecoder[int](model), {i: list[int]() for i in order}
    for step in range(14):
        if step < 3:
            together.add([order[step]], [20], *row(order[step]), seen=seen_of(order[step]))
        if step == 7:
            together.remove([order[0]])
        keys, output = together.next()
        for key, token in zip(keys, output.tokens, strict=True):
            got[key].append(token)
    assert all(tokens == expected[i][: len(tokens)] for i, tokens in got.items())
    assert [len(got[i]) for i in order] == [7, 13, 12]
