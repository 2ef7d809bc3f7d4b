"""Snapshots: states inside a pass equal those of a pass that ends there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from configs import TINY, TINY_EVO, TINY_EVO2
from hyaena.cache import Cache
from hyaena.config import ModelConfig
from hyaena.errors import InputError
from hyaena.model import StripedHyena
from hyaena.packing import Snapshots

MULTI = replace(
    TINY,
    layer_types=("hyena_se", "hyena_mr", "attention", "hyena_li", "hyena"),
    se_filter_groups=4,
    mr_filter_groups=4,
)


@pytest.mark.parametrize("config", [TINY, TINY_EVO, TINY_EVO2, MULTI], ids=["sh", "evo", "evo2", "multi"])
@pytest.mark.parametrize("past", [0, 5])
def test_a_snapshot_is_the_cache_of_a_shorter_pass(config: ModelConfig, past: int) -> None:
    model = StripedHyena(config)
    ids = torch.randint(config.vocab_size, (2, past + 90))
    stops = [1, 2, 64, 90]
    with torch.inference_mode():
        cache = model.make_cache(2, max_length=200)
        if past:
            model(ids[:, :past], cache=cache)
        snapshots = Snapshots({0: stops, 1: stops})
        logits = model(ids[:, past:], cache=cache, snapshots=snapshots)
        whole = model(ids)
        torch.testing.assert_close(logits, whole[:, past:], atol=1e-5, rtol=1e-4)
        for stop in stops:
            shorter = model.make_cache(2, max_length=200)
            model(ids[:, : past + stop], cache=shorter)
            for row in range(2):
                saved = snapshots.states(row, stop)
                assert list(saved) == [i for i, kind in enumerate(config.layer_types) if kind != "attention"]
                for layer, state in saved.items():
                    want = shorter.states[layer].select([row])
                    for mine, theirs in zip(state.tensors(), want.tensors(), strict=True):
                        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_rows_of_a_padded_pass_stop_after_their_own_tokens() -> None:
    model = StripedHyena(TINY)
    ids = torch.randint(TINY.vocab_size, (2, 20))
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :7] = False
    with torch.inference_mode():
        snapshots = Snapshots({1: [4, 8]})
        model(ids, cache=model.make_cache(2), mask=mask, snapshots=snapshots)
        assert not snapshots.states(0, 4)
        for count in (4, 8):
            alone = model.make_cache(1)
            model(ids[1:, 7 : 7 + count], cache=alone)
            for layer, state in snapshots.states(1, count).items():
                for mine, theirs in zip(state.tensors(), alone.states[layer].tensors(), strict=True):
                    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_a_snapshot_and_the_first_keys_and_values_are_a_cache() -> None:
    """What a prefix cache does: continue from the states at a place, with the keys and values before it."""
    model = StripedHyena(TINY)
    ids = torch.randint(TINY.vocab_size, (1, 30))
    with torch.inference_mode():
        cache = model.make_cache(1, max_length=40)
        snapshots = Snapshots({0: [10]})
        model(ids, cache=cache, snapshots=snapshots)
        saved = snapshots.states(0, 10)
        states = [saved.get(i, state) for i, state in enumerate(cache.snapshot().states)]
        again = Cache(states, [10], [40], owner=model)
        other = torch.randint(TINY.vocab_size, (1, 12))
        torch.testing.assert_close(
            model(other, cache=again), model(torch.cat([ids[:, :10], other], dim=1))[:, 10:], atol=1e-5, rtol=1e-4
        )


def test_rows_of_a_packed_pass_stop_after_their_own_tokens() -> None:
    model = StripedHyena(MULTI)
    counts, stops = [9, 70, 5, 12], {0: [3, 9], 1: [64], 2: [2], 3: [1, 12]}
    ids = torch.randint(MULTI.vocab_size, (1, sum(counts)))
    past = torch.randint(MULTI.vocab_size, (1, 6))
    with torch.inference_mode():
        cache = model.make_cache(1, max_length=100)
        model(past, cache=cache)  # the first row has a past
        cache.extend([model.make_cache(3, max_length=100)])
        snapshots = Snapshots(stops)
        model(ids, cache=cache, counts=counts, snapshots=snapshots)
        rows = ids[0].split(counts)
        for row, numbers in stops.items():
            for stop in numbers:
                alone = model.make_cache(1, max_length=100)
                model(torch.cat([past[0] if row == 0 else past[0, :0], rows[row][:stop]])[None], cache=alone)
                saved = snapshots.states(row, stop)
                assert len(saved) == 4
                for layer, state in saved.items():
                    for mine, theirs in zip(state.tensors(), alone.states[layer].tensors(), strict=True):
                        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stops", [[0], [11]])
def test_stops_that_do_not_fit(stops: list[int]) -> None:
    model = StripedHyena(TINY)
    with pytest.raises(InputError, match="snapshot"):
        model(torch.zeros(1, 10, dtype=torch.long), cache=model.make_cache(1), snapshots=Snapshots({0: stops}))
