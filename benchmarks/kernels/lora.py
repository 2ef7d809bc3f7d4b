"""A linear layer with a LoRA update on one GPU: its parts, and other orders of the same products.

    python -m benchmarks.kernels.lora --output FOLDER

For whoever changes ``ops/lora.py``; ``tests/ops`` shows that it is right, and ``benchmarks.gpu`` measures a whole step.
Every shape of layer of the 7B, T 8,192, rank 16, bfloat16. A bound of a whole layer is the frozen layer's product in
the same run; that of a thin product is one read of the wide tensor. About half a minute. ``--quick``: tiny sizes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.log import Log
from hyaena.bench.clock import Call, call_times, release
from hyaena.bench.rates import measure_bandwidth
from hyaena.ops import Dense, lora_linear
from hyaena.ops.triton import lora

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
LENGTH, RANK, REPEATS = 8192, 16, 20
SHAPES = ((6144, 4096), (4096, 4096), (12_288, 4096), (14_336, 4096), (4096, 14_336))
"""Rows and columns: qkv_proj, o_proj and out_proj, in_proj, gate_proj and up_proj, down_proj."""
QUICK = (40, 4, 1, ((24, 16), (16, 24)))
TILES = {"32 x 512": (32, 512), "64 x 256": (64, 256), "32 x 256": (32, 256), "64 x 512": (64, 512)}
PROGRAMS = (132, 264, 528)


def operands(length: int, rank: int, rows: int, columns: int) -> tuple[Tensor, Dense, Tensor, Tensor, Tensor]:
    """x, the layer, A, B and the gradient of y."""
    make = partial(torch.randn, device=DEVICE)
    layer = Dense((make(rows, columns) * columns**-0.5).to(DTYPE))
    a, b = (make(rank, columns) * columns**-0.5).requires_grad_(), make(rows, rank).requires_grad_()
    return make(length, columns).to(DTYPE).requires_grad_(), layer, a, b, make(length, rows).to(DTYPE)


def whole(x: Tensor, layer: Dense, a: Tensor, b: Tensor, dy: Tensor) -> dict[str, Call]:
    """Forward, and forward and backward, of the frozen layer, of ours, and of other orders."""
    weight, (down, up) = layer.weight, (t.detach().to(DTYPE) for t in (a, b))
    plain = partial(torch.nn.functional.linear, x, weight)

    def after() -> Tensor:  # the update after the product
        y = x.detach() @ weight.t()
        return y.addmm_(x.detach() @ down.t(), up.t())

    def composed() -> Tensor:
        linear = torch.nn.functional.linear
        return linear(x, weight) + 0.5 * linear(linear(x, a.to(DTYPE)), b.to(DTYPE))

    def both(run: Call, leaves: Sequence[Tensor]) -> Call:
        return lambda: torch.autograd.grad(run(), leaves, dy)

    ours = partial(lora_linear, x, layer, a, b, 0.5)
    return {
        "forward, frozen": plain,
        "forward, ours": ours,
        "forward, the update last": after,
        "forward, composed": composed,
        "both, frozen": both(plain, [x]),
        "both, ours": both(ours, [x, a, b]),
        "both, composed": both(composed, [x, a, b]),
    }


def thin(x: Tensor, a: Tensor, h: Tensor) -> dict[str, Call]:
    """The two thin products of a wide tensor, by torch and by the kernel."""
    down = a.detach().to(DTYPE)
    return {
        "x·Aᵀ, torch": lambda: x @ down.t(),
        "hᵀ·x, torch": lambda: h.t() @ x,
        "x·Aᵀ, kernel": partial(lora.products, x, down, None, 0.5),
        "hᵀ·x, kernel": partial(lora.products, x, None, h, 0.5),
        "both, kernel": partial(lora.products, x, down, h, 0.5),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options = Log.options(parser).parse_args(argv)
    length, rank, repeats, shapes = QUICK if options.quick else (LENGTH, RANK, REPEATS, SHAPES)
    torch.manual_seed(0)
    log = Log(options, "lora", DEVICE)
    bandwidth = measure_bandwidth(DEVICE).median
    log.note(device=log.device, bandwidth=bandwidth)
    for rows, columns in shapes:
        x, layer, a, b, dy = operands(length, rank, rows, columns)
        bounds: dict[str, float] = {}
        for name, call in whole(x, layer, a, b, dy).items():
            seconds = call_times(call, DEVICE, repeats)
            bound = bounds.setdefault(name.split(",")[0], seconds.median)
            log.figure(seconds, bound, rows=rows, columns=columns, name=name)
        x, h = x.detach(), torch.randn(length, rank, device=DEVICE, dtype=DTYPE)
        for name, call in thin(x, a, h).items():
            log.figure(call_times(call, DEVICE, repeats), x.nbytes / bandwidth, rows=rows, columns=columns, name=name)
        release()
    x, _, a, _, _ = operands(length, rank, *shapes[-1])
    x, h = x.detach(), torch.randn(length, rank, device=DEVICE, dtype=DTYPE)
    before = lora.TOKENS, lora.FEATURES, lora.PROGRAMS
    for name, (lora.TOKENS, lora.FEATURES) in TILES.items():
        for lora.PROGRAMS in PROGRAMS:
            call = thin(x, a, h)["both, kernel"]
            log.figure(
                call_times(call, DEVICE, repeats), x.nbytes / bandwidth, rows=shapes[-1][0], columns=shapes[-1][1],
                name=f"both, {name}, {lora.PROGRAMS} programs",
            )  # fmt: skip
    lora.TOKENS, lora.FEATURES, lora.PROGRAMS = before


if __name__ == "__main__":
    main()
