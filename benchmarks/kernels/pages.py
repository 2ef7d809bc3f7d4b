"""Keys and values on pages against storage of every row, on one GPU: attention alone, a decoding step, a shared prefix.

    python -m benchmarks.kernels.pages --output FOLDER

First both must give the same numbers. Then attention by both at each batch and context, replayed as one graph over
several layers of the 7B; a step of 256 rows of 16,384 tokens that share pages for 16,000 of them, with its memory; and
a captured greedy step of the 7B by both, in turns, where every token is read by the host. Pages are in random order.
``--quick`` runs it on a tiny model, on any device.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.sizes import TINY
from benchmarks.kernels.log import Log
from benchmarks.registry import require_equal
from hyaena.bench.clock import Samples, graph_times, release, wall_seconds
from hyaena.bench.measure import filled_cache, stepper
from hyaena.bench.rates import measure_bandwidth
from hyaena.bench.run import SH_7B, random_model
from hyaena.cache import Cache
from hyaena.config import ModelConfig
from hyaena.model import StripedHyena
from hyaena.ops import PAGE, DecodeOperators, KVState, PagedKVState, PageTable, StepContext, pages_for, rotary_table
from hyaena.ops.triton import can_overlap
from hyaena.ops.triton.decode.operators import FusedDecodeOperators
from hyaena.sizes import ModelSizes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
SIZES = ((1, 2048), (16, 2048), (64, 2048), (1, 32_768), (64, 8192))
"""Batch and context of what is compared."""
SHARED = (256, 16_384, 16_000)
"""Rows, tokens of each, and how many of them are shared."""
QUICK_SIZES, QUICK_SHARED = ((1, 70), (3, 130)), (4, 200, 128)
STEPS = 24
ROOM = 256
"""Tokens of each row beside its context: for the steps of all rounds, and those that warm up."""


def random_pages(rows: int, length: int, shared: int = 0) -> tuple[int, list[list[int]]]:
    """How many pages rows of so many tokens need, and those of each in random order, the first ``shared`` in common."""
    own = pages_for(length) - shared
    numbers: list[int] = torch.randperm(shared + rows * own).tolist()
    prefix, rest = numbers[:shared], numbers[shared:]
    return len(numbers), [prefix + rest[row * own : (row + 1) * own] for row in range(rows)]


def paged_cache(model: StripedHyena, rows: int, context: int, shared: int = 0) -> Cache:
    """A cache on pages as if ``context`` tokens had been read, see ``filled_cache``."""
    count, pages = random_pages(rows, context + ROOM, shared)
    cache = model.make_paged_cache(model.make_page_pool(count), pages, max_length=context + ROOM)
    assert cache.pool is not None
    for tensor in [*cache.tensors(), *(t for layer in cache.pool.layers for t in layer)]:
        tensor.normal_()
    cache.lengths = [context] * rows
    return cache


def both_storages(config: ModelConfig, batch: int, context: int, layers: int) -> tuple[list[Any], list[Any], PageTable]:
    """Keys and values of some layers, in storage of rows and on pages, the same numbers; and the table of the pages."""
    count, pages = random_pages(batch, context)
    groups, width = config.num_key_value_heads, config.head_dim
    table = PageTable.of(pages, DEVICE)
    rows, paged = [], []
    for _ in range(layers):
        stored = [torch.randn(groups, count, PAGE, width, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
        paged.append(PagedKVState(*stored))
        rows.append(KVState.allocate(batch, groups, len(pages[0]) * PAGE, width, torch.bfloat16, DEVICE))
        for row, numbers in enumerate(table.numbers):
            rows[-1].keys(row).copy_(stored[0].index_select(1, numbers).flatten(1, 2))
            rows[-1].values(row).copy_(stored[1].index_select(1, numbers).flatten(1, 2))
    return rows, paged, table


def compare_attention(log: Log, config: ModelConfig, batch: int, context: int, bandwidth: float) -> None:
    """Rotation, write and attention by both: equal, then timed."""
    size = 2 * batch * context * config.num_key_value_heads * config.head_dim * 2
    layers = max(2, min(16, -(-300_000_000 // size))) if CUDA else 1  # more than the caches of the device hold
    rows, paged, table = both_storages(config, batch, context, layers)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    rotary = rotary_table(torch.arange(context, device=DEVICE), config.head_dim, 10_000.0)
    operators = FusedDecodeOperators() if CUDA else DecodeOperators()
    context_of = partial(StepContext, operators, lengths, lengths, rotary)
    qkv = torch.randn(batch, (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim)
    qkv = qkv.to(DEVICE, torch.bfloat16)
    both = [operators.attention(qkv, rows[0], context_of()), operators.attention(qkv, paged[0], context_of(table))]
    require_equal("attention", both[1], both[0], 1e-2)
    for row, run in enumerate(paged[0].through(table).runs([context] * batch)):
        require_equal("stored keys", run.keys[0], rows[0].keys(row)[:, :context], 1e-2)
        require_equal("stored values", run.values[0], rows[0].values(row)[:, :context], 1e-2)
    log.note(batch=batch, context=context, same_bits=torch.equal(*both))
    for name, states, pages in (("storage of rows", rows, None), ("pages", paged, table)):
        calls = [partial(operators.attention, qkv, state, context_of(pages)) for state in states]
        seconds = graph_times(calls, DEVICE, 20 if CUDA else 1)
        log.figure(seconds, size / bandwidth, what="attention", name=name, batch=batch, context=context)


def step_seconds(model: StripedHyena, cache: Cache, steps: int) -> list[float]:
    """Seconds of a captured greedy step, in some rounds."""
    overlap = FusedDecodeOperators(overlap=can_overlap(DEVICE)) if CUDA else None
    run = stepper(model, cache, "cuda_graph" if CUDA else "static", overlap)
    run(steps)
    return [wall_seconds(partial(run, steps)) / steps for _ in range(3)]


def compare_steps(log: Log, model: StripedHyena, batch: int, context: int, steps: int, bandwidth: float) -> None:
    """A step by both, in turns; each cache is made anew, since both do not fit at the largest size."""
    bound = ModelSizes(model.config).decode_bytes(batch, context, 2) / bandwidth
    seconds: dict[str, list[float]] = {"storage of rows": [], "pages": []}
    for _ in range(2):
        for name, took in seconds.items():
            release()
            rows = (
                filled_cache(model, batch, context, room=ROOM)
                if name != "pages"
                else paged_cache(model, batch, context)
            )
            took += step_seconds(model, rows, steps)
            del rows
    for name, took in seconds.items():
        log.figure(Samples.of(took), bound, what="step", name=name, batch=batch, context=context)


def shared_prefix(log: Log, model: StripedHyena, sizes: Sequence[int], steps: int, bandwidth: float) -> None:
    """Rows that share pages: memory, and a step beside two bounds: every row's keys read, and every page read once."""
    rows, context, common = sizes
    release()
    cache = paged_cache(model, rows, context, shared=common // PAGE)
    held = cache.nbytes
    of = ModelSizes(model.config)
    own = of.decode_bytes(rows, context, 2)
    once = own - (rows - 1) * common * of.kv_bytes_per_token(2)
    log.note(
        rows=rows,
        context=context,
        shared=common,
        cache_gb=held / 1e9,
        unshared_gb=of.cache_bytes(rows, context + ROOM, 2) / 1e9,
    )
    seconds = step_seconds(model, cache, steps)
    if CUDA:
        log.note(peak_gb=torch.cuda.max_memory_allocated() / 1e9)
    log.figure(
        Samples.of(seconds), own / bandwidth, what="shared prefix", name="every row reads", batch=rows, context=context
    )
    log.figure(
        Samples.of(seconds), once / bandwidth, what="shared prefix", name="every page once", batch=rows, context=context
    )


def main(argv: list[str] | None = None) -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=["attention", "steps", "shared"], help="one part")
    options = Log.options(parser).parse_args(argv)
    torch.manual_seed(0)
    config, sizes, shared, steps = SH_7B, SIZES, SHARED, STEPS
    if options.quick:
        config, sizes, shared, steps = TINY, QUICK_SIZES, QUICK_SHARED, 1
    log = Log(options, "pages", DEVICE)
    bandwidth = measure_bandwidth(DEVICE).median
    log.note(device=log.device, copy_gb_per_second=bandwidth / 1e9)
    if options.only in (None, "attention"):
        with torch.inference_mode():
            for batch, context in sizes:
                compare_attention(log, config, batch, context, bandwidth)
                release()
    model = random_model(config, DEVICE, torch.bfloat16) if options.only != "attention" else None
    if model is not None and options.only in (None, "shared"):
        shared_prefix(log, model, shared, steps, bandwidth)
    if model is not None and options.only in (None, "steps"):
        for batch, context in sizes:
            compare_steps(log, model, batch, context, steps, bandwidth)


if __name__ == "__main__":
    main()
