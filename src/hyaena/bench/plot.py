"""A result as a picture: what was reached, and the floors above it."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

from hyaena.bench.report import device_name
from hyaena.bench.run import Result
from hyaena.errors import UnsupportedError
from hyaena.files import write_atomically

INK, GRID = "#1f2933", "#d9dee3"
COLOURS = ("#b5532a", "#2f6f8f", "#6b7f2a", "#7a4f9a", "#a8842c", "#3d7a66")


def require_matplotlib() -> None:
    """Find out before anything is measured.

    Raises:
        UnsupportedError: it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError("the plot needs matplotlib: pip install 'hyaena[bench]'")


def draw(result: Result, path: Path) -> None:
    """Write a PNG: tokens per second of prefills over length, of decoding over context, each below its floor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = []
    if result.prefills:
        panels.append(("prompt, tokens", {"prefill": _prefills(result)}))
    if result.decodes:
        panels.append(("context, tokens", _decodes(result)))
    figure = Figure(figsize=(1 + 4.6 * len(panels), 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (what, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axis, what, lines)
    dtype = str(result.dtype).removeprefix("torch.")
    title = f"{result.config.name}, {dtype}, on {device_name(result.device)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold", color=INK)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


Point = tuple[int, float, float]
"""Tokens, tokens per second, and their part of the floor."""


def _prefills(result: Result) -> list[Point]:
    return sorted((p.length, p.tokens_per_second, p.of_floor(result.rates)) for p in result.prefills)


def _decodes(result: Result) -> dict[str, list[Point]]:
    """The points of each number of rows."""
    lines: dict[str, list[Point]] = {}
    for d in sorted(result.decodes, key=lambda d: (d.batch, d.context)):
        name = f"decoding, {d.batch} {'row' if d.batch == 1 else 'rows'}"
        lines.setdefault(name, []).append((d.context, d.tokens_per_second, d.of_floor(result.rates)))
    return lines


def _draw(axis: Any, what: str, lines: dict[str, list[Point]]) -> None:
    """Each line with its floor, dashed, and the part of it that each point reaches."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for (name, points), colour in zip(lines.items(), itertools.cycle(COLOURS)):
        x, y, parts = zip(*points, strict=True)
        floor = [height / part for height, part in zip(y, parts, strict=True)]
        axis.plot(x, floor, color=colour, linewidth=1.1, linestyle="--", marker="_", alpha=0.7, label="its floor")
        axis.plot(x, y, color=colour, marker="o", markersize=4.5, linewidth=1.6, label=name)
        for here, height, part in points:
            axis.annotate(
                f"{part:.0%}",
                (here, height),
                (0, -13),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=colour,
            )
    axis.set_xscale("log", base=2)
    ticks = sorted({point[0] for points in lines.values() for point in points})
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
