"""Products of several rows on one GPU: which tiles do they take, and what a step of several rows gains.

    python -m benchmarks.kernels.few_rows --output FOLDER

For whoever changes ``ops.triton.decode.few_rows``. The matrices of the 7B at some numbers of vectors, by torch's
library call and by tiles, each replayed as one graph over matrices that no cache holds; then a captured greedy step,
kernel by kernel. ``--compile 1/6`` only compiles one sixth of the kernels, so that six processes fill the compiler's
cache before anything is timed. ``--quick`` runs it on a tiny model, on any device.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.gpu.sizes import TINY
from benchmarks.kernels.decode import CublasOperators, kernels_of, shapes
from benchmarks.kernels.log import Log
from benchmarks.registry import require_equal
from hyaena.bench.clock import Samples, graph_times, release, wall_seconds
from hyaena.bench.measure import filled_cache, stepper
from hyaena.bench.rates import measure_bandwidth
from hyaena.bench.run import SH_7B, random_model
from hyaena.config import ModelConfig
from hyaena.model import StripedHyena
from hyaena.ops import DecodeOperators, Dense, RMSNormWeight
from hyaena.ops.triton import can_overlap, interpreted
from hyaena.ops.triton.decode.few_rows import Products, Tile, choose_tile
from hyaena.ops.triton.decode.operators import FusedDecodeOperators
from hyaena.sizes import ModelSizes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
OVERLAP = can_overlap(DEVICE)

LINEAR = {
    16: [Tile(64, 128, stages=4), Tile(64, 128, stages=3), Tile(32, 128, stages=4), Tile(64, 256, stages=3)],
    64: [Tile(64, 128, stages=3), Tile(64, 128, stages=4), Tile(128, 64, stages=5, warps=8), Tile(64, 64, stages=8)],
    128: [Tile(128, 64, stages=4, warps=8), Tile(64, 64, stages=6), Tile(64, 128, stages=4), Tile(64, 64, stages=4)],
}
"""Of one matrix, by vectors; each at those splits that make ``LEAST`` to ``MOST`` programs."""
GATE = {
    16: [Tile(64, 128, stages=3), Tile(64, 64, stages=4)],
    64: [Tile(64, 64, stages=4), Tile(64, 64, stages=3), Tile(128, 64, stages=4, warps=8)],
    128: [Tile(128, 64, stages=3, warps=8), Tile(64, 64, stages=3), Tile(64, 64, stages=6)],
}
QUICK = [Tile(16, 64, stages=2)]
LEAST, MOST = 90, 270


@dataclasses.dataclass(frozen=True)
class Problem:
    """A product of a step: ``vectors``, the matrices, and whether a norm stands before it."""

    kind: str
    vectors: int
    rows: int
    width: int
    normed: bool

    @property
    def key(self) -> tuple[str, int, int, int]:
        return self.kind, max(16, self.vectors), self.rows, self.width

    def tiles(self) -> list[Tile]:
        """The tiles to try."""
        if self.kind == "gate":
            return GATE.get(self.vectors, QUICK)
        tiles = LINEAR.get(self.vectors, QUICK)
        found = [dataclasses.replace(tile, splits=splits) for tile in tiles for splits in (1, 2, 4)]
        fitting = [t for t in found if LEAST <= -(-self.rows // t.rows) * t.splits <= MOST]
        return fitting or tiles

    def matrices(self, copies: int) -> list[list[Tensor]]:
        """Random matrices: gate and up, or one."""
        count = 2 if self.kind == "gate" else 1
        return [[randn(self.rows, self.width) * self.width**-0.5 for _ in range(count)] for _ in range(copies)]

    def run(self, operators: DecodeOperators, config: ModelConfig, inputs: list[Tensor], w: list[Tensor]) -> Tensor:
        """The product, as a step calls it; inputs are x, the residual and the norm's weight."""
        x, residual, g = inputs
        norm = RMSNormWeight(g, 1e-5, True) if self.normed else None
        if len(w) == 2:
            return operators.gate(x, Dense(w[0]), Dense(w[1]), norm=norm, activation=config.activation)
        return operators.linear(x, Dense(w[0]), norm=norm, residual=None if self.normed else residual)

    def inputs(self) -> list[Tensor]:
        return [randn(self.vectors, self.width), randn(self.vectors, self.rows), randn(self.width)]


def problems(config: ModelConfig, vectors: int) -> list[Problem]:
    """The products of a step of so many rows; those that write to the residual stream have no norm."""
    return [
        Problem(kind, vectors, rows, width, normed=kind == "gate" or rows != config.hidden_size)
        for kind, rows, width in shapes(config)
    ]


def randn(*shape: int) -> Tensor:
    """Random numbers on the device."""
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def with_tiles(tiles: dict[Any, Tile]) -> FusedDecodeOperators:
    """The operators of a step, with tiles in place of the rule's."""
    return FusedDecodeOperators(overlap=OVERLAP, products=Products(overlap=OVERLAP, tiles=tiles))


def compile_part(config: ModelConfig, vectors: list[int], part: int, parts: int) -> None:
    """Compile every ``parts``-th kernel."""
    pairs = [(problem, tile) for count in vectors for problem in problems(config, count) for tile in problem.tiles()]
    for problem, tile in pairs[part - 1 :: parts]:
        try:
            problem.run(with_tiles({problem.key: tile}), config, problem.inputs(), problem.matrices(1)[0])
        except OutOfResources:
            continue


def compare(log: Log, config: ModelConfig, vectors: int, bandwidth: float, until: float) -> dict[Any, Tile]:
    """Every product by torch and by each tile; the fastest tile of each."""
    best: dict[Any, Tile] = {}
    for problem in problems(config, vectors):
        size = (2 if problem.kind == "gate" else 1) * problem.rows * problem.width * 2
        weights, inputs = problem.matrices(max(2, min(12, -(-400_000_000 // size))) if CUDA else 1), problem.inputs()
        exact = problem.run(DecodeOperators(), config, [t.float() for t in inputs], [t.float() for t in weights[0]])

        def seconds(
            operators: DecodeOperators,
            problem: Problem = problem,
            inputs: list[Tensor] = inputs,
            weights: list[list[Tensor]] = weights,
        ) -> Samples:
            return graph_times([partial(problem.run, operators, config, inputs, w) for w in weights], DEVICE, 8)

        name = f"{problem.kind} {problem.rows}x{problem.width}"
        log.figure(seconds(CublasOperators()), size / bandwidth, what=name, vectors=vectors, tile="torch")
        rule = choose_tile(max(16, vectors), 2 if problem.kind == "gate" else 1, problem.rows, problem.width)
        found: dict[Tile, Samples] = {}
        for tile in dict.fromkeys([rule, *problem.tiles()]):
            if time.perf_counter() > until:
                break
            operators = with_tiles({problem.key: tile})
            try:
                require_equal(f"{name} {tile}", problem.run(operators, config, inputs, weights[0]), exact, 1.5e-2)
                found[tile] = seconds(operators)
            except OutOfResources:
                continue
            log.figure(found[tile], size / bandwidth, what=name, vectors=vectors, tile=str(dataclasses.astuple(tile)))
        if found:
            best[problem.key] = min(found, key=lambda tile: found[tile].median)
        del weights, seconds
        release()
    return best


def ways(config: ModelConfig, batch: int, best: dict[Any, Tile]) -> Iterator[tuple[str, FusedDecodeOperators]]:
    """The ways to multiply that steps are compared by."""
    yield "tiles by rule", FusedDecodeOperators(overlap=OVERLAP)
    if batch > 1 and CUDA:
        yield "products by torch", CublasOperators(overlap=OVERLAP)
    if best and CUDA:
        yield "fastest tiles", with_tiles(best)


def compare_steps(
    log: Log, model: StripedHyena, batch: int, context: int, steps: int, bandwidth: float, best: dict[Any, Tile]
) -> None:
    """A captured greedy step by each way to multiply."""
    bound = ModelSizes(model.config).decode_bytes(batch, context, 2) / bandwidth
    for name, operators in ways(model.config, batch, best):
        release()
        cache = filled_cache(model, batch, context, room=8 * steps + 16)
        run = stepper(model, cache, "cuda_graph" if CUDA else "static", operators if CUDA else None)
        run(steps)
        took = Samples.of(wall_seconds(partial(run, steps)) / steps for _ in range(4))
        log.figure(took, bound, what="step", name=name, batch=batch, context=context)
        if CUDA and name == "tiles by rule":
            kernels_of(run)


def main(argv: list[str] | None = None) -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    Log.options(parser).add_argument("--seconds", type=float, default=90.0, help="most seconds of the products")
    parser.add_argument("--vectors", type=int, nargs="*", default=[16, 64, 128], help="of the products")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 16, 64, 128], help="of the steps")
    parser.add_argument("--compile", metavar="PART/PARTS", help="only compile this part of the kernels")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    config = TINY if options.quick else SH_7B
    if options.compile:
        with torch.inference_mode():
            compile_part(config, options.vectors, *map(int, options.compile.split("/")))
        return
    log = Log(options, "few_rows", DEVICE)
    bandwidth = measure_bandwidth(DEVICE).median
    log.note(device=log.device, bandwidth=bandwidth)
    best: dict[Any, Tile] = {}
    began = time.perf_counter()
    sizes = [3] if options.quick else options.vectors
    with torch.inference_mode():
        for i, vectors in enumerate(sizes, 1) if CUDA or interpreted() else ():
            best |= compare(log, config, vectors, bandwidth, began + options.seconds * i / len(sizes))
    log.note(fastest={str(key): dataclasses.astuple(tile) for key, tile in best.items()})
    model = random_model(config, DEVICE, torch.bfloat16)
    for batch in (3,) if options.quick else options.rows:
        compare_steps(log, model, batch, 60 if options.quick else 2048, 1 if options.quick else 24, bandwidth, best)


if __name__ == "__main__":
    main()
