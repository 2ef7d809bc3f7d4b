"""The kernels of a decoding step on one GPU: is each right, which tiles do products take, where does a step's time go.

    python -m benchmarks.decode_gpu --out decode.json

For whoever changes those kernels; ``benchmarks.gpu`` measures what decoding reaches. First every kernel at the widths
of SH-7B against its plain twin, and it stops if one is wrong. Then its matrices at one vector, by cuBLAS and by each
tile, and a captured step at batch 1 by the tiles of the rule, with and without kernels that overlap, by the tiles that
were fastest alone, and with products by cuBLAS, kernel by kernel. ``--quick`` runs it on a tiny model, on any device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_sizes import TINY
from hyaena import ops
from hyaena.bench.measure import filled_cache
from hyaena.bench.rates import warm_times
from hyaena.bench.run import SH_7B, random_model, release
from hyaena.config import ModelConfig
from hyaena.decoding import Decoder
from hyaena.model import StripedHyena
from hyaena.ops import HyenaState, ModalFilter, rotary_table
from hyaena.ops.step import DecodeOperators, Norm, Slots
from hyaena.ops.triton import can_overlap
from hyaena.ops.triton.decode import gemv
from hyaena.ops.triton.decode.operators import FusedDecodeOperators
from hyaena.sampling import SamplingParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}

TILES = [
    gemv.Tile(rows, width, warps, ahead)
    for rows, width, warps, ahead in (
        (4, 1024, 4, 0), (4, 1024, 4, 4), (2, 1024, 2, 4), (1, 1024, 2, 4), (2, 2048, 4, 0), (1, 2048, 4, 2),
        (2, 2048, 4, 2), (2, 2048, 8, 2), (4, 2048, 8, 2), (1, 2048, 4, 7), (1, 2048, 8, 7), (2, 2048, 8, 7),
    )
]  # fmt: skip


class CublasOperators(FusedDecodeOperators):
    """The kernels, but products by torch's library calls."""

    def project(self, *args: Any, **kwargs: Any) -> Tensor:
        return DecodeOperators.project(self, *args, **kwargs)

    def gate(self, *args: Any, **kwargs: Any) -> Tensor:
        return DecodeOperators.gate(self, *args, **kwargs)


def per_launch(calls: list[Callable[[], object]], repeats: int = 10) -> float:
    """Median seconds of one of several calls, captured together as a graph so that the host does not count."""
    for call in calls[:2]:
        call()
    if not CUDA:
        return warm_times(lambda: [call() for call in calls], DEVICE, 1).median / len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return warm_times(graph.replay, DEVICE, repeats).median / len(calls)


# --- is it right


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers on the device."""
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def check(what: str, got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Print the relative error, and stop if it is too large."""
    error = float((got.double() - want.double()).norm() / want.double().norm())
    print(f"  {what:58s} {str(dtype)[6:]:9s} error {error:.1e}", flush=True)
    if not error <= TOLERANCE[dtype]:
        raise SystemExit(f"WRONG: {what} in {dtype}: {error}, allowed {TOLERANCE[dtype]}")


def check_kernels(config: ModelConfig, length: int) -> None:
    """Every kernel at the widths of a model against its plain twin in more precision."""
    plain = DecodeOperators()
    width, hidden, hd = config.hidden_size, config.intermediate_size, config.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    for dtype in TOLERANCE:
        fused = FusedDecodeOperators()
        norm = Norm(randn(width, dtype=dtype), 1e-5, True)
        wide = Norm(norm.weight.double(), 1e-5, True)
        a, b = (randn(hidden, width, dtype=dtype) / width**0.5 for _ in range(2))
        for batch in (1, 2):
            x, r = randn(batch, width, dtype=dtype), randn(batch, hidden, dtype=dtype)
            want = plain.project(x.double(), a.double(), norm=wide, residual=r.double())
            check(f"project, norm, residual, {batch} rows", fused.project(x, a, norm=norm, residual=r), want, dtype)
            want = plain.gate(x.double(), a.double(), b.double(), norm=wide, activation="silu")
            check(f"gate, {batch} rows", fused.gate(x, a, b, norm=norm, activation="silu"), want, dtype)
        for batch, paddings in ((1, [0]), (3, [0, length - 1, length // 3])):
            q = randn(batch, heads, hd, dtype=dtype)
            k, v = (randn(batch, groups, length + 100, hd, dtype=dtype) for _ in range(2))
            table = rotary_table(torch.arange(length + 100, device=DEVICE), hd, config.rope_theta)
            padding = torch.tensor(paddings, device=DEVICE)
            slots = Slots(torch.tensor([length], dtype=torch.int32, device=DEVICE), padding.int(), table)
            want = torch.stack([
                ops.attention(q[i : i + 1, :, None].double(), *(t[i : i + 1, :, p:length].double() for t in (k, v)))[
                    0, :, 0
                ]
                for i, p in enumerate(paddings)
            ])  # fmt: skip
            for store in (k, v):
                store[:, :, length:] = torch.nan
                for row, first in enumerate(paddings):
                    store[row, :, :first] = torch.nan
            check(f"attention, {batch} rows of {length}", fused.attend(q, k, v, slots), want, dtype)
            qkv = randn(batch, (heads + 2 * groups) * hd, dtype=dtype)
            twins = k.clone(), v.clone()
            want = plain.remember(qkv, *twins, slots)
            check(f"rotary and write, {batch} rows", fused.remember(qkv, k, v, slots), want, dtype)
            check("  its keys", k[:, :, length - 1], twins[0][:, :, length - 1], dtype)
        state = HyenaState(randn(2, 3 * width, 2, dtype=dtype), torch.complex(randn(2, width, 2), randn(2, width, 2)))
        twin = HyenaState(state.short.float().clone(), state.long.clone())
        polar = torch.polar(torch.rand(width, 2, device=DEVICE), randn(width, 2))
        long_filter = ModalFilter(polar, torch.complex(randn(width, 2), randn(width, 2)), randn(width, dtype=dtype))
        exact = long_filter._replace(skip=long_filter.skip.float())  # type: ignore[union-attr]
        z, w, o = randn(2, 3 * width, dtype=dtype), randn(3 * width, 3, dtype=dtype), randn(3 * width, dtype=dtype)
        got = fused.hyena(z, w, o, long_filter, state)
        check("hyena step", got, plain.hyena(z.float(), w.float(), o.float(), exact, twin), dtype)
        check("  its modes", state.long.abs(), twin.long.abs(), dtype)


# --- how fast


def compare_products(
    config: ModelConfig, tiles: list[gemv.Tile], budget: float
) -> tuple[list[dict[str, Any]], dict[Any, gemv.Tile]]:
    """GB/s of every matrix of the model at one vector: torch's library call, and each tile."""
    width, hidden = config.hidden_size, config.intermediate_size
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    shapes = [
        ("project", 3 * width, width), ("project", width, width), ("project", qkv, width), ("gate", hidden, width),
        ("project", width, hidden), ("project", config.vocab_size, width),
    ]  # fmt: skip
    began, rows, best = time.perf_counter(), [], {}
    for kind, n, k in shapes:
        product = Product(kind, n, k, normed=k == width and n != width)
        row: dict[str, Any] = {
            "kind": kind,
            "shape": [product.pair * n, k],
            "bytes": product.size,
            "cublas_alone": product.size / product.pair / per_launch(product.alone()) / 1e9,
            "cublas_with_its_surroundings": product.size / per_launch(product.plain()) / 1e9,
            "tiles": {},
        }
        for tile in tiles:
            if time.perf_counter() - began > budget:
                break
            name = str(dataclasses.astuple(tile))
            try:
                row["tiles"][name] = product.size / per_launch(product.triton(tile)) / 1e9
            except Exception as error:  # a tile that does not fit this device
                row["tiles"][name] = 0.0
                print(f"  tile {tile}: {type(error).__name__}: {error}")
        if row["tiles"]:
            top = sorted(row["tiles"].items(), key=lambda item: -item[1])[:3]
            best[(kind, n, k)] = next(t for t in tiles if str(dataclasses.astuple(t)) == top[0][0])
            print(f"  {kind} {product.pair * n}x{k}: cuBLAS {row['cublas_alone']:.0f} alone, "
                  f"{row['cublas_with_its_surroundings']:.0f} with norm etc., Triton "
                  + ", ".join(f"{name} {value:.0f}" for name, value in top) + " GB/s", flush=True)  # fmt: skip
        rows.append(row)
    return rows, best


class Product:
    """One matrix shape of the model at one vector: enough copies of it to keep the caches out, and its callers."""

    def __init__(self, kind: str, n: int, k: int, *, normed: bool) -> None:
        self.kind, self.pair = kind, 2 if kind == "gate" else 1
        self.size = self.pair * n * k * 2
        copies = max(2, min(16, -(-300_000_000 // self.size)))
        made = [[randn(n, k, dtype=torch.bfloat16) for _ in range(self.pair)] for _ in range(copies)]
        self.weights = made * max(1, 16 // copies)
        self.x = randn(1, k, dtype=torch.bfloat16)
        norm = Norm(randn(k, dtype=torch.bfloat16), 1e-5, True) if normed else None
        self.options: dict[str, Any] = {"norm": norm}
        if kind == "gate":
            self.options["activation"] = "silu"
        elif not normed:
            self.options["residual"] = randn(1, n, dtype=torch.bfloat16)

    def alone(self) -> list[Callable[[], object]]:
        """The library's product and nothing else."""
        return [partial(torch.nn.functional.linear, self.x, w[0]) for w in self.weights]

    def plain(self) -> list[Callable[[], object]]:
        """With the norm, residual or activation that belongs to it."""
        function: Any = getattr(DecodeOperators(), self.kind)
        return [partial(function, self.x, *w, **self.options) for w in self.weights]

    def triton(self, tile: gemv.Tile) -> list[Callable[[], object]]:
        """All of it in one kernel."""
        function: Any = getattr(gemv, self.kind)
        return [partial(function, self.x, *w, **self.options, tile=tile) for w in self.weights]


def compare_steps(model: StripedHyena, context: int, steps: int, best: dict[Any, gemv.Tile]) -> list[dict[str, Any]]:
    """A greedy step of one row by each way to multiply: milliseconds, and its kernels."""
    ways = {
        "tiles by rule": FusedDecodeOperators(overlap=can_overlap(DEVICE)),
        "the same, kernel after kernel": FusedDecodeOperators(),
        "tuned tiles": FusedDecodeOperators(best, overlap=can_overlap(DEVICE)),
        "products by cuBLAS": CublasOperators(),
    }
    rows = []
    for name, operators in ways.items():
        release()
        cache = filled_cache(model, 1, context, room=8 * steps + 16)
        params = SamplingParams()
        ids = torch.ones(1, dtype=torch.int64, device=DEVICE)
        decoder = Decoder(model, cache, ids, [params], [params.generator()], captured=CUDA, operators=operators)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            decoder.launch()
            for _ in range(steps - 1):
                decoder.launch()
                decoder.fetch()
            decoder.fetch()
            times.append((time.perf_counter() - began) / steps * 1e3)
        row: dict[str, Any] = {"what": name, "context": context, "ms": statistics.median(times[1:]), "all_ms": times}
        print(f"  batch 1, context {context:,}, {name}: {row['ms']:.3f} ms", flush=True)
        if CUDA:
            row["kernels"] = kernels_of(decoder)
        rows.append(row)
    return rows


def kernels_of(decoder: Decoder, steps: int = 5) -> list[dict[str, Any]]:
    """Launches and microseconds of every kernel in a step, the most expensive first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(steps):
            decoder.launch()
            decoder.fetch()
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            sums[event.name[:70]][0] += 1 / steps
            sums[event.name[:70]][1] += event.time_range.elapsed_us() / steps
    ranked = sorted(sums.items(), key=lambda item: -item[1][1])
    print(f"    a step: {sum(n for n, _ in sums.values()):.0f} kernels, {sum(t for _, t in sums.values()):.0f} us")
    for name, (count, took) in ranked[:16]:
        print(f"    {took:9.1f} us in {count:5.1f}: {name}")
    return [{"name": name, "launches": count, "us": took} for name, (count, took) in ranked]


def main(argv: list[str] | None = None) -> None:
    """Check, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on any device: shows that it works")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    config = TINY if options.quick else SH_7B
    tiles = [gemv.Tile(8, 64, 1, 1), gemv.Tile(4, 32, 1, 2)] if options.quick else TILES
    print("is it right", flush=True)
    with torch.inference_mode():
        check_kernels(config, 300 if options.quick else 5000)
        products, best = compare_products(config, tiles, 5 if options.quick else 50)
    model = random_model(config, DEVICE, torch.bfloat16)
    steps = compare_steps(model, 60 if options.quick else 2048, 1 if options.quick else 24, best)
    chosen = {str(key): dataclasses.astuple(tile) for key, tile in best.items()}
    if options.out:
        report = {"torch": torch.__version__, "products": products, "steps": steps, "tuned_tiles": chosen}
        options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
