"""The table for people, the page and the JSON in ``benchmarks/results/``.

Every benchmark keeps the date, command and commit of its own latest run, so that one can be taken again without the
others. Runs on another machine or with other versions begin a new page: figures of two machines never share a table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.registry import BENCHMARKS, Bar, Row, Spread

RESULTS = Path(__file__).resolve().parent / "results"
NOTES = Path(__file__).resolve().parent / "notes.md"

RELATIONS = {">=": "≥", "<=": "≤", ">": ">"}
HEADER = ("what", "ours", "peer or floor", "ratio", "bar", "met")


def quantity(spread: Spread, unit: str) -> str:
    """A median with its unit."""
    value = spread.median
    if unit == "s":
        return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"
    return f"{value:.0f} {unit}" if unit in ("modules", "MB") or value >= 100 else f"{value:.3g} {unit}"


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table, in the order of ``HEADER``."""
    peer = f"{quantity(row.peer, row.unit)} ({row.peer_name})" if row.peer else "–"
    ratio = "–"
    if row.ratio is not None:
        ratio = f"{row.ratio.median:.2f} [{row.ratio.min:.2f} … {row.ratio.max:.2f}] {row.ratio_name}"
    bar = "–"
    if row.bar is not None:
        bar = bar_text(row.bar) + ("" if row.ratio else f" {row.unit}")
    met = {None: "–", True: "yes", False: "NO"}[row.met]
    return row.what, quantity(row.ours, row.unit), peer, ratio, bar, met


def bar_text(bar: Bar) -> str:
    """A bar, as short as it can be."""
    return f"{RELATIONS[bar.relation]} {bar.value:g}"


def text_table(rows: Iterable[Row]) -> str:
    """The table of some rows for a terminal."""
    return aligned(map(cells, rows))


def aligned(lines: Iterable[Sequence[str]]) -> str:
    """Lines of the table for a terminal."""
    lines = [HEADER, *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table, as Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def merge(stored: dict[str, Any], machine: Mapping[str, str], fresh: Mapping[str, Any]) -> dict[str, Any]:
    """What is known, with the benchmarks of this run replaced; nothing is kept from another machine or version."""
    kept = stored.get("benchmarks", {}) if stored.get("machine") == dict(machine) else {}
    known = {**kept, **fresh}
    return {"machine": dict(machine), "benchmarks": {b.name: known[b.name] for b in BENCHMARKS if b.name in known}}


def entry(occasion: Mapping[str, str], seconds: float, rows: Sequence[Row], error: str) -> dict[str, Any]:
    """A benchmark's part of the JSON."""
    lines = [{**asdict(row), "met": row.met} for row in rows]
    return {"occasion": dict(occasion), "seconds": round(seconds, 1), "error": error, "rows": lines}


def rows_of(stored: Mapping[str, Any]) -> list[Row]:
    """The rows of a benchmark's part of the JSON."""
    rows = []
    for values in stored["rows"]:
        values = {name: value for name, value in values.items() if name != "met"}
        for name in ("ours", "peer", "ratio"):
            values[name] = None if values[name] is None else Spread(**values[name])
        values["bar"] = None if values["bar"] is None else Bar(**values["bar"])
        rows.append(Row(**values))
    return rows


def page(known: Mapping[str, Any], predictions: str, notes: str) -> str:
    """The whole page, as Markdown."""
    parts = known["benchmarks"]
    lines = [cells(row) for part in parts.values() for row in rows_of(part)]
    failed = [f"- `{name}` did not finish: {part['error']}" for name, part in parts.items() if part["error"]]
    missing = [f"- `{b.name}` has not been run here: {b.summary}" for b in BENCHMARKS if b.name not in parts]
    sections = [
        "# What hyaena reaches on a CPU",
        "Written by `make bench` (`python -m benchmarks.run`); do not edit. Both sides of a row run in turns in one "
        "process (memory: in fresh processes); figures are medians, a ratio is the median of the pairwise ratios with "
        "[lowest … highest]. Before it is timed, each benchmark checks that both sides compute what they should.",
        markdown_table(HEADER, lines),
        "\n".join(failed + missing),
        "## Machine",
        markdown_table(("", ""), known["machine"].items()),
        "## Each run",
        *(_details(name, part) for name, part in parts.items()),
        "## Predictions",
        predictions,
        notes,
    ]
    return "\n\n".join(section.strip() for section in sections if section.strip()) + "\n"


def _details(name: str, part: Mapping[str, Any]) -> str:
    o = part["occasion"]
    lines = [
        f"### {name}",
        f"{o['date']}, commit {o['commit']}, {o['threads']} torch threads, load before {o['load before']}, "
        f"took {part['seconds']:.0f} s: `{o['command']}`",
    ]
    rows = rows_of(part)
    if rows:
        lines.append(spreads(rows))
    lines += [f"{row.what}: {row.note}" for row in rows if row.note]
    return "\n\n".join(lines)


def spreads(rows: Iterable[Row]) -> str:
    """Lowest, median and highest of both sides of each row, as Markdown."""
    lines = [
        (row.what, side, *(quantity(Spread(v, v, v, 1), row.unit) for v in (s.min, s.median, s.max)), str(s.count))
        for row in rows
        for side, s in (("ours", row.ours), (row.peer_name, row.peer))
        if s is not None
    ]
    return markdown_table(("what", "side", "lowest", "median", "highest", "runs"), lines)


def write(folder: Path, machine: Mapping[str, str], fresh: Mapping[str, Any], predictions: str) -> Path:
    """Bring ``cpu.json`` and ``cpu.md`` in a folder up to date, each at once or not at all; return the page's path."""
    data, text = folder / "cpu.json", folder / "cpu.md"
    stored = json.loads(data.read_text(encoding="utf-8")) if data.exists() else {}
    known = merge(stored, machine, fresh)
    folder.mkdir(parents=True, exist_ok=True)
    replace(data, json.dumps(known, indent=1, ensure_ascii=False) + "\n")
    replace(text, page(known, predictions, NOTES.read_text(encoding="utf-8")))
    return text


def replace(path: Path, content: str) -> None:
    """Write a text file at once or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)
