"""Products of narrow weights with few rows against wide ones, on a CPU or a CUDA device.

    python -m benchmarks.kernels.narrow

Every kernel must first equal the widened weight's product. Then each format multiplies the same rows with several
matrices of the 7B's MLP in turn, so that weights come from memory; formats take turns, and the best of several rounds
counts. The ratio is to bfloat16 in the same run. ``--quick`` takes small sizes.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from hyaena import ops
from hyaena.ops import Dense, Linear, Narrow
from hyaena.ops.step import DecodeOperators
from hyaena.quant import round_weight
from hyaena.schemes import SCHEMES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def operators() -> DecodeOperators:
    """The kernels of the device."""
    if DEVICE.type == "cuda":
        from hyaena.ops.triton.decode.operators import FusedDecodeOperators

        return FusedDecodeOperators()
    from hyaena.ops.cpu.operators import CompiledOperators

    return CompiledOperators()


def seconds(step: DecodeOperators, x: Tensor, layers: list[Linear]) -> float:
    """Of one product, the mean over the layers."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for layer in layers:
        step.linear(x, layer)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / len(layers)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    outputs, inputs, count = (256, 512, 2) if arguments.quick else (14_336, 4096, 3)
    step = operators()
    wide = [torch.randn(outputs, inputs, device=DEVICE) / inputs**0.5 for _ in range(count)]
    formats: dict[str, list[Linear]] = {"float32": [Dense(w) for w in wide]}
    formats["bfloat16"] = [Dense(w.bfloat16()) for w in wide]
    for name, scheme in SCHEMES.items():
        formats[name] = [round_weight(w, scheme) for w in wide]
    for rows in (1, 4, 8):
        x = torch.randn(rows, inputs, device=DEVICE)
        for name, layers in formats.items():
            if isinstance(layer := layers[0], Narrow):
                exact = torch.nn.functional.linear(x.double(), ops.widen(layer, torch.float64))
                error = (step.linear(x.bfloat16(), layer).double() - exact).norm() / exact.norm()
                assert error < 0.01, (name, float(error))
        best = dict.fromkeys(formats, float("inf"))
        for _ in range(arguments.rounds):
            for name, layers in formats.items():
                given = x if name == "float32" else x.bfloat16()
                best[name] = min(best[name], seconds(step, given, layers))
        for name, layers in formats.items():
            stored = sum(t.nbytes for t in layers[0] if t is not None)  # type: ignore[union-attr]
            print(
                f"{rows} rows  {name:9} {best[name] * 1e6:9.0f} us  {stored / best[name] / 1e9:7.1f} GB/s  "
                f"{best['bfloat16'] / best[name]:5.2f} times bfloat16"
            )


if __name__ == "__main__":
    main()
