"""Run benchmarks and report: ``python -m benchmarks.run [names…] [--skip NAME] [--list] [--quick] [--json]``.

A full run writes ``benchmarks/results/cpu.md`` and ``cpu.json``. A quick one uses tiny sizes, shows that the benchmarks
work, and writes nothing unless ``--output`` names a folder.

Exit status: 0 whatever the ratios are, 1 when a benchmark failed or its two sides disagreed, 2 for a mistake in the
arguments.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.registry import Benchmark, Row, select


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Measure hyaena against its bars.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all; see --list)")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="leave one out; may be repeated")
    parser.add_argument("--list", action="store_true", help="show the benchmarks and stop")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it work, not how fast is it")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the page goes (benchmarks/results)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked for; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error("--threads takes a whole number of at least 1")
    try:
        chosen = select(args.names, args.skip)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        for benchmark in chosen:
            print(f"{benchmark.name:15} {benchmark.minutes:4g} min  {benchmark.summary}")
        return 0

    import torch

    from benchmarks import machine, predictions, report
    from benchmarks.models import STRIPED

    torch.set_num_threads(args.threads)
    occasion = machine.occasion(shlex.join(["python", "-m", "benchmarks.run", *argv]), args.threads)
    rows: list[Row] = []
    fresh: dict[str, Any] = {}
    facts = machine.machine()
    folder = args.output or (None if args.quick else report.RESULTS)
    page = None
    for benchmark in chosen:
        print(f"{benchmark.name}: {benchmark.summary} …", file=sys.stderr, flush=True)
        began = time.perf_counter()
        found, error = attempt(benchmark, args.quick)
        seconds = time.perf_counter() - began
        print(f"  {error or 'done'} ({seconds:.0f} s)", file=sys.stderr, flush=True)
        rows += found
        fresh[benchmark.name] = report.entry(occasion, seconds, found, error)
        if folder is not None:  # after each, so that a run that is cut short keeps what it measured
            page = report.write(folder, facts, fresh, predictions.page(STRIPED))

    if args.json:
        print(json.dumps({"machine": facts, "benchmarks": fresh}, indent=1, ensure_ascii=False))
    else:
        print(report.text_table(rows))
    if args.quick:
        print("Tiny sizes: these ratios say nothing about speed.", file=sys.stderr)
    if page is not None:
        print(f"Written: {page}", file=sys.stderr)
    return 1 if any(part["error"] for part in fresh.values()) else 0


def attempt(benchmark: Benchmark, quick: bool) -> tuple[list[Row], str]:
    """The rows of a benchmark, or why there are none; one that fails does not take the others with it."""
    try:
        return benchmark.load()(quick), ""
    except Exception as error:
        return [], f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    sys.exit(main())
