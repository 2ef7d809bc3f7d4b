"""The fused Hyena operator on one GPU: is it right, how far is it from its memory floor, which tiling wins.

    PYTHONPATH=src python3 benchmarks/hyena_op_gpu.py --out op.json

Checks every kernel against the plain operator in float64 first and stops if one is wrong. Then, against floors from
the copy bandwidth measured in the same run: the forward of all tilings and of the plain methods, forward and backward,
and the step of one token. Prints a table, writes everything as JSON. About two minutes on an H100.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyaena.ops import HyenaState, ModalFilter, hyena
from hyaena.ops.triton.hyena import launch
from hyaena.ops.triton.hyena.launch import BackwardTiling, Tiling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, MODES, TAPS = 4096, 2, 3
LENGTHS = (8192, 32_768, 131_072)

TILINGS = {
    "default": Tiling(),
    "groups of 2": Tiling(group=2),
    "2 stages": Tiling(stages=2),
    "4 stages": Tiling(stages=4),
    "L 8": Tiling(steps=8),
    "one channel a lane": Tiling(segments=8, packed=False),
    "64 channels, 2 parts": Tiling(channels=64, segments=8, parts=2),
}

BACKWARD = {
    "chunks 64": BackwardTiling(),
    "chunks 32": BackwardTiling(chunk=32),
    "chunks 128": BackwardTiling(chunk=128),
    "64 lanes": BackwardTiling(lanes=64),
    "64 lanes, batch 2": BackwardTiling(lanes=64, batch=2),
    "256 lanes": BackwardTiling(lanes=256),
}


def inputs(batch: int, length: int, width: int, modes: int, taps: int, dtype: torch.dtype, *, state: bool = False):
    """Random arguments of the operator, drawn afresh; poles up to the unit circle."""
    size = 1 - torch.rand(width, modes, device=DEVICE) ** 4 * 0.9
    poles = torch.polar(size, torch.rand(width, modes, device=DEVICE) * 3)
    residues = torch.randn(width, modes, dtype=torch.complex64, device=DEVICE) * (1 - size + 1e-3).sqrt()
    z = torch.randn(batch, length, 3 * width, device=DEVICE, dtype=dtype)
    weight = torch.randn(3 * width, taps, device=DEVICE, dtype=dtype)
    bias = torch.randn(3 * width, device=DEVICE, dtype=dtype)
    filter = ModalFilter(poles, residues, torch.randn(width, device=DEVICE))
    past = None
    if state:
        fir = torch.randn(batch, 3 * width, taps - 1, device=DEVICE, dtype=dtype)
        past = HyenaState(fir, torch.randn(batch, width, modes, dtype=torch.complex64, device=DEVICE))
    return z, weight, bias, filter, past


def fused(z: Tensor, weight: Tensor, bias: Tensor, filter: ModalFilter, past: HyenaState | None = None,
          mask: Tensor | None = None, tiling: Tiling | None = None) -> tuple[Tensor, HyenaState]:  # fmt: skip
    """The forward kernel in a given tiling."""
    poles, residues = torch.view_as_real(filter.poles), torch.view_as_real(filter.residues)
    fir, iir = (None, None) if past is None else (past.short, torch.view_as_real(past.long))
    y, fir, iir = launch.forward(z, weight, bias, poles, residues, filter.skip, fir, iir, mask, tiling)
    return y, HyenaState(fir, torch.view_as_complex(iir))


def exact(z: Tensor, weight: Tensor, bias: Tensor, filter: ModalFilter, past: HyenaState | None = None,
          mask: Tensor | None = None) -> tuple[Tensor, HyenaState]:  # fmt: skip
    """The plain operator in float64."""
    wide = ModalFilter(filter.poles.to(torch.complex128), filter.residues.to(torch.complex128), filter.skip.double())
    past = past and HyenaState(past.short.double(), past.long.to(torch.complex128))
    return hyena(z.double(), weight.double(), bias.double(), wide, past, mask=mask, method="blocked")


def distance(value: Tensor, expected: Tensor) -> float:
    """‖value - expected‖ / ‖expected‖; NaN counts as infinite."""
    if expected.numel() == 0:
        return 0.0
    error = float((value.to(expected.dtype) - expected).norm() / expected.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def leaves(args: tuple[Any, ...], past: HyenaState | None) -> list[Tensor]:
    """Everything that has a gradient: z, weight, bias, poles, residues, skip, and the states as real pairs."""
    z, weight, bias, filter = args
    found = [z, weight, bias, torch.view_as_real(filter.poles), torch.view_as_real(filter.residues), filter.skip]
    return found if past is None else [*found, past.short, torch.view_as_real(past.long)]


def exact_gradients(dy: Tensor, dpast: HyenaState, args: tuple[Any, ...], past: HyenaState,
                    mask: Tensor | None) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the plain operator in float64."""
    wide = [t.double().requires_grad_() for t in leaves(args, past)]
    filter = ModalFilter(torch.view_as_complex(wide[3]), torch.view_as_complex(wide[4]), wide[5])
    y, state = exact(*wide[:3], filter, HyenaState(wide[6], torch.view_as_complex(wide[7])), mask)
    loss = (y * dy).sum() + (state.short * dpast.short).sum()
    loss = loss + (torch.view_as_real(state.long) * torch.view_as_real(dpast.long)).sum()
    return torch.autograd.grad(loss, wide)


LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Output rounding of the narrow types (half an ulp and some); float32 sums over up to 10^5 steps."""

Case = tuple[int, int, int, int, int, torch.dtype, bool, bool]

CASES: list[Case] = [
    # batch, length, width, modes, taps, dtype, state, padding
    (1, 1, 64, 2, 3, torch.float32, True, False),
    (2, 2, 33, 1, 1, torch.float32, True, False),
    (2, 3, 64, 2, 8, torch.float32, True, False),
    (3, 63, 100, 2, 3, torch.float32, True, True),
    (2, 1000, 4096, 2, 3, torch.bfloat16, True, True),
    (2, 1025, 768, 2, 3, torch.float16, True, False),
    (1, 5000, 256, 4, 4, torch.float32, True, False),
    (2, 3001, 128, 8, 3, torch.bfloat16, True, True),
    (1, 2049, 96, 16, 3, torch.float32, True, True),
    (1, 131_072, 64, 2, 3, torch.float32, False, False),
    (1, 20_000, 4096, 2, 3, torch.bfloat16, False, False),
]


def padding(batch: int, length: int, padded: bool) -> Tensor | None:
    """A random padding mask on the left, or none."""
    if not padded:
        return None
    return torch.arange(length, device=DEVICE) >= torch.randint(0, length, (batch, 1), device=DEVICE)


def compare(name: str, got: tuple[Tensor, HyenaState], expected: tuple[Tensor, HyenaState]) -> dict[str, Any]:
    """The errors of y and both states, within their limits.

    Raises:
        ValueError: one is not.
    """
    pairs = zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True)
    errors = [distance(value, want) for value, want in pairs]
    return within(name, errors, [LIMITS[got[0].dtype], LIMITS[got[1].short.dtype], LIMITS[torch.float32]])


def within(name: str, errors: list[float], limits: list[float]) -> dict[str, Any]:
    """The errors of a case, printed and held to their limits."""
    print(f"  {name:<70} {' '.join(f'{error:.1e}' for error in errors)}", flush=True)
    if any(not error <= limit for error, limit in zip(errors, limits, strict=True)):
        raise ValueError(f"wrong: {name}: {errors} against {limits}")
    return {"case": name, "errors": errors}


def check_forward(case: Case) -> list[dict[str, Any]]:
    """A case, and the same cut in two."""
    batch, length, width, modes, taps, dtype, state, padded = case
    args = inputs(batch, length, width, modes, taps, dtype, state=state)
    mask = padding(batch, length, padded)
    name = f"B{batch} T{length} D{width} N{modes} K{taps} {str(dtype)[6:]}{' padded' * padded}"
    expected = exact(*args, mask)
    rows = [compare(name, fused(*args, mask), expected)]
    if length > 100:
        cut = length // 3
        first, past = fused(args[0][:, :cut], *args[1:], None if mask is None else mask[:, :cut])
        rest, last = fused(args[0][:, cut:], *args[1:4], past, None if mask is None else mask[:, cut:])
        rows.append(compare(name + ", split", (torch.cat([first, rest], dim=1), last), expected))
    return rows


def check_backward(case: Case) -> list[dict[str, Any]]:
    """Every gradient of a case, in every tiling where they apply."""
    batch, length, width, modes, taps, dtype, _, padded = case
    if length > 10_000:
        return []
    *args, past = inputs(batch, length, width, modes, taps, dtype, state=True)
    assert past is not None
    dy = torch.randn(batch, length, width, device=DEVICE, dtype=dtype)
    dpast = HyenaState(torch.randn_like(past.short), torch.randn_like(past.long))
    mask = padding(batch, length, padded)
    expected = exact_gradients(dy, dpast, tuple(args), past, mask)
    rows = []
    for tiled, tiling in (BACKWARD if (modes, width) == (2, 4096) else {"": None}).items():
        given = (dy, dpast.short, torch.view_as_real(dpast.long), *leaves(tuple(args), past), mask)
        got = launch.backward(*given, tiling)
        errors = [distance(value, want) for value, want in zip(got, expected, strict=True)]
        name = f"backward B{batch} T{length} D{width} N{modes} K{taps} {str(dtype)[6:]}{' padded' * padded} {tiled}"
        rows.append(within(name, errors, [LIMITS[dtype]] + [5e-5] * 7))  # parameters sum over T once more than y does
    return rows


def check_tilings(_: object) -> list[dict[str, Any]]:
    """Every tiling of the forward, and the step."""
    args = inputs(1, 20_000, WIDTH, MODES, TAPS, torch.bfloat16, state=True)
    expected = exact(*args)
    rows = [compare(name, fused(*args, None, tiling), expected) for name, tiling in TILINGS.items()]
    for batch in (1, 5):
        z, weight, bias, filter, past = inputs(batch, 1, WIDTH, MODES, TAPS, torch.bfloat16, state=True)
        expected = exact(z, weight, bias, filter, past)
        assert past is not None
        poles, residues = torch.view_as_real(filter.poles), torch.view_as_real(filter.residues)
        pairs = torch.view_as_real(past.long)
        y = launch.step(z, weight, bias, poles, residues, filter.skip, past.short, pairs, past.short, pairs)
        rows.append(compare(f"step in place, B{batch}", (y, past), expected))
    return rows


def check(pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """Every case, every tiling where it applies, the splitting law and the step; raises at the first that is wrong.

    Each in a process of its own, since most of the time is compilation.
    """
    work = [pool.submit(function, case) for case in CASES[::-1] for function in (check_forward, check_backward)]
    work.append(pool.submit(check_tilings, None))
    return [row for part in work for row in part.result()]


def median_ms(run: Callable[[], Any], budget: float = 0.25, most: int = 50) -> tuple[float, float]:
    """Median and spread (largest - smallest of the middle half) of the device time of a call, milliseconds."""
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    count = int(min(most, max(3, budget / max(time.perf_counter() - begin, 1e-6))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, stop in events:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(stop) for start, stop in events)
    return statistics.median(times), times[(3 * count) // 4] - times[count // 4]


def captured_ms(run: Callable[[], Any], count: int = 20) -> tuple[float, float]:
    """The same of one of ``count`` calls captured in one graph: no launch gaps."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            run()
    ms, spread = median_ms(graph.replay)
    return ms / count, spread / count


def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy of 2 GB, read and written bytes counted."""
    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    ms, _ = median_ms(lambda: target.copy_(source))
    return 2 * source.numel() / ms * 1e3


def compile_one(tiling: Tiling | BackwardTiling) -> None:
    """Compile one tiling, in a process of its own, into Triton's cache on disk."""
    if isinstance(tiling, BackwardTiling):
        *args, past = inputs(1, 100, WIDTH, MODES, TAPS, torch.bfloat16)
        dy = torch.randn(1, 100, WIDTH, device=DEVICE, dtype=torch.bfloat16)
        launch.backward(dy, None, None, *leaves(tuple(args), past), None, None, None, tiling)
        torch.cuda.synchronize()
        return
    cut = tiling
    fused(*inputs(1, 2 * cut.segments * cut.steps + 1, WIDTH, MODES, TAPS, torch.bfloat16), None, cut)
    torch.cuda.synchronize()


def main() -> None:
    """Check, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where to write the JSON")
    parser.add_argument("--check-only", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    started = time.perf_counter()
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "shape": {"B": 1, "D": WIDTH, "N": MODES, "K": TAPS, "dtype": "bfloat16"},
        "rows": [],
    }

    def save() -> None:
        arguments.out.write_text(json.dumps(report, indent=1, default=str))

    with ProcessPoolExecutor(12, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, [*TILINGS.values(), *BACKWARD.values()]))
        print(f"compiled after {time.perf_counter() - started:.0f} s", flush=True)
        try:
            report["checks"] = check(pool)
        except ValueError as error:
            raise SystemExit(str(error)) from None
    save()
    print(f"checked after {time.perf_counter() - started:.0f} s", flush=True)
    if arguments.check_only:
        return

    bandwidth = copy_bandwidth()
    report["copy_bytes_per_second"] = bandwidth
    print(f"{report['gpu']}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s", flush=True)

    def record(floor: float, ms: float, spread: float, **what: Any) -> None:
        report["rows"].append({**what, "ms": ms, "spread_ms": spread, "floor_ms": floor})
        label = " ".join(f"{value:>9,}" if isinstance(value, int) else f"{value:<34}" for value in what.values())
        print(f"  {label} {ms:10.4f} ms ± {spread:.4f}   {ms / floor:7.2f} x floor", flush=True)
        save()

    for length in LENGTHS:
        floor = 4 * WIDTH * length * 2 / bandwidth * 1e3
        args = inputs(1, length, WIDTH, MODES, TAPS, torch.bfloat16)
        times: dict[str, float] = {}
        runs: dict[str, Callable[[], Any]] = {n: partial(fused, *args, None, t) for n, t in TILINGS.items()}
        runs |= {method: partial(hyena, *args, method=method) for method in ("blocked", "fft")}
        for name, run in runs.items():
            try:
                times[name], spread = median_ms(run)
                record(floor, times[name], spread, what="forward", T=length, name=name)
            except torch.cuda.OutOfMemoryError:
                print(f"  {name} at {length}: out of memory", flush=True)
            torch.cuda.empty_cache()
        best = min(TILINGS, key=lambda name: times.get(name, float("inf")))
        print(f"    best: {best}; fft / best = {times.get('fft', float('nan')) / times[best]:.1f}", flush=True)

    length = LENGTHS[1]
    *args, _ = inputs(1, length, WIDTH, MODES, TAPS, torch.bfloat16)
    dy = torch.randn(1, length, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    floor = 7 * WIDTH * length * 2 / bandwidth * 1e3
    for name, tiling in BACKWARD.items():
        run = partial(launch.backward, dy, None, None, *leaves(tuple(args), None), None, None, None, tiling)
        record(floor, *median_ms(run), what="backward", T=length, name=name)
    wanting = [t.detach().requires_grad_() for t in leaves(tuple(args), None)]

    def train(choice: dict[str, str]) -> tuple[Tensor, ...]:
        filter = ModalFilter(torch.view_as_complex(wanting[3]), torch.view_as_complex(wanting[4]), wanting[5])
        y, _ = hyena(*wanting[:3], filter, **choice)
        return torch.autograd.grad(y, wanting, dy)

    times = {}
    for method in ("triton", "blocked", "fft"):
        choice = {"backend": method} if method == "triton" else {"method": method}
        times[method], spread = median_ms(partial(train, choice))
        record(floor * 11 / 7, times[method], spread, what="both", T=length, name=method)
    print(f"    fft / triton = {times['fft'] / times['triton']:.1f}", flush=True)
    torch.cuda.empty_cache()

    for batch in (1, 64):
        z, weight, bias, filter, past = inputs(batch, 1, WIDTH, MODES, TAPS, torch.bfloat16, state=True)
        assert past is not None and filter.skip is not None
        poles, residues = torch.view_as_real(filter.poles), torch.view_as_real(filter.residues)
        states = (past.short, torch.view_as_real(past.long))
        constants = (weight, bias, poles, residues, filter.skip)
        moved = z.nbytes * 4 // 3 + 2 * sum(t.nbytes for t in states) + sum(t.nbytes for t in constants)
        runs = {
            "step kernel": partial(launch.step, z, *constants, *states, *states),
            "recurrence": partial(hyena, z, weight, bias, filter, past, method="recurrence"),
        }
        for name, run in runs.items():
            ms, spread = captured_ms(run)
            record(moved / bandwidth * 1e3, ms, spread, what="step", B=batch, name=name)
    report["seconds"] = time.perf_counter() - started
    save()
    print(f"done after {report['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
