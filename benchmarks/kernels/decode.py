"""The kernels of a decoding step on one GPU: which tiles do products take, where does a step's time go.

    python -m benchmarks.kernels.decode --output FOLDER

For whoever changes those kernels; ``tests/ops/triton`` shows that they are right, and ``benchmarks.gpu`` measures what
decoding reaches. The matrices of the 7B at one vector, by cuBLAS and by each tile, then a captured step at batch 1 by
the tiles of the rule, with and without kernels that overlap, by the tiles that were fastest alone, and with products by
cuBLAS, kernel by kernel. ``--quick`` runs it on a tiny model, on any device.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.sizes import TINY
from benchmarks.kernels.log import Log
from hyaena.bench.clock import Call, Samples, graph_times, release, wall_seconds
from hyaena.bench.measure import filled_cache, stepper
from hyaena.bench.run import SH_7B, random_model
from hyaena.config import ModelConfig
from hyaena.model import StripedHyena
from hyaena.ops import DecodeOperators, Dense, RMSNormWeight
from hyaena.ops.triton import can_overlap
from hyaena.ops.triton.decode import gemv
from hyaena.ops.triton.decode.operators import FusedDecodeOperators

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"

TILES = [
    gemv.Tile(rows, width, warps, ahead)
    for rows, width, warps, ahead in (
        (4, 1024, 4, 0), (4, 1024, 4, 4), (2, 1024, 2, 4), (1, 1024, 2, 4), (2, 2048, 4, 0), (1, 2048, 4, 2),
        (2, 2048, 4, 2), (2, 2048, 8, 2), (4, 2048, 8, 2), (1, 2048, 4, 7), (1, 2048, 8, 7), (2, 2048, 8, 7),
    )
]  # fmt: skip


class CublasOperators(FusedDecodeOperators):
    """The kernels, but products by torch's library calls."""

    def linear(self, *args: Any, **kwargs: Any) -> Tensor:
        return DecodeOperators.linear(self, *args, **kwargs)

    def gate(self, *args: Any, **kwargs: Any) -> Tensor:
        return DecodeOperators.gate(self, *args, **kwargs)


def randn(*shape: int) -> Tensor:
    """Random numbers on the device."""
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def per_launch(calls: list[Call]) -> float:
    """Median seconds of one of several calls that are replayed as one graph."""
    return graph_times(calls, DEVICE, 10 if CUDA else 1).median


def shapes(config: ModelConfig) -> list[tuple[str, int, int]]:
    """The products of a step: kind, rows and columns of the matrix."""
    width, hidden = config.hidden_size, config.intermediate_size
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    return [
        ("linear", 3 * width, width), ("linear", width, width), ("linear", qkv, width), ("gate", hidden, width),
        ("linear", width, hidden), ("linear", config.vocab_size, width),
    ]  # fmt: skip


def compare_products(
    config: ModelConfig, tiles: list[gemv.Tile], budget: float
) -> tuple[list[dict[str, Any]], dict[Any, gemv.Tile]]:
    """GB/s of every matrix of the model at one vector: torch's library call, and each tile."""
    began, rows, best = time.perf_counter(), [], {}
    width = config.hidden_size
    for kind, n, k in shapes(config):
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
        made = [[randn(n, k) for _ in range(self.pair)] for _ in range(copies)]
        self.weights = made * max(1, 16 // copies) if CUDA else made[:2]
        self.x = randn(1, k)
        norm = RMSNormWeight(randn(k), 1e-5, True) if normed else None
        self.options: dict[str, Any] = {"norm": norm}
        if kind == "gate":
            self.options["activation"] = "silu"
        elif not normed:
            self.options["residual"] = randn(1, n)

    def alone(self) -> list[Call]:
        """The library's product and nothing else."""
        return [partial(torch.nn.functional.linear, self.x, w[0]) for w in self.weights]

    def plain(self) -> list[Call]:
        """With the norm, residual or activation that belongs to it."""
        function: Any = getattr(DecodeOperators(), self.kind)
        return [partial(function, self.x, *map(Dense, w), **self.options) for w in self.weights]

    def triton(self, tile: gemv.Tile) -> list[Call]:
        """All of it in one kernel."""
        options = {**self.options, "tile": tile}
        if self.kind == "gate":
            return [partial(gemv.gate, self.x, *w, **options) for w in self.weights]
        return [partial(gemv.linear, self.x, Dense(*w), **options) for w in self.weights]


def ways_to_multiply(best: dict[Any, gemv.Tile]) -> dict[str, DecodeOperators]:
    """The operators that are compared; on a CPU, where kernels are interpreted and take minutes, torch's own."""
    if not CUDA:
        return {"products by torch": DecodeOperators()}
    return {
        "tiles by rule": FusedDecodeOperators(overlap=can_overlap(DEVICE)),
        "the same, kernel after kernel": FusedDecodeOperators(),
        "tuned tiles": FusedDecodeOperators(best, overlap=can_overlap(DEVICE)),
        "products by cuBLAS": CublasOperators(),
    }


def compare_steps(
    model: StripedHyena, context: int, steps: int, ways: dict[str, DecodeOperators]
) -> list[dict[str, Any]]:
    """A greedy step of one row by each way to multiply: seconds, and its kernels."""
    rows = []
    for name, operators in ways.items():
        release()
        cache = filled_cache(model, 1, context, room=8 * steps + 16)
        run = stepper(model, cache, "cuda_graph" if CUDA else "static", operators)
        run(steps)
        seconds = Samples.of(wall_seconds(lambda run=run: run(steps)) / steps for _ in range(4))
        row: dict[str, Any] = {"what": name, "context": context, "seconds": list(seconds.values)}
        print(f"  batch 1, context {context:,}, {name}: {seconds.median * 1e3:.3f} ms", flush=True)
        if CUDA:
            row["kernels"] = kernels_of(run)
        rows.append(row)
    return rows


def kernels_of(run: Callable[[int], None], steps: int = 5) -> list[dict[str, Any]]:
    """Launches and microseconds of every kernel in a step, the most expensive first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        run(steps)
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
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options = Log.options(parser).parse_args(argv)
    torch.manual_seed(0)
    config = TINY if options.quick else SH_7B
    tiles = [gemv.Tile(8, 64, 1, 1)] if options.quick else TILES
    log = Log(options, "decode", DEVICE)
    log.note(device=log.device)
    with torch.inference_mode():
        products, best = compare_products(config, tiles, 5 if options.quick else 50)
    for product in products:
        log.add(**product)
    model = random_model(config, DEVICE, torch.bfloat16)
    for step in compare_steps(model, 60 if options.quick else 2048, 1 if options.quick else 24, ways_to_multiply(best)):
        log.add(**step)
    log.note(tuned_tiles={str(key): dataclasses.astuple(tile) for key, tile in best.items()})


if __name__ == "__main__":
    main()
