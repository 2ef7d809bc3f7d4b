"""The cache's verbs, each against rows that ran alone."""

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch

from configs import TINY_EVO2
from hyaena.cache import Cache
from hyaena.config import ModelConfig
from hyaena.errors import CapacityError, InputError
from hyaena.model import StripedHyena
from hyaena.ops import KVState

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    layer_types=("hyena", "attention", "hyena"),
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    state_size=2,
)


@pytest.fixture(scope="module", params=[CONFIG, TINY_EVO2], ids=["sh", "evo2"])
def model(request: pytest.FixtureRequest) -> StripedHyena:
    torch.manual_seed(1)
    return StripedHyena(request.param).double()


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
    assert batch.lengths == [5, 1, 9] and batch.length == 9
    tokens = torch.randint(50, (3, 4))
    alone = [step(model, read(model, p), tokens[i : i + 1]) for i, p in enumerate(prompts)]
    torch.testing.assert_close(step(model, batch, tokens), torch.cat(alone))
    shorter = batch.select([1, 0])
    assert shorter.lengths == [1 + 4, 5 + 4]
    more = torch.randint(50, (2, 2))
    expected = step(model, batch, torch.stack([more[1], more[0], more[0]]))[[1, 0]]
    torch.testing.assert_close(step(model, shorter, more), expected)


def test_copies_of_one_row_have_the_room_that_was_named(model: StripedHyena) -> None:
    prompt, tokens = torch.randint(50, (1, 5)), torch.randint(50, (3, 4))
    cache = read(model, prompt)
    copies = cache.select([0, 0, 0], max_length=9)
    assert copies.lengths == [5] * 3 and copies.limits == [9] * 3 and copies.states[1].capacities == [9] * 3
    expected = torch.cat([step(model, read(model, prompt), row[None]) for row in tokens])
    torch.testing.assert_close(step(model, copies, tokens), expected)
    assert cache.lengths == [5]
    with pytest.raises(CapacityError, match="holds 5 tokens, more than max_length 4"):
        cache.select([0], max_length=4)


@pytest.mark.parametrize("grow", [True, False])
def test_a_rewound_cache_is_as_if_nothing_had_been_read_since(model: StripedHyena, grow: bool) -> None:
    prompts, tokens = torch.randint(50, (2, 30)), torch.randint(50, (2, 3))
    options = {} if grow else {"max_length": 700}
    cache = read(model, prompts[:, :12], **options)
    first = cache.mark()
    step(model, cache, prompts[:, 12:])
    second = cache.mark()
    assert second.nbytes == first.nbytes < cache.nbytes  # no keys and values
    for _ in range(2):
        step(model, cache, torch.randint(50, (2, 300)))
        cache.rewind(second)
        torch.testing.assert_close(step(model, cache, tokens), step(model, read(model, prompts), tokens))
    for _ in range(2):
        cache.rewind(first)
        torch.testing.assert_close(step(model, cache, tokens), step(model, read(model, prompts[:, :12]), tokens))
    cache.rewind(first)
    with pytest.raises(InputError, match="rewind to an earlier moment of the same rows"):
        cache.rewind(second)
    with pytest.raises(InputError, match="rewind to an earlier"):
        cache.select([0]).rewind(first)
    assert cache.lengths == [12, 12]


def test_rows_keep_their_own_limits_and_memory(model: StripedHyena) -> None:
    """A mixed batch costs the sum of its rows, not its longest times their number."""
    caches = [read(model, torch.randint(50, (1, n)), max_length=n + 3) for n in (2, 700)]
    batch = Cache.merge(caches)
    assert batch.max_length == 703 and batch.limits == [5, 703]
    assert batch.nbytes == sum(cache.nbytes for cache in caches)
    alone = batch.select([0])
    assert alone.lengths == [2] and alone.max_length == 5 and alone.nbytes == caches[0].nbytes


def test_extend_moves_rows_without_copying_keys_and_values(model: StripedHyena) -> None:
    one, two = (read(model, torch.randint(50, (1, n)), max_length=20) for n in (3, 8))
    expected = Cache.merge([one, two])
    stores = [t.data_ptr() for cache in (one, two) for t in cache.states[1].tensors()]
    one.extend([two])
    assert [t.data_ptr() for t in one.states[1].tensors()] == stores
    tokens = torch.randint(50, (2, 4))
    torch.testing.assert_close(step(model, one, tokens), step(model, expected, tokens))
    with pytest.raises(InputError, match=r"0 rows \(they were moved"):
        step(model, two, tokens)


def test_keep_drops_rows_and_frees_their_memory(model: StripedHyena) -> None:
    cache = read(model, torch.randint(50, (4, 6)), max_length=20)
    expected = cache.select([1, 3])
    size = cache.nbytes
    cache.keep([1, 3])
    assert cache.nbytes == size // 2
    tokens = torch.randint(50, (2, 2))
    torch.testing.assert_close(step(model, cache, tokens), step(model, expected, tokens))
    with pytest.raises(InputError, match="rising order"):
        cache.keep([1, 0])


def test_rows_apart_in_one_storage_are_read_where_they_lie(model: StripedHyena) -> None:
    """Rows of equal length: of one storage with a gap, and of two storages whose places follow each other."""
    prompts, tokens = torch.randint(50, (5, 6)), torch.randint(50, (4, 3))
    batch, first = read(model, prompts[:4], max_length=20), read(model, prompts[4:], max_length=20)
    stores = [t.data_ptr() for t in batch.states[1].tensors()]
    batch.keep([0, 2, 3])
    assert [t.data_ptr() for t in batch.states[1].tensors()] == stores  # more than half is used: nothing is copied
    expected = step(model, read(model, prompts[[0, 2, 3]]), tokens[:3])
    torch.testing.assert_close(step(model, batch.snapshot(), tokens[:3]), expected)
    torch.testing.assert_close(step(model, batch, tokens[:3]), expected)
    other = read(model, prompts[:3], max_length=20)
    other.keep([1, 2])
    first.extend([other])
    expected = step(model, read(model, prompts[[4, 1, 2]]), tokens[:3])
    torch.testing.assert_close(step(model, first, tokens[:3]), expected)


def test_a_cache_of_another_model_is_refused(model: StripedHyena) -> None:
    other = StripedHyena(CONFIG).double()
    cache, foreign = read(model, torch.randint(50, (1, 4))), read(other, torch.randint(50, (1, 4)))
    for bad in (
        lambda: step(other, cache, torch.zeros(1, 1, dtype=torch.long)),
        lambda: cache.restore(foreign),
        lambda: cache.extend([foreign]),
        lambda: Cache.merge([cache, foreign]),
    ):
        with pytest.raises(InputError, match="another model"):
            bad()
    assert cache.lengths == [4] and foreign.lengths == [4]


def test_one_cache_in_two_threads_is_refused(model: StripedHyena) -> None:
    cache = read(model, torch.randint(50, (1, 4)))
    errors: list[BaseException] = []

    def intrude(*_: object) -> None:
        def other() -> None:
            try:
                step(model, cache, torch.zeros(1, 1, dtype=torch.long))
            except InputError as error:
                errors.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    handle = model.layers[1].register_forward_hook(intrude)
    step(model, cache, torch.zeros(1, 1, dtype=torch.long))
    handle.remove()
    assert len(errors) == 1 and "in use by another thread" in str(errors[0])
    assert cache.lengths == [5]


def test_autocast_and_narrow_keys_work(model: StripedHyena) -> None:
    """Keys and values in another dtype than the queries are converted when they are read."""
    narrow = StripedHyena(CONFIG)
    ids = torch.randint(50, (2, 9))
    with torch.inference_mode():
        cache = narrow.make_cache(2, dtype=torch.bfloat16)
        got = torch.cat([narrow(part, cache=cache) for part in ids.split(3, dim=1)], dim=1)
        torch.testing.assert_close(got, narrow(ids), atol=0.05, rtol=0.05)  # keys in bfloat16
        cache = narrow.make_cache(2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = torch.cat([narrow(part, cache=cache) for part in ids.split(3, dim=1)], dim=1)
        torch.testing.assert_close(got.float(), narrow(ids), atol=0.1, rtol=0.1)  # products in bfloat16


def test_caches_that_were_restored_from_one_snapshot_are_independent(model: StripedHyena) -> None:
    saved = read(model, torch.randint(50, (2, 6)), max_length=20)
    tokens = torch.randint(50, (3, 2, 2, 3))  # what three caches read, in two steps
    caches = [model.make_cache(2, max_length=20) for _ in tokens]
    for cache in caches:
        cache.restore(saved)
    got = [[step(model, cache, own[i]) for cache, own in zip(caches, tokens, strict=True)] for i in range(2)]
    for row, own in enumerate(tokens):
        alone = saved.snapshot()
        for i in range(2):
            torch.testing.assert_close(got[i][row], step(model, alone, own[i]))
    caches[0].restore(saved)
    caches[0].extend([caches[1]])
    assert saved.lengths == [6, 6] and saved.batch_size == len(saved.limits) == 2


def test_a_cache_with_a_row_without_limit_has_none(model: StripedHyena) -> None:
    limited, growing = (read(model, torch.randint(50, (1, 4)), max_length=n) for n in (20, None))
    assert limited.max_length == 20 and growing.max_length is None
    assert Cache.merge([limited, growing]).max_length is None
    assert Cache.merge([limited, read(model, torch.randint(50, (1, 4)), max_length=30)]).max_length == 30


@pytest.mark.parametrize("rows", [[0, 0], [1, 0], [0, 1, 1]])
def test_rows_are_kept_in_order_and_once(model: StripedHyena, rows: list[int]) -> None:
    cache = read(model, torch.randint(50, (2, 4)))
    with pytest.raises(InputError, match="rising order, each once"):
        cache.keep(rows)
    assert cache.batch_size == 2


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
    with pytest.raises(InputError, match="same method"):
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
    kv = next(state for state in cache.states if isinstance(state, KVState))
    assert kv.capacities == [1024]  # 256, doubled as often as needed: a step copies nothing


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
    cache = StripedHyena(CONFIG).make_cache(3, max_length=10, dtype=torch.bfloat16)
    keys = 2 * 3 * 2 * 10 * 4 * 2  # two stores, B, G, slots, head_dim, bytes
    states = 2 * 3 * (3 * 16 * 2 * 4 + 16 * 2 * 8)  # two layers, B, short in float32, long in complex64
    assert cache.nbytes == keys + states


def _through_a_file(cache: Cache) -> Cache:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), _through_a_file])
def test_copies_of_python_are_snapshots(model: StripedHyena, copied: Any) -> None:
    cache = read(model, torch.randint(50, (3, 6)), max_length=20)
    cache.states[1].pointers()  # addresses, which a copy must not inherit
    other = copied(cache)
    assert other.lengths == cache.lengths and other.limits == cache.limits and other.nbytes == cache.nbytes
    assert other.states[1].pointers()[0].tolist() == [other.states[1].keys(row).data_ptr() for row in range(3)]
    tokens = torch.randint(50, (3, 4))
    expected = step(model, cache.snapshot(), tokens)
    step(model, cache, torch.randint(50, (3, 4)))
    torch.testing.assert_close(step(model, other, tokens), expected)


def test_a_copy_belongs_to_the_model_that_is_copied_with_it(model: StripedHyena) -> None:
    cache = read(model, torch.randint(50, (1, 6)))
    step(model, copy.deepcopy(cache), torch.zeros(1, 1, dtype=torch.long))
    other, theirs = copy.deepcopy((model, cache))
    step(other, theirs, torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(InputError, match="another model"):
        step(model, theirs, torch.zeros(1, 1, dtype=torch.long))


def test_no_row_is_appended_twice(model: StripedHyena) -> None:
    cache, other = read(model, torch.randint(50, (2, 6))), read(model, torch.randint(50, (1, 3)))
    for others in ([cache], [other, other]):
        with pytest.raises(InputError, match="the same cache twice"):
            cache.extend(others)
        assert cache.lengths == [6, 6] and other.lengths == [3]
    cache.extend([])
    assert cache.lengths == [6, 6]
    assert Cache.merge([other, other]).lengths == [3, 3]


@pytest.mark.parametrize(
    "rows", [[True, False], torch.tensor([True, False]), 1, torch.tensor(1), None, [0.0], ["0"], [-1], [2], [[0]], []]
)
def test_what_is_no_list_of_rows(model: StripedHyena, rows: Any) -> None:
    cache = read(model, torch.randint(50, (2, 6)))
    for verb in (cache.select, cache.keep):
        with pytest.raises(InputError, match=r"numbers of rows, 0 … 1, and was given"):
            verb(rows)
    assert cache.lengths == [6, 6]


def test_gradients_of_a_pass_end_at_the_pass_before(model: StripedHyena) -> None:
    """They are those of a pass over a fixed state, and what is remembered has no history."""
    ids, more = torch.randint(50, (2, 6)), torch.randint(50, (2, 3))
    gradients = []
    for first in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        cache = model.make_cache(2)
        with first():
            model(ids, cache=cache)
        assert not any(t.requires_grad for t in cache.tensors())
        model.zero_grad()
        loss = model(more, cache=cache).logsumexp(-1).sum()
        step(model, cache, more)  # writes into the same storage
        loss.backward()
        assert not any(t.requires_grad for t in cache.tensors())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
    # and they are the derivatives: the newest keys and values count
    cache = read(model, ids)
    weight = dict(model.named_parameters())["layers.1.mixer.qkv_proj.weight"]
    along = torch.randn_like(weight)

    def loss_at(distance: float) -> torch.Tensor:
        moved: dict[str, Any] = {"layers.1.mixer.qkv_proj.weight": weight + distance * along}
        return torch.func.functional_call(model, moved, (more,), {"cache": cache.snapshot()}).logsumexp(-1).sum()

    slope = (torch.autograd.grad(loss_at(0.0), weight)[0] * along).sum()
    with torch.no_grad():
        measured = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    torch.testing.assert_close(slope, measured, rtol=1e-6, atol=1e-8)  # the error of central differences is of 1e-10


def test_verbs_wait_for_no_other_thread(model: StripedHyena) -> None:
    """They refuse while a pass reads the cache, which then is as it was."""
    cache, other = (read(model, torch.randint(50, (2, 6))) for _ in range(2))
    snapshot = cache.snapshot()
    verbs = (cache.reset, cache.take, lambda: cache.keep([0]), lambda: cache.extend([other]))
    verbs += (lambda: other.extend([cache]), lambda: cache.restore(snapshot))
    with cache.reading(model, 2, cache.lengths, [1, 1]):
        for verb in verbs:
            with pytest.raises(InputError, match="in use by another thread"):
                verb()
    assert cache.lengths == other.lengths == [6, 6]
    with pytest.raises(InputError, match="in use"), cache.reading(model, 2, [5, 6], [1, 1]):
        pass
    cache.keep([0])


def test_bad_inputs(model: StripedHyena) -> None:
    cache = model.make_cache(2)
    for bad in (lambda: cache.select([]), lambda: cache.select([2]), lambda: Cache.merge([])):
        with pytest.raises(InputError):
            bad()
    with pytest.raises(InputError, match="batch_size"):
        model.make_cache(0)
    with pytest.raises(InputError, match="2 rows"):
        step(model, cache, torch.zeros(1, 1, dtype=torch.long))
    cache.take()
    for bad in (lambda: cache.device, lambda: cache.select([0]), lambda: cache.keep([0])):
        with pytest.raises(InputError, match="no rows"):
            bad()


def test_keys_and_values_may_lie_in_storage_of_the_caller() -> None:
    """Views of one tensor in another order of axes, as other programs store them."""
    storage = torch.zeros(2, 8, 2, 3, 4)  # [B,capacity,2,G,head_dim]
    state = KVState.over(*storage.transpose(1, 3).unbind(2))
    keys, values = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    state.write(keys, values, [0, 0])
    state.write(keys[:, :, :1], values[:, :, :1], [5, 6])
    assert torch.equal(storage[:, :5, 0], keys.transpose(1, 2)) and torch.equal(
        storage[:, :5, 1], values.transpose(1, 2)
    )
    assert torch.equal(storage[0, 5, 0], keys[0, :, 0]) and torch.equal(storage[1, 6, 1], values[1, :, 0])
    assert not storage[0, 6:].any() and not storage[1, 5].any()
