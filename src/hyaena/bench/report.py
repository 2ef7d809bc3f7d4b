"""The result of ``hyaena bench`` as text and as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hyaena.bench import machine
from hyaena.bench.clock import Samples
from hyaena.bench.measure import Figure
from hyaena.bench.run import Result
from hyaena.bench.tables import text_table
from hyaena.sizes import ModelSizes


def as_dict(result: Result) -> dict[str, Any]:
    """Everything that is known, every sample included: for a JSON file."""
    prefills = [
        {
            "length": p.length,
            "chunk": p.chunk,
            "seconds": _samples(p.seconds),
            "tokens_per_second": p.tokens_per_second,
            "flops": p.work,
            **_bound(p, "flops_per_second"),
            "mfu": p.mfu,
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
            "bytes": d.work,
            **_bound(d, "bytes_per_second"),
            "mbu": d.mbu,
            "first_step_seconds": d.first_step,
        }
        for d in result.decodes
    ]
    return {
        "machine": machine.describe(result.device),
        "model": {
            "config": result.config.to_dict(),
            "parameters": ModelSizes(result.config).parameters,
            "dtype": _name(result.dtype),
            "cache_dtype": _name(result.cache_dtype),
        },
        "prefill": prefills,
        "decode": decodes,
    }


def _bound(figure: Figure, rate: str) -> dict[str, Any]:
    return {
        rate: _samples(figure.rates),
        "kernel": figure.kernel,
        "bound_seconds": figure.bounds.median,
        "doubt": figure.doubt or None,
    }


def _samples(samples: Samples) -> dict[str, Any]:
    return {"median": samples.median, "samples": list(samples.values)}


def render(result: Result) -> str:
    """The page for a terminal."""
    facts = machine.describe(result.device)
    lines = [
        f"{result.config.name}, {ModelSizes(result.config).parameters:,} parameters, {_dtypes(result)}",
        f"{facts['device']}, {facts['cores']} cores, torch {facts['torch']}",
    ]
    if result.prefills:
        rows = [
            (
                f"{p.length:,}",
                f"{p.seconds.median:.3f} s",
                _percent(p.seconds),
                f"{p.tokens_per_second:,.0f}",
                f"{p.rates.median / 1e12:,.3g} TFLOP/s",
                _share(p.mfu),
                "–" if p.peak_memory is None else f"{p.peak_memory / 1e9:.2f} GB",
            )
            for p in result.prefills
        ]
        header = ("prefill", "time", "spread", "tokens/s", "bound", "mfu", "peak memory")
        lines += ["", text_table(header, rows, right=True)]
        lines += _notes(
            "mfu", "model FLOPs utilisation", {row[0]: p for row, p in zip(rows, result.prefills, strict=True)}
        )
    if result.decodes:
        rows = [
            (
                f"{d.batch} × {d.context:,}",
                f"{d.seconds.median * 1e3:.2f} ms",
                _percent(d.seconds),
                f"{d.tokens_per_second:,.1f}",
                f"{d.rates.median / 1e9:,.3g} GB/s",
                _share(d.mbu),
                f"{d.first_step:.2f} s",
            )
            for d in result.decodes
        ]
        header = ("rows × context", "a step", "spread", "tokens/s", "bound", "mbu", "first step")
        lines += ["", text_table(header, rows, right=True)]
        lines += _notes(
            "mbu", "memory-bandwidth utilisation", {row[0]: d for row, d in zip(rows, result.decodes, strict=True)}
        )
        lines += [f"decoding: {', '.join(sorted({d.decoding for d in result.decodes}))}"]
    return "\n".join(lines)


def _notes(short: str, long: str, figures: Mapping[str, Figure]) -> list[str]:
    """What the share of the bound is, and why a line has none."""
    kernels = " or ".join(dict.fromkeys(figure.kernel for figure in figures.values()))
    notes = [f"{short}: {long}, of the rate of a {kernels}, measured in turns"]
    return notes + [f"no {short} for {name}: {figure.doubt}" for name, figure in figures.items() if figure.doubt]


def _share(share: float | None) -> str:
    return "?" if share is None else f"{share:.0%}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(result: Result) -> str:
    if result.cache_dtype == result.dtype:
        return _name(result.dtype)
    return f"{_name(result.dtype)}, keys and values in {_name(result.cache_dtype)}"


def _percent(samples: Samples) -> str:
    """Half of (largest - smallest) / median."""
    return f"±{samples.spread / 2:.1%}"
