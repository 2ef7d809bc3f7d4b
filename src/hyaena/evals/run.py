"""Runs tasks of lm-evaluation-harness and reports their figures."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hyaena.arguments import whole
from hyaena.errors import HyaenaError, InputError, nearest, printable, shown
from hyaena.evals.suites import Reference
from hyaena.extras import require

if TYPE_CHECKING:
    from hyaena.model import StripedHyena
    from hyaena.tokenizers import Tokenizer


_LEAST = {"num_fewshot": 0, "limit": 1, "batch_size": 1, "max_length": 2}
"""The least values of the numbers that ``evaluate`` takes."""


class Tasks(NamedTuple):
    """Tasks whose names are known, before a model is loaded.

    Attributes:
        names: of tasks, groups and tags.
        manager: of the harness.
    """

    names: list[str]
    manager: Any


class Figure(NamedTuple):
    """One figure of one task; ``error`` is its standard error, or None."""

    task: str
    metric: str
    value: float
    error: float | None


def find_tasks(names: Sequence[str], include_path: str | PathLike[str] | None = None) -> Tasks:
    """Find tasks by name: those of the harness, and those whose YAML files lie in a folder.

    Raises:
        InputError: no name, an unknown one (the message offers the nearest), or no folder.
        UnsupportedError: lm_eval is not installed.
    """
    require("lm_eval", extra="eval", purpose="evaluation")
    if isinstance(names, str) or not names:
        raise InputError("name at least one task, as a list")
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"{printable(str(include_path))} is no folder: name the one that holds the tasks' YAML files")
    from lm_eval import tasks  # pyright: ignore[reportMissingImports]

    folder = None if include_path is None else str(include_path)
    try:
        if folder is not None:  # the harness's own tasks are thousands of files
            manager = tasks.TaskManager(include_path=folder, include_defaults=False)
            if all(name in manager.all_subtasks for name in names):
                return Tasks(list(names), manager)
        manager = tasks.TaskManager(include_path=folder)
    except Exception as error:  # of YAML, of the harness: whatever is wrong with a file there
        raise InputError(f"the tasks in {printable(str(folder))} cannot be read: {_reason(error)}") from error
    for name in names:
        if name not in manager.all_tasks:
            near = nearest(name, manager.all_tasks)
            hint = f"did you mean {near}?" if near else "`lm-eval ls tasks` lists them; --include-path adds a folder"
            raise InputError(f"unknown task {shown(name)}: {hint}")
    return Tasks(list(names), manager)


def check_options(**options: int | None) -> None:
    """Check the numbers that ``evaluate`` takes; None leaves the choice to the tasks or the model.

    Raises:
        InputError: one is out of range.
    """
    for name, value in options.items():
        if value is not None:
            least = _LEAST[name]
            whole(name, value, f"a whole number, {least} or more", least)


def evaluate(
    model: StripedHyena,
    tokenizer: Tokenizer,
    tasks: Sequence[str] | Tasks,
    *,
    include_path: str | PathLike[str] | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    share_contexts: bool = True,
) -> dict[str, Any]:
    """Evaluate a model on tasks of lm-evaluation-harness.

    Args:
        model, tokenizer: as ``hyaena.load`` returns them.
        tasks: names of tasks, groups or tags; or what ``find_tasks`` returned.
        include_path: a folder with YAML files of further tasks.
        num_fewshot: examples in front of each question; the tasks' own number unless given.
        limit: only the first so many documents of each task.
        batch_size, max_length, share_contexts: see ``HyaenaLM``.

    Returns:
        What the harness's ``simple_evaluate`` returns; ``figures`` lists its numbers.

    Raises:
        InputError: an unknown task, a number out of range, or data that cannot be loaded.
        UnsupportedError: lm_eval is not installed.
    """
    check_options(num_fewshot=num_fewshot, limit=limit, batch_size=batch_size, max_length=max_length)
    names, manager = tasks if isinstance(tasks, Tasks) else find_tasks(tasks, include_path)
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]

    from hyaena.evals.harness import HyaenaLM

    lm = HyaenaLM(model, tokenizer, max_length=max_length, batch_size=batch_size, share_contexts=share_contexts)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        loaded = list(manager.load(names)["tasks"].values())
    except Exception as error:  # of datasets, of the hub, of YAML: whatever keeps the data away
        raise InputError(
            f"{', '.join(names)} cannot be loaded: {_reason(error)}; check the task's YAML file, and that its data are "
            "there: those of the harness's tasks come over the network or from a cache"
        ) from error
    try:
        return simple_evaluate(
            model=lm,
            tasks=loaded,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except (HyaenaError, MemoryError):
        raise
    except Exception as error:  # of metrics, filters and templates, which run code of anybody
        raise InputError(f"a task of {', '.join(names)} failed: {_reason(error)}") from error


def figures(results: Mapping[str, Any]) -> Iterator[Figure]:
    """The numbers in what ``evaluate`` returned, in the order of the tasks."""
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not filtered:
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            yield Figure(task, name, float(value), error if isinstance(error, float) else None)


def table(results: Mapping[str, Any], references: Sequence[Reference] = (), source: str = "") -> str:
    """The figures as aligned lines, with published ones beside them."""
    published = {(reference.task, reference.metric): reference.value for reference in references}
    lines = [("task", "shots", "metric", "value", "stderr", *(("published",) if published else ()))]
    for figure in figures(results):
        shots = str(results.get("n-shot", {}).get(figure.task, ""))
        error = "" if figure.error is None else f"{figure.error:.4f}"
        known = published.get((figure.task, figure.metric))
        last = ("" if known is None else f"{known:.3f}",) if published else ()
        lines.append((figure.task, shots, figure.metric, f"{figure.value:.4f}", error, *last))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if source and published:
        text.append(f"published: {source}")
    return "\n".join(text)


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return printable(f"{type(error).__name__}: {text}" if text else type(error).__name__, limit=300)
