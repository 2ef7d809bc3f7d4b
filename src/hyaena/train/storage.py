"""What a run writes: resumable checkpoints, metrics as JSON lines, and the loss curve. Nothing is ever half written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hyaena.errors import CheckpointError, HyaenaError
from hyaena.files import write_atomically

CHECKPOINT = "last.pt"
METRICS = "metrics.jsonl"
CURVE = "loss.png"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write the state from which a run resumes, replacing the last one atomically."""
    write_atomically(folder / CHECKPOINT, lambda file: torch.save(state, file))


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The last saved state, on the CPU.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise CheckpointError(f"nothing to resume: {path} does not exist; run without --resume")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load fails in many ways on a damaged archive
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}); run without --resume to start again"
        ) from error


class Metrics:
    """Appends one JSON object per line to ``metrics.jsonl``."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS

    def truncate(self, step: int) -> None:
        """Forget what was logged after ``step`` (all of it for 0), before a run resumes there."""
        rows = [row for row in read_metrics(self.path) if row["step"] <= step] if step and self.path.exists() else []
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self.path, lambda file: file.write(text.encode()))

    def append(self, **row: float | int | str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line that a killed process left unfinished is ignored."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_metrics(runs: dict[str, Path], output: Path, *, title: str = "") -> None:
    """Draw the loss curves of one or more runs (label -> ``metrics.jsonl``) into the PNG ``output``.

    Training loss (a thin line per run), held-out loss (dots on a line) in bits per byte over tokens, and the learning
    rate below.

    Raises:
        HyaenaError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator
    except ImportError as error:
        raise HyaenaError("the loss curve needs matplotlib: pip install 'hyaena[train]'") from error
    figure = Figure(figsize=(8, 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    colours = ["#b5532a", "#2f6f8f", "#6b7f2a", "#7a4f9a"]
    ceiling, floor = 0.0, float("inf")
    for (label, path), colour in zip(runs.items(), colours, strict=False):
        rows = read_metrics(path)
        steps = [row for row in rows if row["kind"] == "train"]
        held = [row for row in rows if row["kind"] == "heldout"]
        tokens = [row["tokens"] / 1e6 for row in steps]
        bits = [row["bits_per_byte"] for row in steps]
        upper.plot(tokens, bits, color=colour, linewidth=0.7, alpha=0.55, label=f"{label}, training")
        if held:
            best = min(row["bits_per_byte"] for row in held)
            upper.plot(
                [row["tokens"] / 1e6 for row in held],
                [row["bits_per_byte"] for row in held],
                color=colour,
                linewidth=1.8,
                marker="o",
                markersize=3.5,
                label=f"{label}, held out (best {best:.3f})",
            )
        lower.plot(tokens, [row["lr"] for row in steps], color=colour, linewidth=1.2)
        # The first few points of a run are far above the rest and would flatten it.
        settled = bits[len(bits) // 50 + 1 :] or bits
        ceiling = max([ceiling, *settled])
        floor = min([floor, *bits, *(row["bits_per_byte"] for row in held)])
    if ceiling > 0:
        upper.set_ylim(floor * 0.92, min(ceiling * 1.05, floor * 4))
    upper.set_ylabel("bits per byte")
    upper.legend(frameon=False)
    upper.set_title(title, loc="left", fontweight="bold")
    lower.set_ylabel("learning rate\n(thousandths)", fontsize=8)
    lower.set_xlabel("tokens seen (millions)")
    lower.yaxis.set_major_locator(MaxNLocator(3))
    lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1e3 * value:g}"))
    lower.set_ylim(bottom=0)
    for axes in (upper, lower):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    write_atomically(output, lambda file: figure.savefig(file, format="png"))
