"""A result as a picture: the rates that were reached, and the bound on each."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

from hyaena.bench.machine import device_name
from hyaena.bench.run import Result
from hyaena.errors import InputError
from hyaena.extras import require
from hyaena.files import write_atomically

INK, GRID = "#1f2933", "#d9dee3"
COLOURS = ("#b5532a", "#2f6f8f", "#6b7f2a", "#7a4f9a", "#a8842c", "#3d7a66")


def require_format(path: Path) -> str:
    """The format that a file's name asks for; called before anything is measured.

    Raises:
        UnsupportedError: matplotlib is not installed.
        InputError: it writes no such format.
    """
    require("matplotlib", extra="bench", purpose="the plot")
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    suffix = path.suffix.removeprefix(".").lower()
    if suffix not in known:
        given = f"ends in .{suffix}" if suffix else "has no ending"
        raise InputError(f"{path.name} {given}, and a plot is written as one of {', '.join(known)}: name it so")
    return suffix


def draw(result: Result, path: Path) -> None:
    """Write a picture: tokens per second of prefills over length, of decoding over context, each with its bound.

    Raises:
        InputError, UnsupportedError: see ``require_format``.
    """
    from matplotlib.figure import Figure

    kind = require_format(path)
    panels = []
    if result.prefills:
        panels.append(("prompt, tokens", {"prefill": _prefills(result)}))
    if result.decodes:
        panels.append(("context, tokens", _decodes(result)))
    figure = Figure(figsize=(1 + 4.6 * len(panels), 4.4), dpi=150, layout="constrained")
    for axis, (what, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axis, what, lines)
    dtype = str(result.dtype).removeprefix("torch.")
    title = f"{result.config.name}, {dtype}, on {device_name(result.device)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold", color=INK)
    write_atomically(path, lambda file: figure.savefig(file, format=kind))


class Point(NamedTuple):
    """Tokens read, tokens per second, and the share of the bound, or None where there is a doubt."""

    tokens: int
    rate: float
    share: float | None


def _prefills(result: Result) -> list[Point]:
    return sorted(Point(p.length, p.tokens_per_second, p.mfu) for p in result.prefills)


def _decodes(result: Result) -> dict[str, list[Point]]:
    """The points of each number of rows."""
    lines: dict[str, list[Point]] = {}
    for d in sorted(result.decodes, key=lambda d: (d.batch, d.context)):
        name = f"decoding, {d.batch} {'row' if d.batch == 1 else 'rows'}"
        lines.setdefault(name, []).append(Point(d.context, d.tokens_per_second, d.mbu))
    return lines


def _draw(axis: Any, what: str, lines: dict[str, list[Point]]) -> None:
    """Each line with the rate that its bound allows, dashed, and the share of it that each point reaches.

    A bound on the time is an upper bound on the rate, so it lies above its points. A point whose bound is in doubt is
    hollow and has none.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    for (name, points), colour in zip(lines.items(), itertools.cycle(COLOURS)):
        axis.plot(
            [p.tokens for p in points],
            [p.rate / p.share if p.share else math.nan for p in points],
            color=colour,
            linewidth=1.1,
            linestyle="--",
            marker="_",
            alpha=0.7,
            label="upper bound",
        )
        axis.plot([p.tokens for p in points], [p.rate for p in points], color=colour, linewidth=1.6, label=name)
        for p in points:
            axis.plot(
                p.tokens, p.rate, color=colour, marker="o", markersize=4.5, fillstyle="full" if p.share else "none"
            )
            axis.annotate(
                f"{p.share:.0%}" if p.share else "?",
                (p.tokens, p.rate),
                (0, -13),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=colour,
            )
    axis.set_xscale("log", base=2)
    ticks = sorted({p.tokens for points in lines.values() for p in points})
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    if len(lines) > 1:  # one row beside sixty-four
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.margins(y=0.15)
    else:
        axis.set_ylim(bottom=0)
    axis.margins(x=0.12)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")
    axis.set_xlabel(what, fontsize=9, color=INK)
    axis.set_ylabel("tokens per second", fontsize=9, color=INK)
    axis.grid(color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=INK, labelsize=8)
    axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
