"""FP8 input projections against bfloat16 ones on a Hopper GPU, and the emulation of them on any device.

    python -m benchmarks.kernels.fp8 --output FOLDER

First the product of the tensor cores must equal the emulation in every bit, which is timed, too. Then a layer by both
at each number of rows, replayed as one graph over several layers, so that weights come from memory as in a model.
Bounds: reading weights once, activations once and writing the result, at the bandwidth of this machine's copies; or the
operations, at its rate of bfloat16 products, and at twice that in FP8. ``--quick`` takes tiny sizes, on any device.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import nn

from benchmarks.kernels.log import Log
from benchmarks.registry import require_equal
from hyaena.bench.clock import call_times, graph_times, release
from hyaena.bench.rates import measure_bandwidth, measure_flops
from hyaena.fp8 import FP8Linear
from hyaena.ops.fp8 import Quantized, accumulate, fp8_product, is_hopper, quantize_fp8

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH, ROWS, LAYERS = 4096, (1, 16, 512, 8192), 8
"""D of the 7B, tokens of a pass, and layers of a graph."""
QUICK = 64, (1, 20), 2
EMULATED = (1, 16)


def layers(width: int, count: int) -> tuple[list[FP8Linear], list[nn.Linear]]:
    """FP8 and bfloat16 layers of the same weights, from D to 3D."""
    with torch.device(DEVICE):
        fp8 = [FP8Linear(width, 3 * width).bfloat16() for _ in range(count)]
        plain = [nn.Linear(width, 3 * width, bias=False, dtype=torch.bfloat16) for _ in range(count)]
    for one, other in zip(fp8, plain, strict=True):
        one.init_weights()
        one.mode = "exact"
        other.weight.data = one.weight.data
    return fp8, plain


@torch.inference_mode()
def compare(log: Log, width: int, rows: int, count: int, bandwidth: float, flops: float) -> None:
    """Both at one number of rows."""
    with torch.inference_mode(False), torch.no_grad():
        fp8, plain = layers(width, count)
    x = torch.randn(rows, width, device=DEVICE).bfloat16()
    require_equal("rounded to bfloat16 or to e4m3", fp8[0](x), plain[0](x), 0.1)
    for name, sides, size, rate in (("FP8", fp8, 1, 2 * flops), ("bfloat16", plain, 2, flops)):
        moved = 3 * width * width * size + rows * 4 * width * 2
        bound = max(moved / bandwidth, 2 * rows * 3 * width * width / rate)
        seconds = graph_times([partial(layer, x) for layer in sides], DEVICE, 20 if DEVICE.type == "cuda" else 1)
        log.figure(seconds, bound, what="projection", name=name, rows=rows, width=width)


@torch.inference_mode()
def emulate(log: Log, width: int, rows: int) -> None:
    """The emulation, which on Hopper must equal the tensor cores in every bit; its bound is one float32 pass."""
    one = torch.ones((), device=DEVICE)
    xq, wq = (quantize_fp8(torch.randn(n, width, device=DEVICE), one) for n in (rows, 3 * width))
    if is_hopper(DEVICE) and rows % 16 == 0:
        quantized = Quantized(wq, one, one)
        require_equal("emulation", accumulate(xq, wq), fp8_product(xq, quantized, torch.float32), 0)
    seconds = call_times(partial(accumulate, xq, wq), DEVICE, 3, warmup=1)
    terms = rows * 3 * width * width
    log.figure(seconds, seconds.median, what="emulation", name=f"{seconds.median / terms * 1e9:.4f} ns per product",
               rows=rows, width=width)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options = Log.options(parser).parse_args(argv)
    torch.manual_seed(0)
    width, rows, count = QUICK if options.quick else (WIDTH, ROWS, LAYERS)
    log = Log(options, "fp8", DEVICE)
    bandwidth = measure_bandwidth(DEVICE).median
    flops = measure_flops(DEVICE, torch.bfloat16 if DEVICE.type == "cuda" else torch.float32).median
    log.note(device=log.device, copy_gb_per_second=bandwidth / 1e9, tflops=flops / 1e12)
    for n in EMULATED:
        emulate(log, width, n)
    for n in rows:
        compare(log, width, n, count, bandwidth, flops)
        release()


if __name__ == "__main__":
    main()
