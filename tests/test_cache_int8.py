"""Caches of int8 keys and values keep every law of the others: chunks, rows, verbs, files, the server."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hyaena
from configs import TINY, TINY_BYTES, TINY_EVO, TINY_EVO2
from hyaena.adapters import add_adapter, save_adapter, with_adapter
from hyaena.cache import Cache
from hyaena.cli import main
from hyaena.errors import CheckpointError, InputError, UnsupportedError
from hyaena.generation import generate, load_prefix, prefix
from hyaena.model import StripedHyena
from hyaena.ops import PAGE
from hyaena.sizes import ModelSizes
from hyaena.tokenizers import ByteTokenizer
from models import spread
from serve.clients import CONFIGS, alone, prompts, running, submit

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module", params=[TINY, TINY_EVO, TINY_EVO2], ids=["sh", "evo", "evo2"])
def model(request: pytest.FixtureRequest) -> StripedHyena:
    """In float64, so that other orders of sums move no number over the middle between two of 8 bits."""
    torch.manual_seed(1)
    model = spread(request.param).double()
    model.cache_dtype = "int8"
    return model


@torch.inference_mode()
def read(model: StripedHyena, cache: Cache, ids: Tensor, **options: Any) -> Tensor:
    return model(ids, cache=cache, **options)


def read_in(model: StripedHyena, ids: Tensor, splits: list[int]) -> Tensor:
    cache = model.make_cache(len(ids))
    return torch.cat([read(model, cache, part) for part in ids.split(splits, dim=1)], dim=1)


def test_chunks_and_steps_are_the_whole(model: StripedHyena) -> None:
    ids = torch.randint(50, (2, 40))
    want = read_in(model, ids, [40])
    for splits in ([1] * 40, [17, 1, 22], [39, 1]):
        torch.testing.assert_close(read_in(model, ids, splits), want)
    exact = model(ids).detach()
    error = float((want - exact).norm() / exact.norm())
    assert 1e-5 < error < 0.1  # the whole is read in 8 bits, too


def test_rows_with_lengths_of_their_own_are_rows_alone(model: StripedHyena) -> None:
    rows = [torch.randint(50, (n,)) for n in (9, 1, 30)]
    more = torch.randint(50, (3, 4))
    want = [read_in(model, torch.cat([row, more[i]])[None], [len(row), 4])[0, -4:] for i, row in enumerate(rows)]
    padded = torch.stack([torch.nn.functional.pad(row, (30 - len(row), 0)) for row in rows])
    mask = torch.arange(30) >= 30 - torch.tensor([[len(row)] for row in rows])
    cache = model.make_cache(3)
    read(model, cache, padded, mask=mask)
    torch.testing.assert_close(read(model, cache, more), torch.stack(want))
    pool = model.make_page_pool(3)
    assert pool.dtype == torch.int8
    for cache in (model.make_cache(3), model.make_paged_cache(pool, [[2], [0], [1]])):
        read(model, cache, torch.cat(rows)[None], counts=[len(row) for row in rows])
        torch.testing.assert_close(read(model, cache, more), torch.stack(want))


def test_verbs_move_the_same_numbers(model: StripedHyena) -> None:
    ids, more = torch.randint(50, (3, 20)), torch.randint(50, (3, 5))
    cache = model.make_cache(3)
    read(model, cache, ids)
    mark, saved = cache.mark(), cache.snapshot()
    want = read(model, cache, more)
    cache.rewind(mark)
    copies = [cache, cache.select([2, 0, 1]), pickle.loads(pickle.dumps(cache)), copy.deepcopy(saved)]
    for place, copied in enumerate(copies):
        order = [2, 0, 1] if place == 1 else [0, 1, 2]
        torch.testing.assert_close(read(model, copied, more[order]), want[order])
    cache.restore(saved)
    torch.testing.assert_close(read(model, cache, more), want)
    cache.restore(saved)
    cache.keep([0, 2])
    other = saved.select([1])
    cache.extend([other])
    torch.testing.assert_close(read(model, cache, more[[0, 2, 1]]), want[[0, 2, 1]])


def test_bytes_are_those_of_the_sizes(model: StripedHyena) -> None:
    sizes, itemsize = ModelSizes(model.config), model.dtype.itemsize
    cache = model.make_cache(2, max_length=30)
    assert cache.nbytes == sizes.cache_bytes(2, 30, itemsize, 1)
    assert model.make_page_pool(3).page_bytes == sizes.page_bytes(PAGE, 1)
    narrow = model.make_cache(2, max_length=30, dtype="bfloat16")
    assert narrow.nbytes == sizes.cache_bytes(2, 30, itemsize, 2)
    assert model.make_cache(1, max_length=30, dtype=torch.float64).nbytes == sizes.cache_bytes(1, 30, itemsize)
    large = ModelSizes(replace(TINY, hidden_size=512))
    assert 0.51 < large.kv_bytes_per_token(1) / large.kv_bytes_per_token(2) < 0.52


@pytest.mark.parametrize(
    "config", [TINY_BYTES, replace(TINY_EVO2, tokenizer="bytes", vocab_size=259)], ids=["sh", "evo2"]
)
def test_every_way_of_decoding_chooses_the_same_tokens(config: Any) -> None:
    torch.manual_seed(2)
    model = spread(config)
    model.cache_dtype = "int8"
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0.0, "stop_at_eos": False}
    texts = ["The hyena", "a", "striped and spotted " * 4]
    want = generate(model, TOKENIZER, texts, decoding="eager", **options)
    for decoding in ("static", "compiled"):
        if decoding == "compiled":
            pytest.importorskip("numba")
        for got, one in zip(generate(model, TOKENIZER, texts, decoding=decoding, **options), want, strict=True):
            assert got.tokens == one.tokens
            torch.testing.assert_close(got.logprobs, one.logprobs, atol=2e-3, rtol=2e-3)


def test_a_server_pre_empts_and_shares_prefixes_bit_for_bit() -> None:
    torch.manual_seed(3)
    model = StripedHyena(CONFIGS["sh"])
    model.cache_dtype = "int8"
    texts = [*prompts(4, longest=300), [9] * 300]
    settings: dict[str, Any] = {"chunk": 128, "deterministic": True}
    page = ModelSizes(model.config).page_bytes(PAGE, 1)

    def lonely(text: list[int]) -> Any:
        with running(model, **settings) as engine:
            return submit(engine, text, count=40, temperature=0.8, seed=3).wait()

    want = [lonely(text) for text in texts]
    with running(model, **settings, max_rows=4, kv_bytes=12 * page) as engine:
        assert engine.scheduler.pages.count == 12 and engine.runner.pool.page_bytes == page
        for _ in range(2):  # the second time with what the prefix cache has
            clients = [submit(engine, text, count=40, temperature=0.8, seed=3) for text in texts]
            for client, other in zip(clients, want, strict=True):
                assert client.wait().tokens == other.tokens and client.logprobs == other.logprobs
        assert engine.scheduler.preemptions > 0
        assert any(client.deltas[0].cached_tokens for client in clients)
    with running(model, chunk=128, max_rows=3) as engine:
        for client, text in [(submit(engine, text), text) for text in texts]:
            assert client.wait().tokens == alone(model, text).tokens


def test_prefixes_go_through_files_of_their_own_dtype(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = spread(TINY_BYTES)
    model.cache_dtype = "int8"
    made = prefix(model, TOKENIZER, "The four species of hyenas")
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.0}
    want = generate(model, TOKENIZER, " are", prefix=made, **options)
    path = made.save(tmp_path / "prefix")
    assert generate(model, TOKENIZER, " are", prefix=load_prefix(path, model), **options).tokens == want.tokens
    model.cache_dtype = "auto"
    with pytest.raises(CheckpointError, match=r"keys and values in int8, and .* float32: load .* cache_dtype='int8'"):
        load_prefix(path, model)
    later = made.save(tmp_path / "later")  # its cache is what it was
    model.cache_dtype = "int8"
    assert generate(model, TOKENIZER, " are", prefix=load_prefix(later, model), **options).tokens == want.tokens
    model.cache_dtype = "auto"
    with pytest.raises(InputError, match="different sizes or dtypes cannot be joined: make the caches with one dtype"):
        Cache.merge([made.cache, model.make_cache(1)])


def test_a_prefix_without_keys_and_values_fits_any_dtype_of_them(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = StripedHyena(replace(TINY_BYTES, layer_types=("hyena", "hyena")))
    path = prefix(model, TOKENIZER, "The four species of hyenas").save(tmp_path / "prefix")
    want = generate(model, TOKENIZER, " are", prefix=load_prefix(path, model), max_new_tokens=8)
    model.cache_dtype = "int8"
    assert generate(model, TOKENIZER, " are", prefix=load_prefix(path, model), max_new_tokens=8).tokens == want.tokens
    later = prefix(model, TOKENIZER, "The four species of hyenas").save(tmp_path / "later")
    model.cache_dtype = "auto"
    assert generate(model, TOKENIZER, " are", prefix=load_prefix(later, model), max_new_tokens=8).tokens == want.tokens


def test_a_model_that_was_pickled_before_there_was_a_choice_has_caches_of_its_own_dtype() -> None:
    model = StripedHyena(TINY)
    model.__dict__.pop("_cache_dtype", None)
    again = pickle.loads(pickle.dumps(model))
    assert again.cache_dtype == torch.float32 and again.make_cache(max_length=4).nbytes
    again.cache_dtype = "int8"
    assert pickle.loads(pickle.dumps(again)).cache_dtype == torch.int8 and model.cache_dtype == torch.float32


def test_an_adapter_keeps_the_dtype_of_the_cache(tmp_path: Path) -> None:
    model = spread(TINY)
    model.cache_dtype = "int8"
    add_adapter(base := copy.deepcopy(model), rank=2)
    save_adapter(base, tmp_path / "adapter")
    assert with_adapter(model, tmp_path / "adapter").cache_dtype == torch.int8


def test_gradients_are_refused_and_nothing_is_lost(model: StripedHyena) -> None:
    ids = torch.randint(50, (1, 6))
    cache = model.make_cache(1)
    read(model, cache, ids)
    before = cache.snapshot()
    with (
        torch.enable_grad(),
        pytest.raises(UnsupportedError, match=r"in int8 carry no gradients: read under torch.no_g"),
    ):
        model(ids, cache=cache)
    assert cache.lengths == before.lengths
    assert torch.equal(read(model, cache, ids), read(model, before, ids))


def test_what_cannot_be_stored_is_refused(model: StripedHyena) -> None:
    for wrong in ("int4", "fp8", torch.int32):
        with pytest.raises(InputError, match=r"not stored in .*choose a cache dtype among"):
            model.make_cache(1, dtype=wrong)
        with pytest.raises(InputError, match="not stored in"):
            model.cache_dtype = wrong
        with pytest.raises(InputError, match="not stored in"):
            hyaena.load("nowhere", cache_dtype=wrong)
        assert model.cache_dtype == torch.int8
    odd = StripedHyena(replace(TINY, hidden_size=24))  # heads of 6 channels
    for attempt in (lambda: setattr(odd, "cache_dtype", "int8"), lambda: odd.make_page_pool(1, dtype="int8")):
        with pytest.raises(InputError, match="multiple of 4 channels"):
            attempt()
    assert odd.cache_dtype == torch.float32


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--max-new-tokens", "4", "--temperature", "0", "--cache-dtype"]
    assert main([*words, "int8", "import"]) == 0 and capsys.readouterr().out.strip()
    with pytest.raises(SystemExit):
        main([*words, "int4", "import"])
    assert "invalid choice: 'int4'" in capsys.readouterr().err
    assert main(["info", "cub", "--cache-dtype", "int8"]) == 0
    assert "keys and values in int8" in capsys.readouterr().out
