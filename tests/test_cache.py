"""The cache's verbs, each against rows that ran alone."""

import pytest
import torch

from hyaena.cache import Cache, KVCache
from hyaena.config import ModelConfig
from hyaena.errors import CapacityError, InputError
from hyaena.model import StripedHyena

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    layer_types=("hyena", "attention", "hyena"),
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    state_size=2,
)


@pytest.fixture(scope="module")
def model() -> StripedHyena:
    torch.manual_seed(1)
    return StripedHyena(CONFIG).double()


def read(model: StripedHyena, ids: torch.Tensor, **options: object) -> Cache:
    cache = model.make_cache(ids.shape[0], **options)  # type: ignore[arg-type]
    with torch.inference_mode():
        model(ids, cache=cache)
    return cache


def step(model: StripedHyena, cache: Cache, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, cache=cache)


def test_select_and_merge_equal_rows_alone(model: StripedHyena) -> None:
    prompts = [torch.randint(50, (1, n)) for n in (5, 1, 9)]
    batch = Cache.merge([read(model, p) for p in prompts])
    assert batch.length == 9 and batch.padding is not None and batch.padding.tolist() == [4, 8, 0]
    tokens = torch.randint(50, (3, 4))
    alone = [step(model, read(model, p), tokens[i : i + 1]) for i, p in enumerate(prompts)]
    torch.testing.assert_close(step(model, batch, tokens), torch.cat(alone))
    shorter = batch.select([1, 0])
    assert shorter.length == 13 - 4 and shorter.padding is not None and shorter.padding.tolist() == [4, 0]
    more = torch.randint(50, (2, 2))
    expected = step(model, batch, torch.stack([more[1], more[0], more[0]]))[[1, 0]]
    torch.testing.assert_close(step(model, shorter, more), expected)


def test_padding_disappears_with_the_rows_that_needed_it(model: StripedHyena) -> None:
    batch = Cache.merge([read(model, torch.randint(50, (1, n)), max_length=n + 3) for n in (2, 7)])
    assert batch.max_length == 10
    alone = batch.select([0])
    assert alone.padding is None and alone.length == 2 and alone.max_length == 5


def test_snapshot_and_restore(model: StripedHyena) -> None:
    cache = read(model, torch.randint(50, (2, 6)), max_length=20)
    saved = cache.snapshot()
    tokens = torch.randint(50, (2, 3))
    first = step(model, cache, tokens)
    assert saved.length == 6 and cache.length == 9
    for _ in range(2):
        cache.restore(saved)
        torch.testing.assert_close(step(model, cache, tokens), first)


def test_windows_of_truncated_filters_are_batched_like_modes(model: StripedHyena) -> None:
    """A cache made for the method remembers windows; steps go on from them without being told the method."""

    def read_truncated(ids: torch.Tensor) -> Cache:
        cache = model.make_cache(1, method="truncated")
        with torch.inference_mode():
            model(ids, cache=cache, method="truncated")
        return cache

    prompts = [torch.randint(50, (1, n)) for n in (5, 1, 9)]
    batch = Cache.merge([read_truncated(p) for p in prompts])
    tokens = torch.randint(50, (3, 4))
    expected = torch.cat([step(model, read(model, p), tokens[i : i + 1]) for i, p in enumerate(prompts)])
    saved = batch.snapshot()
    torch.testing.assert_close(step(model, batch, tokens), expected, rtol=1e-4, atol=1e-5)  # the windows drop 1e-6
    batch.restore(saved)
    chosen = batch.select([2, 0])
    torch.testing.assert_close(step(model, chosen, tokens[[2, 0]]), expected[[2, 0]], rtol=1e-4, atol=1e-5)
    chosen.reset()
    fresh = step(model, model.make_cache(2), tokens[:2])
    torch.testing.assert_close(step(model, chosen, tokens[:2]), fresh, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="different methods"):
        Cache.merge([saved, read(model, prompts[0])])


def test_reset_forgets(model: StripedHyena) -> None:
    tokens = torch.randint(50, (2, 6))
    cache = read(model, torch.randint(50, (2, 30)))
    size = cache.nbytes
    cache.reset()
    assert cache.length == 0 and cache.nbytes == size
    torch.testing.assert_close(step(model, cache, tokens), step(model, model.make_cache(2), tokens))


def test_storage_grows_without_a_maximum(model: StripedHyena) -> None:
    ids = torch.randint(50, (1, 700))
    cache = model.make_cache(1)
    with torch.inference_mode():
        parts = torch.cat([model(part, cache=cache) for part in ids.split(90, dim=1)], dim=1)
        torch.testing.assert_close(parts, model(ids))
    kv = next(layer for layer in cache.layers if isinstance(layer, KVCache))
    assert 700 <= kv.keys.shape[2] < 1400


def test_a_full_cache_refuses_and_keeps_what_it_has(model: StripedHyena) -> None:
    """The original's cache silently ends at 8192."""
    cache = read(model, torch.randint(50, (1, 6)), max_length=8)
    saved = cache.snapshot()
    with pytest.raises(CapacityError, match="max_length"):
        step(model, cache, torch.randint(50, (1, 3)))
    tokens = torch.randint(50, (1, 2))
    torch.testing.assert_close(step(model, cache, tokens), step(model, saved, tokens))


def test_a_failing_pass_leaves_the_cache_as_it_was(model: StripedHyena) -> None:
    cache = read(model, torch.randint(50, (1, 6)))
    saved = cache.snapshot()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = model.layers[2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        step(model, cache, torch.randint(50, (1, 3)))
    handle.remove()
    tokens = torch.randint(50, (1, 2))
    torch.testing.assert_close(step(model, cache, tokens), step(model, saved, tokens))


def test_bytes() -> None:
    cache = Cache.create(CONFIG, 3, max_length=10, dtype=torch.bfloat16)
    keys = 2 * 3 * 2 * 10 * 4 * 2  # two stores, B, G, slots, head_dim, bytes
    states = 2 * 3 * (3 * 16 * 2 * 2 + 16 * 2 * 8)  # two layers, B, fir in bfloat16, iir in complex64
    assert cache.nbytes == keys + states


def test_bad_inputs(model: StripedHyena) -> None:
    cache = model.make_cache(2)
    for bad in (lambda: cache.select([]), lambda: cache.select([2]), lambda: Cache.merge([])):
        with pytest.raises(InputError):
            bad()
    with pytest.raises(InputError, match="batch_size"):
        model.make_cache(0)
    with pytest.raises(InputError, match="2 rows"):
        step(model, cache, torch.zeros(1, 1, dtype=torch.long))
