"""The tests of the kernels and of decoding on the GPU, run before anything is timed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.gpu import baseline
from benchmarks.gpu.session import GpuSession
from benchmarks.machine import ROOT
from benchmarks.registry import IncorrectError, Row, Step, Summary, Target

PATHS = (
    "tests/ops/triton",
    "tests/ops/test_fp8.py",
    "tests/decoding/test_short_passes.py",
    "tests/test_packed_prefill.py",
    "tests/test_cuda.py",
)
WORKERS = 12
"""Processes that run tests side by side, since most of the time is compilation."""
LIMIT = 200.0
"""Most seconds of them."""


def tests(session: GpuSession) -> Iterator[Step]:
    """One run of pytest; the baseline compiles beside it, because nothing is timed meanwhile."""

    def run() -> Iterator[Row]:
        rehearsal = None if session.quick else baseline.start("--rehearse")
        yield pytest(session)
        if rehearsal is not None:
            _, error = baseline.finish(rehearsal, session.left / 4)
            print(f"    the baseline compiles: {error or 'yes'}", file=sys.stderr, flush=True)

    yield Step(f"pytest {' '.join(PATHS)}", run)


def pytest(session: GpuSession) -> Row:
    """How many tests fail: none, or this raises. A quick run only collects them.

    Raises:
        IncorrectError: with the tests that failed.
        TimeoutError: they did not end in time, so that nothing is known.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--wide", *PATHS]
    if session.quick:
        command.append("--collect-only")
    elif importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(WORKERS)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(baseline.GRACE, min(LIMIT, session.left / 2))
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"the tests did not end within {error.timeout:.0f} s") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        failed = [line.removeprefix("FAILED ")[:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise IncorrectError("; ".join(failed[:5]) or (done.stderr.strip().splitlines() or lines)[-1])
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (\w+)", lines[-1])}
    return Row(
        what="tests of the kernels and of decoding that fail",
        unit="tests",
        ours=Summary.of([counts.get("failed", 0) + counts.get("errors", 0)]),
        target=Target("<=", 0),
        note=lines[-1].strip("= ") + ".",
    )
