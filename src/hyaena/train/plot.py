"""Draws the loss curves of training runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hyaena.extras import require
from hyaena.files import write_atomically
from hyaena.train.storage import read_metrics

_COLOURS = ("#b5532a", "#2f6f8f", "#6b7f2a", "#7a4f9a")


def loss_curve(rows: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Return the training loss of every step: steps (from 1) and bits per byte."""
    steps, bits = [], []
    for row in rows:
        if row["kind"] == "train":
            losses = row["losses"]
            steps += range(row["step"] - len(losses) + 1, row["step"] + 1)
            factor = row["bits_per_byte"] / row["loss"] if row["loss"] else 0.0
            bits += [loss * factor for loss in losses]
    return steps, bits


def plot_metrics(runs: dict[str, Path], output: Path, *, title: str = "") -> None:
    """Draw the loss curves of one or more runs (label -> ``metrics.jsonl``) into the PNG ``output``.

    Training loss of every step (a thin line per run) and held-out loss (dots on a line, from step 0 on) in bits per
    byte over optimizer steps, and the learning rate below.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    require("matplotlib", extra="train", purpose="the loss curve")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(8, 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    ceiling, floor = 0.0, float("inf")
    for (label, path), colour in zip(runs.items(), _COLOURS, strict=False):
        rows = read_metrics(path)
        held = [row for row in rows if row["kind"] == "heldout"]
        steps, bits = loss_curve(rows)
        upper.plot(steps, bits, color=colour, linewidth=0.7, alpha=0.55, label=f"{label}, training")
        if held:
            best = min(row["bits_per_byte"] for row in held)
            upper.plot(
                [row["step"] for row in held],
                [row["bits_per_byte"] for row in held],
                color=colour,
                linewidth=1.8,
                marker="o",
                markersize=3.5,
                label=f"{label}, held out (best {best:.3f})",
            )
        lower.plot(
            [row["step"] for row in rows if row["kind"] == "train"],
            [row["lr"] for row in rows if row["kind"] == "train"],
            color=colour,
            linewidth=1.2,
        )
        # The first few points of a run are far above the rest and would flatten it.
        settled = bits[len(bits) // 50 + 1 :] or bits
        ceiling = max([ceiling, *settled])
        floor = min([floor, *bits, *(row["bits_per_byte"] for row in held)])
    if ceiling > 0:
        upper.set_ylim(floor * 0.92, min(ceiling * 1.05, floor * 4 if floor > 0 else math.inf))
    upper.set_ylabel("bits per byte")
    upper.legend(frameon=False)
    upper.set_title(title, loc="left", fontweight="bold")
    lower.set_ylabel("learning rate\n(thousandths)", fontsize=8)
    lower.set_xlabel("optimizer steps")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    lower.yaxis.set_major_locator(MaxNLocator(3))
    lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1e3 * value:g}"))
    lower.set_ylim(bottom=0)
    for axes in (upper, lower):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    write_atomically(output, lambda file: figure.savefig(file, format="png"))
