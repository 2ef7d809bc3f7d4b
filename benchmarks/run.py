"""Run the benchmarks of a suite and report: the command line of ``python -m benchmarks.cpu`` and ``benchmarks.gpu``.

A full run writes the suite's page and JSON after every step, so that a run that is cut short keeps what it measured.
A quick one uses tiny sizes, shows that the benchmarks work, and writes nothing unless ``--output`` names a folder.

Exit status: 0 whatever the ratios are, 1 when something failed or was wrong, 2 for a mistake in the arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.registry import Benchmark, IncorrectError, MissingError, Row, Session, Step, Suite, load


def build_parser(suite: Suite) -> argparse.ArgumentParser:
    """The command line."""
    names = {"type": lambda text: [name for name in text.split(",") if name], "default": [], "metavar": "NAME,…"}
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{suite.name}", description=suite.title)
    parser.add_argument("--only", help="benchmarks to run (all; see --list)", **names)
    parser.add_argument("--skip", help="benchmarks to leave out", **names)
    parser.add_argument("--list", action="store_true", help="show the benchmarks and stop")
    parser.add_argument("--quick", action="store_true", help="tiny sizes on any device, to see that it works")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for the page and the JSON (benchmarks/results)")
    parser.add_argument("--merge", type=Path, metavar="FILE", help="add the JSON of another run to the page and stop")
    parser.add_argument("--limit", type=float, default=suite.limit, metavar="S", help="begin nothing after S seconds")
    parser.add_argument("--threads", type=int, default=suite.threads, metavar="N", help="torch threads")
    parser.add_argument("--commit", help="what to call the code where git cannot tell")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    return parser


def main(suite: Suite, argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks that the arguments name; returns the exit status."""
    began = time.perf_counter()
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(suite)
    args = parser.parse_args(argv)
    if args.threads is not None and args.threads < 1:
        parser.error("--threads takes a whole number of at least 1")
    try:
        chosen = suite.select(args.only, args.skip)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        for benchmark in chosen:
            print(f"{benchmark.name:15} {benchmark.minutes:4g} min  {benchmark.summary}")
        return 0

    import torch

    from benchmarks import report
    from benchmarks.machine import occasion
    from hyaena.bench.machine import describe

    if args.merge is not None:
        print(f"Written: {report.write(args.output or report.RESULTS, suite, report.read(args.merge))}")
        return 0
    if suite.cuda and not args.quick and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: run with --quick to see that it works")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    session: Session = load(suite.session)(quick=args.quick, deadline=began + args.limit)
    facts = describe(torch.device("cuda" if suite.cuda and torch.cuda.is_available() else "cpu"), suite.packages)
    # What a page tells does not depend on where it was written: a path would name somebody's folders.
    shown = [f"--only {','.join(args.only)}"] if args.only else []
    shown += [f"--skip {','.join(args.skip)}"] if args.skip else []
    shown += ["--quick"] if args.quick else []
    when = occasion(" ".join(["python", "-m", f"benchmarks.{suite.name}", *shown]), args.commit)
    folder = args.output or (None if args.quick else report.RESULTS)
    parts: list[report.Part] = []
    page, wrong = None, ""
    for benchmark in chosen:
        print(
            f"{benchmark.name}: {benchmark.summary} … ({time.perf_counter() - began:.0f} s)",
            file=sys.stderr,
            flush=True,
        )
        start = time.perf_counter()
        rows: list[Row] = []
        errors: list[str] = []
        parts.append({})
        for found in [wrong] if wrong else attempt(benchmark, session):
            if isinstance(found, MissingError):
                print(f"    skipped: {found}", file=sys.stderr, flush=True)
                continue
            if isinstance(found, Row):
                rows.append(found)
                print("    " + "  ".join(report.cells(found)), file=sys.stderr, flush=True)
            else:
                errors.append(found)
                print(f"    not measured: {found}", file=sys.stderr, flush=True)
            parts[-1] = report.part(benchmark.name, facts, when, time.perf_counter() - start, rows, errors)
            if folder is not None:
                page = report.write(folder, suite, [p for p in parts if p])
        if benchmark.required and any(IncorrectError.__name__ in error for error in errors):
            wrong = f"`{benchmark.name}` found something wrong, so that times would mean nothing"
    parts = [p for p in parts if p]

    if args.json:
        print(json.dumps(parts, indent=1, ensure_ascii=False))
    else:
        print(report.table(row for p in parts for row in report.rows_of(p)))
    for p in parts:
        for error in p["errors"]:
            print(f"{p['name']} is not complete: {error}", file=sys.stderr)
    if args.quick:
        print("Tiny sizes: these ratios say nothing about speed.", file=sys.stderr)
    if page is not None:
        print(f"Written: {page}", file=sys.stderr)
    return 1 if any(p["errors"] for p in parts) else 0


def attempt(benchmark: Benchmark, session: Session) -> Iterator[Row | str | MissingError]:
    """The rows of a benchmark as they are measured, and why others are missing; a step that fails ends itself only.

    One that lacks what it compares with yields that error alone: it is no failure, and the page stays as it is.
    """
    if session.left <= 0:
        yield "no time was left"
        return

    def caught(run: Callable[[], Iterator[Row | Step]]) -> Iterator[Row | Step | str | MissingError]:
        try:
            yield from run()
        except MissingError as error:
            yield error
        except Exception as error:
            yield f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"

    for found in caught(lambda: iter(benchmark.load()(session))):
        if not isinstance(found, Step):
            yield found
        elif session.left <= 0:
            yield f"{found.what}: no time was left"
        else:
            session.release()
            for row in caught(lambda step=found: iter(step.run())):
                yield row if isinstance(row, Row | MissingError) else f"{found.what}: {row}"
