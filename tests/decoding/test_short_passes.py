"""A pass of fixed size over padded tables reads what the plain pass reads: on a GPU captured, else interpreted."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from configs import TINY, TINY_EVO
from device import DEVICE
from hyaena.cache import Cache
from hyaena.decoding import ShortPasses
from hyaena.decoding.short_passes import MOST_PAST, ROWS, STOPS, TOKENS
from hyaena.errors import CapacityError
from hyaena.model import StripedHyena
from hyaena.ops import PAGE, HyenaState
from hyaena.packing import Snapshots

CUDA = DEVICE == "cuda"
# float32: another order of sums; the pages of a row hold keys of the same rounding
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


def make(config: Any = TINY) -> StripedHyena:
    torch.manual_seed(1)
    return StripedHyena(config).to(DEVICE)


def prompts(counts: list[int]) -> list[list[int]]:
    return [torch.randint(50, (n,)).tolist() for n in counts]


def pools(model: StripedHyena, rows: int) -> list[Cache]:
    """Two equal caches on pools of their own, whose slots all hold NaN; rows have pages in mixed order."""
    found = []
    for _ in range(2):
        pool = model.make_page_pool(4 * rows)
        for layer in pool.layers:
            for stored in layer:
                stored.fill_(torch.nan)
        pages = [[row, 3 * rows + row, rows + row, 2 * rows + row] for row in range(rows)]
        found.append(model.make_paged_cache(pool, pages, max_length=4 * PAGE))
    return found


@torch.inference_mode()
def read(model: StripedHyena, cache: Cache, ids: list[list[int]], **options: Any) -> Tensor:
    packed = torch.tensor([[token for row in ids for token in row]], device=DEVICE)
    return model(packed, cache=cache, counts=[len(row) for row in ids], logits_to_keep=1, **options)[:, -1]


def compare(model: StripedHyena, cache: Cache, other: Cache) -> None:
    """Both hold the same: lengths, states, keys and values of every token, and nothing elsewhere but on scratch."""
    assert cache.lengths == other.lengths
    assert cache.pool is not None and other.pool is not None
    for one, two in zip(cache.states, other.states, strict=True):
        for a, b in zip(one.tensors(), two.tensors(), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
    for one, two in zip(cache.pool.layers, other.pool.layers, strict=True):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a[:, :-1], b[:, :-1], equal_nan=True, **CLOSE)


@pytest.mark.parametrize("config", [TINY, TINY_EVO], ids=["sh", "evo"])
@pytest.mark.parametrize(
    ("past", "counts"),
    [([0], [1]), ([0], [17]), ([63, 0, 70, 1], [3, 16, 9, 2])],
    ids=str,
)
def test_padded_passes_are_the_plain_pass(config: Any, past: list[int], counts: list[int]) -> None:
    """Logits of the last tokens, the choice, all that is remembered, and what is read after it."""
    model = make(config)
    cache, other = pools(model, len(counts))
    passes = ShortPasses(model, cache.pool, cuda_graph=CUDA)
    assert ShortPasses.unsupported_reason(model) is None
    if any(past):
        before = prompts([max(1, n) for n in past])
        cache, other = pools_with_past(model, past, before)
        passes = ShortPasses(model, cache.pool, cuda_graph=CUDA)
    for ids in (prompts(counts), prompts([1] * len(counts))):
        assert passes.takes(cache, [len(row) for row in ids])
        want = read(model, other, ids)
        got = passes.read(ids, cache)
        torch.testing.assert_close(got.logits, want, **CLOSE)
        assert got.ids.tolist() == want.argmax(-1).tolist() == [int(row[0]) for row in got.packed.tolist()]
        compare(model, cache, other)


def pools_with_past(model: StripedHyena, past: list[int], before: list[list[int]]) -> list[Cache]:
    """Caches whose rows have read different numbers of tokens; rows with none begin."""
    found = []
    rows = len(past)
    for _ in range(2):
        pool = model.make_page_pool(4 * rows)
        for layer in pool.layers:
            for stored in layer:
                stored.fill_(torch.nan)
        parts = []
        for row, n in enumerate(past):
            pages = [row, 3 * rows + row, rows + row, 2 * rows + row]
            parts.append(model.make_paged_cache(pool, [pages], max_length=4 * PAGE))
            if n:
                read(model, parts[-1], [before[row][:n]])
        parts[0].extend(parts[1:])
        found.append(parts[0])
    return found


def test_states_are_copied_inside_a_pass() -> None:
    """In the middle and at the end of rows."""
    model, stops = make(), {0: [10, 18], 2: [1, 7]}
    cache, other = pools(model, 3)
    ids = prompts([18, 3, 9])
    got, want = Snapshots(stops), Snapshots(stops)
    passes = ShortPasses(model, cache.pool, cuda_graph=CUDA)
    assert passes.takes(cache, [18, 3, 9], got)
    torch.testing.assert_close(passes.read(ids, cache, got).logits, read(model, other, ids, snapshots=want), **CLOSE)
    compare(model, cache, other)
    for row, places in stops.items():
        for stop in places:
            one, two = got.states(row, stop), want.states(row, stop)
            assert one.keys() == two.keys() and len(one) == sum(isinstance(s, HyenaState) for s in cache.states)
            for layer, state in one.items():
                for a, b in zip(state.tensors(), two[layer].tensors(), strict=True):
                    torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("prepared", [True, False])
def test_new_rows_begin_empty_behind_others(prepared: bool) -> None:
    model = make()
    cache, other = pools(model, 2)
    assert cache.pool is not None
    passes = ShortPasses(model, cache.pool, cuda_graph=CUDA)
    passes.read(prompts([3, 8]), model.make_paged_cache(cache.pool, cache.pages, max_length=4 * PAGE))
    if prepared:
        passes.prepare()
    ids = prompts([3, 8])  # in the same slots
    torch.testing.assert_close(passes.read(ids, cache).logits, read(model, other, ids), **CLOSE)
    compare(model, cache, other)


def test_what_does_not_fit() -> None:
    model = make()
    cache, _ = pools(model, 2)
    passes = ShortPasses(model, cache.pool, cuda_graph=False)
    assert passes.takes(cache, [1, TOKENS[-1] - 1])
    assert not passes.takes(cache, [1, TOKENS[-1]])
    assert not passes.takes(cache, [1] * (ROWS[-1] + 1))
    assert not passes.takes(cache, [1, 1], Snapshots({0: list(range(1, STOPS[-1] + 2))}))
    cache.lengths[0] = MOST_PAST + 1
    assert not passes.takes(cache, [1, 1])


def test_a_pass_that_does_not_fit_leaves_the_cache_as_it_was() -> None:
    model = make()
    cache, other = pools(model, 1)
    passes = ShortPasses(model, cache.pool, cuda_graph=False)
    with pytest.raises(CapacityError, match="at most 256"):
        passes.read(prompts([4 * PAGE + 1]), cache)
    compare(model, cache, other)


def test_what_cannot_be_captured_has_a_reason() -> None:
    kinds = dataclasses.replace(TINY, layer_types=("hyena_se", "attention"), se_filter_length=4)
    assert "layer 0" in str(ShortPasses.unsupported_reason(make(kinds)))
    assert "float64" in str(ShortPasses.unsupported_reason(make().double()))


def test_passes_write_and_read_slots_of_int8() -> None:
    """A number near the middle between two of 8 bits may go to either: no closer than a step of them."""
    model = make()
    model.cache_dtype = "int8"
    pages = [[0, 3], [2, 1]]
    cache, other = (model.make_paged_cache(model.make_page_pool(4), pages, max_length=2 * PAGE) for _ in range(2))
    passes = ShortPasses(model, cache.pool, cuda_graph=CUDA)
    for counts in ([70, 5], [3, 17], [1, 1]):
        ids = prompts(counts)
        torch.testing.assert_close(passes.read(ids, cache).logits, read(model, other, ids), atol=1e-2, rtol=1e-2)
    assert cache.pool is not None and other.pool is not None
    for one, two in zip(cache.pool.layers[0], other.pool.layers[0], strict=True):
        apart = (one[:, :-1].int() - two[:, :-1].int())[..., : model.config.head_dim].abs()
        assert int(apart.max()) <= 1 and float(apart.float().mean()) < 1e-3
