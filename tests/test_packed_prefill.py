"""Several rows in one pass without padding: each reads what it would read alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from configs import TINY, TINY_EVO, TINY_EVO2
from device import DEVICE
from hyaena import ops
from hyaena.cache import Cache
from hyaena.errors import CapacityError, InputError, UnsupportedError
from hyaena.layers import MIXERS, Attention
from hyaena.model import StripedHyena
from hyaena.ops import pages_for
from hyaena.packing import Snapshots

KINDS = dataclasses.replace(
    TINY, layer_types=("hyena_se", "attention", "hyena_mr", "hyena_li"), se_filter_length=4, mr_filter_length=9
)
COUNTS = [5, 1, 70, 8, 2, 64, 6]


def make(config: Any = TINY) -> StripedHyena:
    torch.manual_seed(1)
    return StripedHyena(config).double()


def prompts(counts: list[int]) -> list[Tensor]:
    return [torch.randint(50, (1, n)) for n in counts]


@torch.inference_mode()
def read(model: StripedHyena, cache: Cache, ids: Tensor, **options: Any) -> Tensor:
    return model(ids, cache=cache, **options)


def caches(model: StripedHyena, rows: int, paged: bool) -> list[Cache]:
    if not paged:
        return [model.make_cache() for _ in range(rows)]
    pool = model.make_page_pool(3 * rows)
    for layer in pool.layers:
        for stored in layer:
            stored.fill_(torch.nan)
    return [model.make_paged_cache(pool, [[row, rows + row, 2 * rows + row]]) for row in range(rows)]


def together(parts: list[Cache]) -> Cache:
    parts[0].extend(parts[1:])
    return parts[0]


@pytest.mark.parametrize("paged", [True, False], ids=["pages", "rows"])
@pytest.mark.parametrize("config", [TINY, TINY_EVO, TINY_EVO2, KINDS], ids=["sh", "evo", "evo2", "kinds"])
@pytest.mark.parametrize("past", [[0] * 7, [0, 3, 0, 64, 100, 0, 1]], ids=["first", "some have a past"])
def test_packed_rows_are_the_rows_alone(config: Any, past: list[int], paged: bool) -> None:
    """Logits of every token, and all that is remembered."""
    model = make(config)
    before, now, later = prompts([max(n, 1) for n in past]), prompts(COUNTS), torch.randint(50, (7, 3))
    alone = caches(model, 7, paged)
    packed = caches(model, 7, paged)
    want = []
    for row, n in enumerate(past):
        if n:
            read(model, alone[row], before[row])
            read(model, packed[row], before[row])
        want.append(read(model, alone[row], now[row]))
    cache = together(packed)
    got = read(model, cache, torch.cat(now, dim=1), counts=COUNTS)
    torch.testing.assert_close(got, torch.cat(want, dim=1))
    assert cache.lengths == [n + m for n, m in zip(past, COUNTS, strict=True)]
    after = [read(model, one, later[row : row + 1]) for row, one in enumerate(alone)]
    torch.testing.assert_close(read(model, cache, later), torch.cat(after))


def test_the_last_logits_of_every_row() -> None:
    model, now = make(), prompts(COUNTS)
    cache, other = together(caches(model, 7, True)), together(caches(model, 7, True))
    all_of_them = read(model, cache, torch.cat(now, dim=1), counts=COUNTS)
    got = read(model, other, torch.cat(now, dim=1), counts=COUNTS, logits_to_keep=1)
    assert got.shape == (7, 1, 50)
    ends = torch.tensor(COUNTS).cumsum(0) - 1
    torch.testing.assert_close(got[:, 0], all_of_them[0, ends])


@pytest.mark.parametrize("past", [False, True])
def test_gradients_of_packed_rows(past: bool) -> None:
    model, now, before = make(), prompts([5, 9]), prompts([4, 3])

    def gradients(packed: bool) -> list[Tensor]:
        parts = caches(model, 2, False)
        for part, ids in zip(parts, before, strict=True):
            if past:
                read(model, part, ids)
        model.zero_grad()
        if packed:
            logits = model(torch.cat(now, dim=1), cache=together(parts), counts=[5, 9])
        else:
            logits = torch.cat([model(ids, cache=part) for ids, part in zip(now, parts, strict=True)], dim=1)
        logits.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want)


def test_one_row_that_is_not_finite_disturbs_no_other() -> None:
    model, now = make(), prompts([5, 7, 6])
    with torch.no_grad():
        model.embed_tokens.weight[49] = torch.nan
    now = [ids.clamp(max=48) for ids in now]
    good = read(model, together(caches(model, 3, True)), torch.cat(now, dim=1), counts=[5, 7, 6])
    now[1][0, 3] = 49
    got = read(model, together(caches(model, 3, True)), torch.cat(now, dim=1), counts=[5, 7, 6])
    assert bool(got[0, 8:12].isnan().all())
    assert torch.equal(got[0, :5], good[0, :5]) and torch.equal(got[0, 12:], good[0, 12:])


def test_rows_with_a_past_of_like_lengths_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """But those whose states are copied on the way: these are cut."""
    model, rows = make(KINDS), []
    for name in ("hyena", "hyena_states"):
        call = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda z, *rest, call=call, **more: (rows.append(len(z)), call(z, *rest, **more))[1]
        )
    for snapshots, want in ((None, [4, 2]), (Snapshots({2: [7], 3: []}), [3, 1, 2])):
        parts = caches(model, 6, False)
        for part, ids in zip(parts, prompts([3, 9, 1, 20, 2, 2]), strict=True):
            read(model, part, ids)
        rows.clear()
        counts = [9, 12, 8, 15, 3, 2]
        read(model, together(parts), torch.cat(prompts(counts), dim=1), counts=counts, snapshots=snapshots)
        assert rows == want * 3  # layers with a state


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ([3, 3], {}, "T in all, and was given ids"),
        ([8], {}, "2 rows of the cache"),
        ([8, 0], {}, "a count must be a whole number of at least 1"),
        ([4, 4], {"mask": torch.ones(1, 8)}, "without mask"),
        ([4, 4], {"logits_to_keep": 2}, "logits_to_keep=1 or None, not 2"),
        ([4, 4], {"cache": None}, "counts go with a cache"),
    ],
)
def test_bad_counts_are_named(counts: list[int], options: dict[str, Any], message: str) -> None:
    model = make()
    cache = model.make_cache(2)
    with pytest.raises(InputError, match=message):
        model(torch.randint(50, (1, 8)), **{"cache": cache, "counts": counts, **options})
    assert cache.lengths == [0, 0]


def test_a_packed_pass_that_does_not_fit_changes_nothing() -> None:
    model = make()
    cache = model.make_paged_cache(model.make_page_pool(3), [[0], [1]])
    with pytest.raises(CapacityError, match=f"row 1 has 1 pages .* give it {pages_for(65)} pages"):
        read(model, cache, torch.randint(50, (1, 67)), counts=[2, 65])
    assert cache.lengths == [0, 0]


def test_a_mixer_that_reads_no_packed_rows_is_named() -> None:
    class Own(Attention):
        packs = False

    model = StripedHyena(TINY, mixers={**MIXERS, "attention": Own})
    with pytest.raises(UnsupportedError, match="the mixer of layer 1, a Own, reads no packed rows"):
        model(torch.randint(50, (1, 8)), cache=model.make_cache(2), counts=[4, 4])


@pytest.mark.parametrize("past", [[0] * 3, [0, 3, 70]], ids=["first", "some have a past"])
def test_packed_rows_in_one_kernel(past: list[int]) -> None:
    """The kernels read packed rows, and copy states on the way, as plain torch does."""
    torch.manual_seed(1)
    model, counts, stops = StripedHyena(TINY).to(DEVICE), [9, 70, 3], {0: [9], 1: [1, 64]}
    before, now = prompts([max(n, 1) for n in past]), prompts(counts)
    found = []
    for backend in ("plain", "triton"):
        parts = caches(model, 3, True)
        for part, ids, n in zip(parts, before, past, strict=True):
            if n:
                read(model, part, ids.to(DEVICE), backend="plain")
        cache, snapshots = together(parts), Snapshots(stops)
        ids = torch.cat(now, dim=1).to(DEVICE)
        logits = read(model, cache, ids, counts=counts, backend=backend, snapshots=snapshots)
        states = [snapshots.states(row, n) for row, numbers in stops.items() for n in numbers]
        found.append([logits, *cache.tensors(), *(t for one in states for s in one.values() for t in s.tensors())])
    assert len(found[0]) == 1 + 4 + 3 * 4
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # float32, another order of sums
