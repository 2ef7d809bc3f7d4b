"""The table for a terminal, and the page and the JSON of a suite in ``benchmarks/results/``.

The JSON is a list of parts, one per benchmark and device, each with the machine, date, command and commit of its own
latest run. So a benchmark can be taken again without the others, and the figures of one device stay when another one
is measured: the page has a table for each machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.registry import Row, Suite, Summary, Target, load
from hyaena.bench.tables import markdown_table, text_table
from hyaena.files import write_atomically

RESULTS = Path(__file__).resolve().parent / "results"
RELATIONS = {">=": "≥", "<=": "≤", ">": ">"}
HEADER = ("what", "ours", "baseline or bound", "ratio", "target", "met")

Part = dict[str, Any]
"""A benchmark's latest run on a device: name, machine, occasion, seconds, errors, rows."""


def quantity(value: float, unit: str) -> str:
    """A value with its unit."""
    if unit == "s":
        return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"
    return f"{value:.0f} {unit}" if unit in ("modules", "MB") or value >= 100 else f"{value:.3g} {unit}"


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table, in the order of ``HEADER``."""
    baseline = f"{quantity(row.baseline.median, row.unit)} ({row.baseline_name})" if row.baseline else "–"
    ratio = target = "–"
    if row.ratio is not None:
        ratio = f"{row.ratio.median:.2f} [{row.ratio.min:.2f} … {row.ratio.max:.2f}] {row.ratio_name}"
    if row.target is not None:
        target = f"{RELATIONS[row.target.relation]} {row.target.value:g}" + ("" if row.ratio else f" {row.unit}")
    met = {None: "–", True: "yes", False: "NO"}[row.met]
    return row.what, quantity(row.ours.median, row.unit), baseline, ratio, target, met


def table(rows: Iterable[Row]) -> str:
    """The table of some rows for a terminal."""
    return text_table(HEADER, map(cells, rows))


# --- parts -----------------------------------------------------------------------------------------------------------


def part(
    name: str,
    machine: Mapping[str, str],
    occasion: Mapping[str, str],
    seconds: float,
    rows: Sequence[Row],
    errors: Sequence[str],
) -> Part:
    """A benchmark's part of the JSON."""
    return {
        "name": name,
        "machine": dict(machine),
        "occasion": dict(occasion),
        "seconds": round(seconds, 1),
        "errors": list(errors),
        "rows": [{**asdict(row), "met": row.met} for row in rows],
    }


def rows_of(part: Part) -> list[Row]:
    """The rows of a part."""
    rows = []
    for stored in part["rows"]:
        values = {name: value for name, value in stored.items() if name != "met"}
        for name in ("ours", "baseline", "ratio"):
            values[name] = None if values[name] is None else Summary(**values[name])
        values["target"] = None if values["target"] is None else Target(**values["target"])
        rows.append(Row(**values))
    return rows


def merge(suite: Suite, stored: Sequence[Part], fresh: Sequence[Part]) -> list[Part]:
    """What is known, newest machine first; a fresh part replaces that of its benchmark on the same device.

    One that measured nothing leaves the older figures, and adds why there are no newer ones.
    """
    old = {(p["name"], p["machine"]["device"]): p for p in stored}
    new = {(p["name"], p["machine"]["device"]): p for p in fresh}
    for key, p in new.items():
        if key in old and old[key]["rows"] and not p["rows"]:
            errors = [f"at commit {p['occasion']['commit']}: {error}" for error in p["errors"]]
            new[key] = {**old[key], "errors": [*old[key]["errors"], *errors]}
    order = {benchmark.name: i for i, benchmark in enumerate(suite.benchmarks)}
    known = sorted((p for p in {**old, **new}.values() if p["name"] in order), key=lambda p: order[p["name"]])
    machines = _machines(known)
    return [p for machine in machines for p in known if p["machine"] == machine]


def _machines(known: Sequence[Part]) -> list[dict[str, str]]:
    """The machines of some parts, the latest measured first."""
    latest: dict[str, tuple[str, dict[str, str]]] = {}
    for p in known:
        key = json.dumps(p["machine"], sort_keys=True)
        latest[key] = max(latest.get(key, ("", {})), (p["occasion"]["date"], p["machine"]), key=lambda pair: pair[0])
    return [machine for _, machine in sorted(latest.values(), key=lambda pair: pair[0], reverse=True)]


# --- the page --------------------------------------------------------------------------------------------------------


def page(suite: Suite, known: Sequence[Part]) -> str:
    """The whole page, as Markdown."""
    measured = {p["name"] for p in known}
    missing = [f"- `{b.name}` has not been measured: {b.summary}" for b in suite.benchmarks if b.name not in measured]
    sections = [f"# {suite.title}", suite.method, "\n".join(missing)]
    for machine in _machines(known):
        sections += _machine(machine, [p for p in known if p["machine"] == machine])
    if suite.appendix:
        sections.append(load(suite.appendix)())
    return "\n\n".join(section.strip() for section in sections if section.strip()) + "\n"


def _machine(machine: Mapping[str, str], parts: Sequence[Part]) -> list[str]:
    """The table of one machine, and each of its runs."""
    errors = [f"- `{p['name']}` is not complete: {error}" for p in parts for error in p["errors"]]
    return [
        f"## {machine['device']}",
        markdown_table(HEADER, (cells(row) for p in parts for row in rows_of(p))),
        "\n".join(errors),
        "; ".join(f"{name} {value}" for name, value in machine.items() if name != "device") + ".",
        *map(_run, parts),
    ]


def _run(part: Part) -> str:
    """One run: when and how, the spread of each row, and the notes."""
    o, rows = part["occasion"], rows_of(part)
    lines = [
        f"### {part['name']}, {part['machine']['device']}",
        f"{o['date']}, commit {o['commit']}, {o['threads']} torch threads, load before {o['load before']}, "
        f"took {part['seconds']:.0f} s: `{o['command']}`",
        _spreads(rows) if rows else "",
        *(f"{_title(row)}: {row.note}" for row in rows if row.note),
    ]
    return "\n\n".join(line for line in lines if line)


def _title(row: Row) -> str:
    return row.what + (f", against {row.baseline_name}" if row.baseline_name else "")


def _spreads(rows: Iterable[Row]) -> str:
    """Lowest, median and highest of both sides of each row."""
    lines = [
        (row.what, side, *(quantity(v, row.unit) for v in (s.min, s.median, s.max)), str(s.count))
        for row in rows
        for side, s in (("ours", row.ours), (row.baseline_name, row.baseline))
        if s is not None
    ]
    return markdown_table(("what", "side", "lowest", "median", "highest", "runs"), dict.fromkeys(lines))


# --- files -----------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Part]:
    """The parts in a JSON file; none where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def write(folder: Path, suite: Suite, fresh: Sequence[Part]) -> Path:
    """Update the suite's JSON and page in a folder, each in one step or not at all; return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    data, text = folder / f"{suite.name}.json", folder / f"{suite.name}.md"
    known = merge(suite, read(data), fresh)
    document = json.dumps(known, indent=1, ensure_ascii=False) + "\n"
    for path, content in ((data, document), (text, page(suite, known))):
        write_atomically(path, lambda file, content=content: file.write(content.encode()))
    return text
