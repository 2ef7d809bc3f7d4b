"""What programs import from the original's ``utils``."""

from __future__ import annotations

import logging
from os import PathLike
from typing import TYPE_CHECKING

from hyaena.compat import dotdict, print_rank_0
from vortex.model.weights import load_file

if TYPE_CHECKING:
    from vortex.model.model import StripedHyena

__all__ = ["dotdict", "load_checkpoint", "print_rank_0"]


def load_checkpoint(model: StripedHyena, checkpoint_path: str | PathLike[str] | None) -> None:
    """Fill a model from a checkpoint file, and cast it to bfloat16 but for modes and rotary frequencies.

    Args:
        model: made with the configuration of the checkpoint.
        checkpoint_path: a ``.pt`` or ``.safetensors`` file in the published layout, or one whose parts (``.part0``, …)
            are there in its place; None leaves random weights.

    Raises:
        CheckpointError: a file that is missing, damaged or unsafe, or of another model.
    """
    if checkpoint_path is None:
        logging.getLogger(__name__).warning("no checkpoint is given: the weights are random")
        return
    model.to_bfloat16_except_pr_lc()
    load_file(model, checkpoint_path)
