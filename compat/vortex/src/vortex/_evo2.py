"""Three places of evo2 that this package completes, when it is imported and without changing its files.

evo2 imports vortex while it is being imported itself, so its module ``evo2.models`` is completed at once if it has
begun, and ``evo2.scoring`` after it has run. Nothing but these two modules is looked at.

- ``evo2.models.HAS_TE`` says whether FP8 input projections can be computed. evo2 finds out by importing Transformer
  Engine, which here nothing needs: hyaena computes them. Without this, evo2 refuses four of its eight models.
- ``evo2.scoring.prepare_batch`` puts ids on ``cuda:0`` unless its caller names a device, and three functions name none.
  Without a CUDA device it takes the CPU, and a line says so, once.
- ``evo2.scoring._score_sequences`` counts, for each text that is shorter than the longest of its batch, the prediction
  of the first padding as one of its own. Here every text is scored as it is alone.
"""

from __future__ import annotations

import importlib.machinery
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from vortex.model.generation import usable_device

logger = logging.getLogger(__name__)


def complete_models(models: ModuleType) -> None:
    """Tell evo2 that FP8 input projections can be computed."""
    if hasattr(models, "HAS_TE"):
        models.HAS_TE = True  # type: ignore[attr-defined]


def complete_scoring(scoring: ModuleType) -> None:
    """Let evo2 score on any device, and texts of unequal lengths rightly."""
    if not all(hasattr(scoring, name) for name in ("prepare_batch", "_score_sequences", "logits_to_logprobs")):
        return  # another version
    prepare = scoring.prepare_batch

    def prepare_batch(
        seqs: Sequence[str], tokenizer: Any, prepend_bos: bool = False, device: torch.device | str = "cuda:0"
    ) -> tuple[torch.Tensor, list[int]]:
        """Texts as ids [B,T] with padding on the right, and their lengths."""
        return prepare(seqs, tokenizer, prepend_bos=prepend_bos, device=usable_device(device))

    def score(
        seqs: Sequence[str],
        model: Any,
        tokenizer: Any,
        prepend_bos: bool = False,
        reduce_method: str = "mean",
        device: torch.device | str = "cuda:0",
    ) -> list[Any]:
        """Mean or sum of the log-probabilities of each text's tokens, but for the first, unless one is prepended."""
        reduce = {"mean": np.mean, "sum": np.sum}.get(reduce_method)
        if reduce is None:
            raise ValueError(f"reduce_method is {reduce_method!r}: choose mean or sum")
        ids, lengths = scoring.prepare_batch(seqs, tokenizer, prepend_bos=prepend_bos, device=device)
        counts = [length - (not prepend_bos) for length in lengths]
        if min(counts) < 1 and reduce_method == "mean":
            logger.warning("a text without a predicted token has no mean: pass prepend_bos=True")
        with torch.inference_mode():
            logits, _ = model(ids)
        values = scoring.logits_to_logprobs(logits, ids).float().cpu().numpy()
        nothing = np.nan if reduce_method == "mean" else 0.0
        return [reduce(row[:n]) if n > 0 else nothing for row, n in zip(values, counts, strict=True)]

    scoring.prepare_batch, scoring._score_sequences = prepare_batch, score  # type: ignore[attr-defined]


COMPLETIONS: dict[str, Callable[[ModuleType], None]] = {
    "evo2.models": complete_models,
    "evo2.scoring": complete_scoring,
}


class Finder:
    """Finds the modules of ``COMPLETIONS`` where Python does, and completes each when it has run."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        complete = COMPLETIONS.get(name)
        spec = None if complete is None else importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or complete is None:
            return spec
        run = spec.loader.exec_module

        def run_and_complete(module: ModuleType) -> None:
            run(module)
            complete(module)

        spec.loader.exec_module = run_and_complete  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Complete what has been imported of evo2, and what will be."""
    for name, complete in COMPLETIONS.items():
        if name in sys.modules:
            complete(sys.modules[name])
    if Finder not in sys.meta_path:
        sys.meta_path.insert(0, Finder)  # type: ignore[arg-type]
