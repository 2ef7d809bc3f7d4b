"""What a run keeps in its folder: the state to resume from, which also holds the model, and metrics as JSON lines.

Nothing is ever half written.
"""

from __future__ import annotations

import json
import os
import stat
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from hyaena.checkpoints import save_model
from hyaena.config import ModelConfig
from hyaena.errors import CheckpointError, ConfigError
from hyaena.files import write_atomically
from hyaena.model import StripedHyena
from hyaena.train.filters import parametrize_filters, plain_state_dict

CHECKPOINT = "last.pt"
METRICS = "metrics.jsonl"
CONFIG = "config.yml"
CURVE = "loss.png"
BEST, FINAL = "best", "final"
_WRITTEN = {CHECKPOINT, METRICS, CONFIG, CURVE, BEST, FINAL}
_FIELDS: dict[str, tuple[type, ...]] = {
    "config": (str,),
    "model_config": (str,),
    "tokenizer": (dict,),
    "data": (int,),
    "model": (dict,),
    "optimizer": (dict,),
    "rng": (torch.Tensor,),
    "step": (int,),
    "elapsed": (float, int),
    "best": (float, NoneType),
    "latest": (float, NoneType),
    "initial": (float, NoneType),
    "scored": (int, NoneType),
}
"""The fields of a saved state, and their types."""
_NUMBERS = {"train": ("loss", "bits_per_byte", "lr"), "heldout": ("bits_per_byte",)}
"""The numbers that a row of metrics has, by its kind."""


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write the state from which a run resumes, replacing the last one atomically."""
    write_atomically(folder / CHECKPOINT, lambda file: torch.save(state, file))


def is_written_by_run(path: Path, folder: Path) -> bool:
    """Whether a path is a file that a run writes into its folder, which is never part of its text."""
    inside, found = Path(os.path.realpath(folder)), Path(os.path.realpath(path.parent)) / path.name
    if not found.is_relative_to(inside):
        return False
    name = found.relative_to(inside).parts[0]
    return name in _WRITTEN or name.startswith(".")  # a lock, or a file that is being written


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Read the last saved state onto the CPU.

    Raises:
        CheckpointError: there is none, it is damaged, or it is not the saved state of a run.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise CheckpointError(f"nothing to resume: {path} does not exist; run without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load fails in many ways on a damaged archive
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}); remove it to start again without --resume"
        ) from error
    problem = _problem(state)
    if problem is not None:
        raise CheckpointError(
            f"{path} is not the saved state of a run ({problem}); remove it to start again without --resume"
        )
    return state


def _problem(state: Any) -> str | None:
    """What keeps a value from being the saved state of a run, if anything does."""
    if not isinstance(state, dict):
        return f"it is a {type(state).__name__}"
    for name, types in _FIELDS.items():
        if name not in state:
            return f"{name} is missing"
        if not isinstance(state[name], types) or isinstance(state[name], bool):
            return f"{name} is a {type(state[name]).__name__}"
    for name in ("config", "model_config"):
        try:
            values = json.loads(state[name])
        except (ValueError, RecursionError):
            return f"{name} is not JSON"
        if not isinstance(values, dict):
            return f"{name} is not a mapping"
    if type(json.loads(state["config"]).get("steps")) is not int or state["step"] < 0:
        return "it has no number of steps"
    return None


def saved_description(state: dict[str, Any]) -> tuple[ModelConfig, dict[str, bytes]]:
    """The architecture in a saved state, and the files of its tokenizer: name -> content.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is not the saved state of a run.
    """
    files = {name: text.encode("utf-8", errors="surrogateescape") for name, text in state["tokenizer"].items()}
    return ModelConfig.from_dict(json.loads(state["model_config"])), files


def load_run(path: str | PathLike[str]) -> tuple[StripedHyena, dict[str, bytes], int]:
    """Read the model of a run, stopped or killed at whatever step, from its ``last.pt``.

    Args:
        path: the run's folder, or its ``last.pt``.

    Returns:
        The model on the CPU in float32, in evaluation mode, with raw poles; its tokenizer's files, name -> content;
        and the number of steps done.

    Raises:
        CheckpointError: there is no saved state, or it is damaged.
    """
    path = Path(path)
    folder = path.parent if path.name == CHECKPOINT else path
    if not (folder / CHECKPOINT).is_file():
        raise CheckpointError(f"{path} is no run: {folder / CHECKPOINT} does not exist")
    state = load_checkpoint(folder)
    try:
        config, tokenizer = saved_description(state)
        trained = build_empty(config)
        trained.load_state_dict(state["model"], assign=True)
        step = int(state["step"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ConfigError) as error:
        raise CheckpointError(
            f"{folder / CHECKPOINT} is not the saved state of a run: {type(error).__name__}"
        ) from error
    return with_raw_poles(trained).eval(), tokenizer, step


def export_model(path: str | PathLike[str], folder: str | PathLike[str], *, dtype: torch.dtype | None = None) -> Path:
    """Write the model of a run, stopped or killed at whatever step, as a folder that loads like any other model.

    Args:
        path: the run's folder, or its ``last.pt``.
        folder: the folder to write.
        dtype: of the weights, float32 by default; poles and residues are float32 always.

    Raises:
        CheckpointError: there is no saved state, or it is damaged; or the model cannot be written.
    """
    model, tokenizer, _ = load_run(path)
    return save_model(model, folder, dtype=dtype, extra_files=tokenizer)


def build_empty(config: ModelConfig) -> StripedHyena:
    """Build a model as training has it, with trainable poles, on the meta device: no memory, no random numbers."""
    with torch.device("meta"):
        model = StripedHyena(config)
        parametrize_filters(model)
    return model


def with_raw_poles(trained: StripedHyena) -> StripedHyena:
    """Return the model as it is exported: the same weights, and poles as plain numbers."""
    with torch.device("meta"):
        model = StripedHyena(trained.config)
    model.load_state_dict(plain_state_dict(trained), assign=True)
    return model


class Metrics:
    """Appends one JSON object per line to ``metrics.jsonl``."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS

    def truncate(self, step: int) -> None:
        """Remove what was logged after ``step``, before a run resumes there; everything for a negative step."""
        logged = read_metrics(self.path) if step >= 0 and self.path.exists() else []
        rows = [row for row in logged if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self.path, lambda file: file.write(text.encode()))

    def append(self, **row: float | int | str | list[float]) -> None:
        """Append a row: all of it, or, where a write fails, nothing."""
        line = memoryview(json.dumps(row).encode() + b"\n")
        with open(self.path, "ab", buffering=0) as file:  # a buffer would be written again when the file is closed
            start = file.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError:
                file.truncate(start)
                raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a ``metrics.jsonl``; a last line that a killed process left unfinished is ignored.

    Raises:
        CheckpointError: it cannot be read, or a line is not a row of metrics.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before opening: opening a FIFO waits
            raise CheckpointError(f"cannot read {path}: not a regular file; move it away to go on without it")
        *lines, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; move it away to go on without it") from error
    rows = [_row(line) for line in lines]
    if None in rows:
        raise CheckpointError(
            f"line {rows.index(None) + 1} of {path} is not a row of metrics: correct it, or move the file away"
        )
    last = _row(rest)
    return [row for row in (*rows, last) if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    """A line as a row of metrics; None if it is not one."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not isinstance(row.get("kind"), str):
        return None
    numbers = [row.get(name) for name in _NUMBERS.get(row["kind"], ())]
    if row["kind"] == "train":
        losses = row.get("losses")
        numbers += losses if isinstance(losses, list) else [None]
    return row if all(type(number) in (int, float) for number in numbers) else None
