"""Attention of a decoding step to keys and values of 8, 16 and 32 bits: the dtypes of a cache, side by side.

    python -m benchmarks.kernels.cache_dtypes --output FOLDER

The heads are those of the 7B. On a CUDA device the kernels, replayed as one graph over layers of more bytes than its
caches hold; elsewhere the operators that numba compiles, with ``--threads`` threads. First each must say what the plain
operators say. Then they take turns, so that a machine that other work slows down slows all of them; a bound is the time
of reading the slots at the bandwidth that is measured first.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from benchmarks.gpu.sizes import TINY
from benchmarks.kernels.log import Log
from benchmarks.registry import require_equal
from hyaena.bench.clock import Samples, graph_times, release
from hyaena.bench.measure import randomise
from hyaena.bench.rates import measure_bandwidth
from hyaena.bench.run import SH_7B
from hyaena.config import ModelConfig
from hyaena.ops import DecodeOperators, KVState, StepContext, rotary_table
from hyaena.ops.triton import can_overlap

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
DTYPES = (*([] if CUDA else [torch.float32]), torch.bfloat16, torch.float16, torch.int8)
SIZES = ((1, 32_768), (1, 131_072), (16, 32_768), (16, 131_072)) if CUDA else ((1, 8192), (1, 32_768))
"""Batch and context."""
QUICK_SIZES = ((1, 70), (3, 130))
ROUNDS = 5


def make_operators() -> DecodeOperators:
    """The operators of this device."""
    if CUDA:
        from hyaena.ops.triton.decode.operators import FusedDecodeOperators

        return FusedDecodeOperators(overlap=can_overlap(DEVICE))
    from hyaena.ops.cpu.operators import CompiledOperators

    return CompiledOperators()


def compare(log: Log, config: ModelConfig, batch: int, context: int, bandwidth: float) -> None:
    """Equal to the plain operators, then timed."""
    operators = make_operators()
    lengths = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    step = StepContext(operators, lengths, lengths, rotary_table(torch.arange(1, device=DEVICE), config.head_dim, 1e4))
    q = torch.randn(batch, config.num_attention_heads, config.head_dim, device=DEVICE)
    calls, size = {}, {}
    for dtype in DTYPES:
        x = q if not CUDA else q.to(dtype if dtype.is_floating_point else torch.bfloat16)
        size[dtype] = nbytes(KVState.allocate(batch, *config_shape(config, context), dtype, "meta"))
        states = make_states(config, batch, context, dtype, max(1, min(8, -(-400_000_000 // size[dtype]))))
        got, want = operators.attend(x, states[0], step), DecodeOperators().attend(x.float(), states[0], step)
        require_equal(f"attention in {dtype}", got, want, 1e-2 if CUDA else 1e-5)
        calls[dtype] = [partial(operators.attend, x, state, step) for state in states]
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in DTYPES}
    for _ in range(ROUNDS):
        for dtype in DTYPES:
            times[dtype] += graph_times(calls[dtype], DEVICE, 4 if CUDA else 1).values
    for dtype, seconds in times.items():
        name = str(dtype).removeprefix("torch.")
        bound = size[dtype] / bandwidth
        log.figure(Samples.of(seconds), bound, what="attention", name=name, batch=batch, context=context)


def make_states(config: ModelConfig, batch: int, context: int, dtype: torch.dtype, layers: int) -> list[KVState]:
    """Random keys and values of some layers."""
    states = [KVState.allocate(batch, *config_shape(config, context), dtype, DEVICE) for _ in range(layers)]
    for tensor in (t for state in states for t in state.tensors()):
        randomise(tensor)
    return states


def config_shape(config: ModelConfig, context: int) -> tuple[int, int, int]:
    """Key/value heads, slots and channels of a row."""
    return config.num_key_value_heads, context, config.head_dim


def nbytes(state: KVState) -> int:
    """Of its storage."""
    return sum(t.nbytes for t in state.tensors())


def main(argv: list[str] | None = None) -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, help="of a CPU")
    options = Log.options(parser).parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config, sizes = (TINY, QUICK_SIZES) if options.quick else (SH_7B, SIZES)
    log = Log(options, "cache_dtypes", DEVICE)
    bandwidth = measure_bandwidth(DEVICE).median
    log.note(device=log.device, copy_gb_per_second=bandwidth / 1e9)
    with torch.inference_mode():
        for batch, context in sizes:
            compare(log, config, batch, context, bandwidth)
            release()


if __name__ == "__main__":
    main()
