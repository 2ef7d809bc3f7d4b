"""Caches on pages hold what ordinary caches hold, and snapshots of states go with shared pages."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs import TINY, TINY_EVO, TINY_EVO2
from hyaena.cache import Cache
from hyaena.config import ModelConfig
from hyaena.decoding import Decoder
from hyaena.errors import CapacityError, InputError
from hyaena.layers import MIXERS, Attention
from hyaena.model import StripedHyena
from hyaena.ops import PAGE, PagedKVState, PagePool, PageTable, pages_for
from hyaena.sampling import SamplingParams
from hyaena.sizes import ModelSizes


@pytest.fixture(scope="module", params=[TINY, TINY_EVO, TINY_EVO2], ids=["sh", "evo", "evo2"])
def model(request: pytest.FixtureRequest) -> StripedHyena:
    torch.manual_seed(1)
    return StripedHyena(request.param)


def tokens(rows: int, count: int) -> Tensor:
    return torch.randint(50, (rows, count))


def poisoned_pool(model: StripedHyena, pages: int) -> PagePool:
    """A pool whose pages hold NaN, as far as nothing was written to them."""
    pool = model.make_page_pool(pages)
    for layer in pool.layers:
        for stored in layer:
            stored.fill_(torch.nan)
    return pool


def hand_out(pool: PagePool, counts: list[int], seed: int = 0) -> list[list[int]]:
    """Pages for rows, in random order."""
    numbers = random.Random(seed).sample(range(pool.pages), sum(counts))
    return [[numbers.pop() for _ in range(count)] for count in counts]


def apart(model: StripedHyena, rows: int) -> Cache:
    """An ordinary cache whose rows have storage of their own."""
    return Cache.merge([model.make_cache() for _ in range(rows)])


@torch.inference_mode()
def read(model: StripedHyena, cache: Cache, ids: Tensor, **options: Any) -> Tensor:
    return model(ids, cache=cache, **options)


@pytest.mark.parametrize("splits", [[70, 1, 1, 60], [64, 64, 3], [5, 130, 1], [63, 1, 1]])
def test_rows_on_pages_say_what_ordinary_rows_say(model: StripedHyena, splits: list[int]) -> None:
    """Bit for bit, chunk by chunk, on pages in random order whose other slots hold NaN."""
    pool = poisoned_pool(model, 12)
    count = pages_for(sum(splits))
    paged, plain = model.make_paged_cache(pool, hand_out(pool, [count] * 3)), apart(model, 3)
    for split in splits:
        ids = tokens(3, split)
        assert torch.equal(read(model, paged, ids), read(model, plain, ids))
    assert paged.lengths == plain.lengths


def test_pages_that_follow_one_another_are_read_where_they_lie(model: StripedHyena) -> None:
    pool = poisoned_pool(model, 8)
    cache, plain = model.make_paged_cache(pool, [[3, 4, 5], [2, 1, 0]]), apart(model, 2)
    for split in (70, 20, 1):
        ids = tokens(2, split)
        assert torch.equal(read(model, cache, ids), read(model, plain, ids))
    rows = PagedKVState(*pool.layers[0]).through(PageTable.of(cache.pages, pool.device))
    one, other = rows.row(0, 91), rows.row(1, 91)
    assert one.keys.data_ptr() == pool.layers[0][0][:, 3].data_ptr() and one.keys.shape[2] == 91
    assert other.keys.untyped_storage().data_ptr() != pool.layers[0][0].untyped_storage().data_ptr()


def test_padded_rows_and_rows_of_different_lengths(model: StripedHyena) -> None:
    pool = poisoned_pool(model, 12)
    mask = torch.arange(70) >= torch.tensor([0, 5, 69])[:, None]
    paged, plain = model.make_paged_cache(pool, hand_out(pool, [3, 2, 2])), apart(model, 3)
    ids = tokens(3, 70)
    assert torch.equal(read(model, paged, ids, mask=mask), read(model, plain, ids, mask=mask))
    for split in (1, 20, 1):
        ids = tokens(3, split)
        assert torch.equal(read(model, paged, ids), read(model, plain, ids))
    assert paged.lengths == [92, 87, 23]


def test_rows_join_and_leave(model: StripedHyena) -> None:
    pool = poisoned_pool(model, 12)
    pages = hand_out(pool, [2, 2, 2])
    paged = [model.make_paged_cache(pool, [row], max_length=100) for row in pages]
    plain = [model.make_cache(1, max_length=100) for _ in pages]
    for i, count in enumerate((5, 80, 64)):
        ids = tokens(1, count)
        read(model, paged[i], ids), read(model, plain[i], ids)
    paged[0].extend(paged[1:])
    plain[0].extend(plain[1:])
    assert paged[0].pages == pages and paged[1].pages == []
    ids = tokens(3, 2)
    assert torch.equal(read(model, paged[0], ids), read(model, plain[0], ids))
    paged[0].keep([0, 2])
    plain[0].keep([0, 2])
    assert paged[0].pages == [pages[0], pages[2]] and paged[0].limits == [100, 100]
    ids = tokens(2, 7)
    assert torch.equal(read(model, paged[0], ids), read(model, plain[0], ids))
    paged[0].reset()
    plain[0].reset()
    ids = tokens(2, 70)
    assert torch.equal(read(model, paged[0], ids), read(model, plain[0], ids))


def test_gradients_reach_the_new_tokens(model: StripedHyena) -> None:
    pool = poisoned_pool(model, 2)
    grads = []
    first, second = tokens(1, 60), tokens(1, 10)
    for cache in (model.make_paged_cache(pool, [[1, 0]]), model.make_cache(1)):
        read(model, cache, first)
        model.zero_grad()
        model(second, cache=cache).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_row_goes_on_from_shared_pages_and_a_snapshot(model: StripedHyena) -> None:
    """read a, snapshot, read b  ==  a new row on the pages of a, restored, that reads b: bit for bit."""
    pool = poisoned_pool(model, 9)
    first, second, other = tokens(1, 2 * PAGE), tokens(1, 75), tokens(1, 75)
    cache = model.make_paged_cache(pool, [[7, 2, 5, 0]])
    read(model, cache, first)
    snapshot = cache.snapshot_states(0)
    want = read(model, cache, second)
    shared = model.make_paged_cache(pool, [[7, 2, 3, 8], [7, 2, 4, 1]], max_length=300)
    for row in range(2):
        shared.restore_states(row, snapshot)
    assert shared.lengths == [128, 128]
    got = read(model, shared, torch.cat([second, other]))
    plain = model.make_cache()
    read(model, plain, first)
    plain = Cache.merge([plain, plain])
    assert torch.equal(got, read(model, plain, torch.cat([second, other])))
    again = model.make_paged_cache(pool, [[7, 2, 3, 8]])  # the snapshot was not changed
    again.restore_states(0, snapshot)
    assert torch.equal(read(model, again, second), want)


def test_a_page_that_is_not_full_is_copied(model: StripedHyena) -> None:
    pool = poisoned_pool(model, 4)
    first, second = tokens(1, PAGE + 10), tokens(1, 20)
    cache = model.make_paged_cache(pool, [[3, 1]])
    read(model, cache, first)
    snapshot = cache.snapshot_states(0)
    pool.copy(1, 2)
    want = read(model, cache, second)
    branch = model.make_paged_cache(pool, [[3, 2]])
    branch.restore_states(0, snapshot)
    assert torch.equal(read(model, branch, second), want)


def test_a_row_returns_to_a_mark(model: StripedHyena) -> None:
    cache = model.make_paged_cache(poisoned_pool(model, 3), [[2, 0, 1]])
    read(model, cache, tokens(1, 70))
    mark, again = cache.mark(), tokens(1, 5)
    want = read(model, cache, again)
    read(model, cache, tokens(1, 80))
    cache.rewind(mark)
    assert cache.lengths == [70] and torch.equal(read(model, cache, again), want)


class Wrapped(nn.Module):
    """An attention that names no sizes of keys and values: it keeps storage of its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.inner = Attention(config)
        self.make_state, self.step = self.inner.make_state, self.inner.step

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


def test_mixers_without_pages_keep_their_state() -> None:
    config = dataclasses.replace(TINY, layer_types=("attention", "own", "hyena"))
    model = StripedHyena(config, mixers={**MIXERS, "own": Wrapped})
    cache = model.make_paged_cache(poisoned_pool(model, 4), [[2, 0, 3]], max_length=150)
    assert [type(state).__name__ for state in cache.states] == ["PagedKVState", "KVState", "HyenaState"]
    plain, greedy = model.make_cache(max_length=150), SamplingParams()
    ids = tokens(1, 70)
    assert torch.equal(read(model, cache, ids), read(model, plain, ids))
    outputs = []
    for one in (cache, plain):
        decoder = Decoder(model, 1)
        decoder.add(one, torch.tensor([1]), [greedy], [greedy.generator()])
        for _ in range(70):
            decoder.launch()
        outputs.append([decoder.fetch() for _ in range(70)])
    assert outputs[0] == outputs[1]


def test_sizes_are_those_that_were_allocated(model: StripedHyena) -> None:
    sizes = ModelSizes(model.config)
    pool = model.make_page_pool(5)
    assert pool.page_bytes == sizes.page_bytes(PAGE, 4)
    assert pool.nbytes == 6 * pool.page_bytes
    cache = model.make_paged_cache(pool, [[0, 1], [0, 2]])
    assert cache.snapshot_states(1).nbytes == sizes.state_bytes(4)
    assert cache.nbytes == 3 * pool.page_bytes + 2 * sizes.state_bytes(4)  # the shared page once
    assert cache.device == pool.device


def test_a_row_needs_pages_for_what_it_reads(model: StripedHyena) -> None:
    pool = poisoned_pool(model, 4)
    cache = model.make_paged_cache(pool, [[3]])
    read(model, cache, tokens(1, 60))
    with pytest.raises(CapacityError, match=r"row 0 has 1 pages of 64 tokens and needs room for 65 tokens: give it 2"):
        read(model, cache, tokens(1, 5))
    with pytest.raises(CapacityError, match="row 0 has 0 pages"):
        cache.set_pages(0, [])
    assert cache.lengths == [60] and cache.pages == [[3]]
    cache.set_pages(0, [3, 1])
    read(model, cache, tokens(1, 5))
    assert cache.lengths == [65]


def test_copies_of_an_empty_row_are_as_good_as_new_ones(model: StripedHyena) -> None:
    pool = poisoned_pool(model, 8)
    empty = model.make_paged_cache(pool, [[]], max_length=200)
    ids = tokens(1, 100)
    copies = [empty.with_pages([pages]) for pages in ([5, 2], [7, 0])]
    want = read(model, model.make_paged_cache(pool, [[1, 3]], max_length=200), ids)
    for cache in copies:
        assert torch.equal(read(model, cache, ids), want)
        assert cache.limits == [200]
    both = empty.with_pages([[5, 2], [7, 0]])
    assert both.limits == [200, 200] and both.pages == [[5, 2], [7, 0]]
    torch.testing.assert_close(read(model, both, ids.expand(2, -1)), want.expand(2, -1, -1))
    assert empty.lengths == [0] and not any(t.any() for t in empty.tensors())
    with pytest.raises(InputError, match="one empty row"):
        copies[0].with_pages([[4]])
    with pytest.raises(InputError, match="a number from 0 to 7"):
        empty.with_pages([[8]])
    for wrong in ([], [5, 2]):
        with pytest.raises(InputError, match="a list of page numbers for each row"):
            empty.with_pages(wrong)
    with pytest.raises(InputError, match="make_paged_cache"):
        model.make_cache(1).with_pages([[0]])


def test_bad_inputs_of_paged_caches(model: StripedHyena) -> None:
    pool, other = model.make_page_pool(4), model.make_page_pool(4)
    cache = model.make_paged_cache(pool, [[0], [1]])
    for bad, message in (
        (lambda: model.make_page_pool(0), "1 or more"),
        (lambda: model.make_paged_cache(pool, []), "at least one row"),
        (lambda: model.make_paged_cache(pool, [[4]]), "a number from 0 to 3"),
        (lambda: model.make_paged_cache(pool, [[-1]]), "a number from 0 to 3"),
        (lambda: model.make_paged_cache(pool, [[1, 1]]), "one page twice"),
        (lambda: model.make_paged_cache(None, [[1]]), "the pool is None"),  # type: ignore[arg-type]
        (lambda: model.make_paged_cache(pool, [[1]], max_length=0), "at least 1"),
        (lambda: cache.set_pages(2, [1]), "numbers of rows"),
        (lambda: cache.set_pages(0, [9]), "a number from 0 to 3"),
        (lambda: cache.select([0]), "has none to copy its rows to"),
        (lambda: cache.snapshot(), "has none to copy its rows to"),
        (lambda: Cache.merge([cache]), "has none to copy its rows to"),
        (lambda: copy.deepcopy(cache), "has none to copy its rows to"),
        (lambda: pickle.dumps(cache), "has none to copy its rows to"),
        (lambda: cache.extend([model.make_cache()]), "different pools"),
        (lambda: model.make_cache().extend([cache]), "different pools"),
        (lambda: cache.extend([model.make_paged_cache(other, [[0]])]), "different pools"),
        (lambda: model.make_cache().snapshot_states(0), "takes a cache on pages"),
        (lambda: model.make_cache().set_pages(0, [1]), "takes a cache on pages"),
    ):
        with pytest.raises(InputError, match=message):
            bad()
    assert cache.pages == [[0], [1]] and cache.batch_size == 2


def test_snapshots_and_pools_of_other_models_are_refused() -> None:
    one, two = StripedHyena(TINY), StripedHyena(TINY)
    cache, other = (m.make_paged_cache(m.make_page_pool(2), [[0]]) for m in (one, two))
    with pytest.raises(InputError, match="another model"):
        cache.restore_states(0, other.snapshot_states(0))
    with pytest.raises(InputError, match="made for another model"):
        StripedHyena(TINY_EVO).make_paged_cache(one.make_page_pool(1), [[0]])
    read(one, cache, tokens(1, 60))
    snapshot = cache.snapshot_states(0)
    with pytest.raises(CapacityError, match="row 0 has 0 pages"):
        one.make_paged_cache(one.make_page_pool(2), [[]]).restore_states(0, snapshot)
