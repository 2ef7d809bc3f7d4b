"""The result of a benchmark as text and as plain values."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import hyaena
from hyaena.bench.rates import Samples
from hyaena.bench.run import Result
from hyaena.sizes import ModelSizes


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on, and with which versions."""
    facts: dict[str, Any] = {"device": device_name(device), "python": platform.python_version()}
    facts |= {"torch": torch.__version__, "hyaena": hyaena.__version__, "system": platform.system()}
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
    else:
        facts["threads"] = torch.get_num_threads()
    return facts


def device_name(device: torch.device) -> str:
    """The name of a GPU or of the processor, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def as_dict(result: Result) -> dict[str, Any]:
    """Everything that is known, every sample included: for a JSON file."""
    bandwidth, flops = result.rates.bandwidth, result.rates.flops
    prefills = [
        {
            "length": p.length,
            "chunk": p.chunk,
            "seconds": _samples(p.seconds),
            "tokens_per_second": p.tokens_per_second,
            "flops": p.flops,
            "floor_seconds": p.flops / flops.median,
            "of_floor": p.of_floor(result.rates),
            "peak_memory_bytes": p.peak_memory,
        }
        for p in result.prefills
    ]
    decodes = [
        {
            "batch": d.batch,
            "context": d.context,
            "decoding": d.decoding,
            "seconds_per_step": _samples(d.seconds),
            "tokens_per_second": d.tokens_per_second,
            "bytes": d.bytes,
            "floor_seconds": d.bytes / bandwidth.median,
            "of_floor": d.of_floor(result.rates),
            "first_step_seconds": d.first_step,
        }
        for d in result.decodes
    ]
    return {
        "machine": machine(result.device),
        "model": {
            "config": result.config.to_dict(),
            "parameters": ModelSizes(result.config).parameters,
            "dtype": str(result.dtype).removeprefix("torch."),
        },
        "copy_bytes_per_second": _samples(bandwidth),
        "product_flops_per_second": _samples(flops),
        "prefill": prefills,
        "decode": decodes,
    }


def _samples(samples: Samples) -> dict[str, Any]:
    return {"median": samples.median, "samples": list(samples.values)}


def render(result: Result) -> str:
    """The page for a terminal."""
    bandwidth, flops = result.rates.bandwidth, result.rates.flops
    dtype = str(result.dtype).removeprefix("torch.")
    lines = [
        f"{result.config.name}, {ModelSizes(result.config).parameters:,} parameters, {dtype}",
        f"{device_name(result.device)}, torch {torch.__version__}",
        f"copies {bandwidth.median / 1e9:,.3g} GB/s {_percent(bandwidth)}, "
        f"multiplies {flops.median / 1e12:,.3g} TFLOP/s {_percent(flops)}",
    ]
    if result.prefills:
        rows = [
            (
                f"{p.length:,}",
                f"{p.seconds.median:.3f} s",
                _percent(p.seconds),
                f"{p.tokens_per_second:,.0f}",
                f"{p.of_floor(result.rates):.0%}",
                "–" if p.peak_memory is None else f"{p.peak_memory / 1e9:.2f} GB",
            )
            for p in result.prefills
        ]
        lines += ["", *_table(("prefill", "time", "spread", "tokens/s", "of the floor", "peak memory"), rows)]
    if result.decodes:
        rows = [
            (
                f"{d.batch} × {d.context:,}",
                f"{d.seconds.median * 1e3:.2f} ms",
                _percent(d.seconds),
                f"{d.tokens_per_second:,.1f}",
                f"{d.of_floor(result.rates):.0%}",
                f"{d.first_step:.2f} s",
            )
            for d in result.decodes
        ]
        lines += ["", *_table(("rows × context", "a step", "spread", "tokens/s", "of the floor", "first step"), rows)]
        lines += ["", f"decoding: {', '.join(sorted({d.decoding for d in result.decodes}))}"]
    return "\n".join(lines)


def _percent(samples: Samples) -> str:
    """(largest - smallest) / median, as short as that."""
    return f"±{samples.spread / 2:.1%}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [header, *rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
