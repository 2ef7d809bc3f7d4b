"""What hyaena reaches on a GPU, all of it in one run of at most eight minutes.

    python -m benchmarks.gpu          in a clone; with PYTHONPATH=src where hyaena is not installed

Correctness first, then the machine's rates, the fused operator, prefill and decoding of the 7B's shape with random
weights, and the peer. Writes ``benchmarks/results/gpu.md`` and ``gpu.json`` after every phase; what could not be
measured is named there with its reason.

Exit status: 0 whatever the ratios are, 1 when something failed, 2 for a mistake in the arguments.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import gpu_page, gpu_sizes, machine, report
from benchmarks.registry import Row

if TYPE_CHECKING:
    from benchmarks.gpu_phases import Bench, Step

PHASES = ("checks", "rates", "operator", "prefill", "decode", "peer")
LIMIT = 460.0
"""Seconds after which nothing is begun: what is under way then ends within eight minutes."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measure hyaena on a GPU.")
    parser.add_argument("--only", nargs="+", choices=PHASES, metavar="PHASE", help=f"of {', '.join(PHASES)}")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="S", help=f"begin nothing after S ({LIMIT:.0f})")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on any device: does it work")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for the page (a full run: benchmarks/results)")
    parser.add_argument("--commit", help="what to call the code where git cannot tell")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    began = time.perf_counter()
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)

    import torch

    from benchmarks.gpu_phases import Bench, phases

    if not args.quick and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: run with --quick to see that it works")
    sizes = gpu_sizes.QUICK if args.quick else gpu_sizes.FULL
    occasion = machine.occasion(shlex.join(["python", "-m", "benchmarks.gpu", *argv]), torch.get_num_threads())
    if args.commit:
        occasion["commit"] = args.commit
    run = Run(Bench(sizes, args.quick, deadline=began + args.limit), args.limit, args.only or PHASES, occasion)
    folder = args.output or (None if args.quick or args.only else report.RESULTS)
    for phase, steps in phases(sizes).items():
        print(f"{phase} … ({time.perf_counter() - began:.0f} s)", flush=True)
        run.phase(phase, steps)
        if folder is not None:
            gpu_page.write(folder, run.known, run.bench.claims, run.rows)

    print("\n" + report.aligned(gpu_page.lines(run.bench.claims, run.rows)))
    for name, reason in run.known["missing"].items():
        print(f"not measured: {name}: {reason}")
    print(", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in run.known["seconds"].items()))
    if args.quick:
        print("Tiny sizes: these ratios say nothing about speed.", file=sys.stderr)
    if folder is not None:
        print(f"Written: {folder / 'gpu.md'}", file=sys.stderr)
    return 1 if run.failed or run.bench.wrong else 0


class Run:
    """What a run has found so far, and why the rest is missing."""

    def __init__(self, bench: Bench, limit: float, chosen: Sequence[str], occasion: dict[str, str]) -> None:
        self.bench = bench
        self.limit = limit
        self.chosen = chosen
        self.failed = False
        self.rows: dict[str, Row] = {}
        self.known: dict[str, Any] = {
            "machine": {**machine.gpu(), **machine.machine()},
            "occasion": occasion,
            "limit": limit,
            "seconds": {},
            "missing": dict.fromkeys(bench.claims, "the run ended before it"),
            "raw": bench.raw,
        }

    def phase(self, name: str, steps: Sequence[Step]) -> None:
        """Take every step of a phase that may be taken."""
        start = time.perf_counter()
        for step in steps:
            self._record({claim: "the step found nothing" for claim in step.claims} | self._take(name, step))
        self.known["seconds"][name] = round(time.perf_counter() - start, 1)

    def _take(self, phase: str, step: Step) -> dict[str, Row | str]:
        """What a step found; one that fails takes no other with it."""
        obstacle = self._obstacle(phase)
        if obstacle:
            return dict.fromkeys(step.claims, obstacle)
        self.bench.release()
        try:
            return dict(step.run(self.bench))
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        print(f"    failed: {reason}", flush=True)
        self.failed = True
        if phase == "checks":
            self.bench.wrong |= dict.fromkeys(PHASES, f"the checks did not end: {reason}")
        return dict.fromkeys(step.claims, reason)

    def _obstacle(self, phase: str) -> str:
        if phase not in self.chosen:
            return "left out of this run"
        if phase in self.bench.wrong:
            return self.bench.wrong[phase]
        return f"the limit of {self.limit:.0f} s was reached" if self.bench.left <= 0 else ""

    def _record(self, found: dict[str, Row | str]) -> None:
        for name, result in found.items():
            if isinstance(result, Row):
                self.rows[name] = result
                del self.known["missing"][name]
                print("    " + "  ".join(report.cells(result)), flush=True)
            else:
                self.known["missing"][name] = result


if __name__ == "__main__":
    sys.exit(main())
