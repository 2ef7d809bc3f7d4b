#!/usr/bin/env python3
"""Draw the README's picture from the measured figures of the GPU page.

    python scripts/readme_picture.py                    # needs matplotlib; writes docs/images/bounds.svg
    python scripts/readme_picture.py picture.png

Each bar is the share of the bound that decoding (memory bandwidth, mbu) or a prefill (FLOPs, mfu) reaches.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
PICTURE = ROOT / "docs" / "images" / "bounds.svg"
DEVICE = "NVIDIA H100 80GB HBM3"
INK, GRID, COLOURS = "#1f2933", "#d9dee3", {"decode": "#b5532a", "prefill": "#2f6f8f"}
TITLES = {"decode": "decoding, of the memory bandwidth", "prefill": "prefill, of the matrix product rate"}


@dataclass(frozen=True)
class Bar:
    """One measured row: its benchmark, its name, tokens per second, and the share of the bound."""

    kind: str
    what: str
    tokens_per_second: float
    share: float

    @property
    def label(self) -> str:
        """The share, and the rate behind it."""
        return f"{self.share:.0%}   {self.tokens_per_second:,.0f} tokens/s"


def read_bars(results: Path = RESULTS) -> list[Bar]:
    """Read the rows of decoding and prefill that stand beside a bound."""
    return [
        Bar(benchmark["name"], row["what"], row["ours"]["median"], row["ratio"]["median"])
        for benchmark in json.loads(results.read_text(encoding="utf-8"))
        if benchmark["machine"]["device"] == DEVICE and benchmark["name"] in TITLES
        for row in benchmark["rows"]
        if row["baseline_name"].startswith("bound by")
    ]


def draw(bars: list[Bar], path: Path) -> None:
    """Write a picture in the format of the file's name; an SVG keeps its text as text."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": "hyaena", "font.family": "sans-serif", "font.size": 10}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(8.2, 0.42 * len(bars) + 1.3), dpi=150, facecolor="white", layout="constrained")
        axis = figure.subplots()
        places = [-i - 0.5 * (bar.kind != bars[0].kind) for i, bar in enumerate(bars)]
        drawn = axis.barh(places, [bar.share for bar in bars], height=0.72, color=[COLOURS[bar.kind] for bar in bars])
        for place, bar in zip(places, bars, strict=True):
            axis.text(0.015, place, bar.label, va="center", color="white", fontweight="bold")
        axis.axvline(1, color=INK, linewidth=1.5)
        axis.text(1.008, places[0], "bound", va="center", color=INK)
        axis.set_yticks(places, [bar.what.removeprefix("decoding, ") for bar in bars], color=INK)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"], color=INK)
        axis.set_xlim(0, 1.1)
        axis.set_axisbelow(True)
        axis.grid(axis="x", color=GRID)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        first = {bar.kind: patch for bar, patch in reversed(list(zip(bars, drawn, strict=True)))}
        figure.legend(
            [first[kind] for kind in TITLES], TITLES.values(), loc="outside lower center", ncols=2, frameon=False
        )
        figure.suptitle(
            f"Share of the bound, StripedHyena-7B's shape in bfloat16, one {DEVICE.removesuffix(' 80GB HBM3')}",
            x=0.01,
            ha="left",
            fontsize=11,
            fontweight="bold",
            color=INK,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    draw(read_bars(), Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
