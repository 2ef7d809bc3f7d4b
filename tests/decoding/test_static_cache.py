"""The tables of a static cache, and places without a row: steps over a bucket of places run over them, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from decoding.test_decoder import EVO, PADDINGS, make, prefill
from hyaena.cache import Cache
from hyaena.decoding.static_cache import StaticCache
from hyaena.errors import InputError
from hyaena.model import StripedHyena
from hyaena.ops import KVState, StepContext
from hyaena.ops.step import DecodeOperators

LENGTHS = [12 - padding for padding in PADDINGS]


@torch.inference_mode()
def filled(model: StripedHyena) -> tuple[StaticCache, list[Tensor]]:
    """Three rows in four places, and the storage [3,G,capacity,head_dim] of their keys and values."""
    cache, _, _ = prefill(model, PADDINGS)
    static, stored = StaticCache(model, 4), stored_in(cache)
    static.add(cache)
    return static, stored


def stored_in(cache: Cache) -> list[Tensor]:
    return [t for state in cache.states if isinstance(state, KVState) for t in state.tensors()]


@torch.inference_mode()
def step(static: StaticCache, places: int) -> Tensor:
    """One step over the first places, as a graph of a bucket does it; the logits."""
    context = StepContext(
        DecodeOperators(), static.device_lengths[:places], static.device_limits[:places], static.rotary
    )
    states = [state.first(places) for state in static.states]
    return static.model.step(torch.zeros(places, dtype=torch.int64), states, context)


@pytest.mark.parametrize("rows", [[], [1], [0, 2], [0, 1, 2]])
def test_a_step_over_all_places_is_one_over_the_rows(rows: list[int]) -> None:
    model = make(EVO)
    (static, stored), (other, _) = filled(model), filled(model)
    free = 4 - len(rows)
    for each in (static, other):
        with torch.inference_mode():
            each.keep(rows)
        assert each.lengths == [LENGTHS[row] for row in rows] and each.limits == [40] * len(rows)
        assert each.device_lengths.tolist() == each.lengths + [0] * free
        assert each.device_limits.tolist() == each.limits + [1] * free
    before = [t.clone() for t in stored]
    logits = step(static, 4)
    if rows:
        torch.testing.assert_close(logits[: len(rows)], step(other, len(rows)))
    for now, old in zip(stored, before, strict=True):
        for row in range(3):  # a row that left is another owner's
            assert torch.equal(now[row], old[row]) == (row not in rows)


def test_rows_that_stay_keep_their_own_limits() -> None:
    model = make(EVO)
    static = StaticCache(model, 4)
    with torch.inference_mode():
        for padding, capacity in zip(PADDINGS, (20, 30, 40), strict=True):
            static.add(prefill(model, [padding], capacity)[0])
        static.keep([1, 2])
    assert (static.lengths, static.limits) == (LENGTHS[1:], [30, 40])
    assert static.device_limits.tolist() == [30, 40, 1, 1] and static.device_lengths.tolist() == [*LENGTHS[1:], 0, 0]
    held = static.cache()
    assert (held.lengths, held.limits) == (LENGTHS[1:], [30, 40])
    held.check_owner(model)
    with pytest.raises(InputError, match="another model"):
        held.check_owner(make(EVO))


def test_rows_that_were_refused_are_not_written_to() -> None:
    """Their keys and values had been accepted before a later layer's state was refused."""
    model = make(EVO)
    static, _ = filled(model)
    refused = model.make_cache(1, max_length=20, method="truncated")
    with torch.inference_mode(), pytest.raises(InputError, match="the same method"):
        static.add(refused)
    step(static, 4)
    assert not any(bool(t.any()) for t in stored_in(refused))
    assert static.rows == 3 and refused.batch_size == 1


@pytest.mark.parametrize(("longest", "positions"), [(1, 1), (2, 2), (40, 64), (64, 64), (65, 128)])
def test_the_rotary_table_covers_a_power_of_two(longest: int, positions: int) -> None:
    model = make(EVO)
    static = StaticCache(model, 4)
    with torch.inference_mode():
        static.add(model.make_cache(1, max_length=longest))
        assert static.positions == positions
        table = static.rotary
        static.add(model.make_cache(1, max_length=longest))
        assert static.rotary is table  # captured graphs read it
        static.add(model.make_cache(1, max_length=2 * positions))
        assert static.positions == 2 * positions
        static.add(model.make_cache(1, max_length=1))
        assert static.positions == 2 * positions
