"""Bits per byte of a model on held-out text."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyaena.errors import NonFiniteError
from hyaena.ops.backend import log_once
from hyaena.train.corpus import Corpus
from hyaena.train.data import IGNORE, Batch, evaluation_batches


@dataclass(frozen=True)
class Evaluation:
    """What one pass over held-out text found.

    Attributes:
        bits_per_byte: the code length of the text under the model over its length in bytes. End tokens are paid for,
            start tokens are free (they are given), so this is the cost of the documents one by one.
        loss: nats per predicted token.
        num_bytes, num_tokens: bytes of text, predicted tokens.
    """

    bits_per_byte: float
    loss: float
    num_bytes: int
    num_tokens: int


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the summed cross-entropy of a batch in nats: a float32 scalar on the batch's device."""
    logits = model(batch.ids.long(), segment_ids=_boundaries(batch.segments))
    return F.cross_entropy(
        logits.flatten(0, 1).float(), batch.targets.flatten().long(), ignore_index=IGNORE, reduction="sum"
    )


def _boundaries(segments: Tensor) -> Tensor | None:
    """Return the segments, or None where every window holds one document.

    Only on a CPU: elsewhere looking would wait for the device, and boundaries cost little there.
    """
    if segments.device.type == "cpu" and bool((segments == segments[:, :1]).all()):
        log_once("windows are read as", "one document each")
        return None
    log_once("windows are read as", "packed documents: states and attention restart at each boundary")
    return segments


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Matrix products in bfloat16 when ``precision`` is ``"bfloat16"``; nothing for ``"float32"``."""
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    corpus: Corpus,
    *,
    window: int,
    overlap: int = 0,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    loss: Callable[[nn.Module, Batch], Tensor] = summed_loss,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score every token of ``corpus`` once, see ``evaluation_batches``.

    ``progress`` is called with the number of windows of every batch.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
    """
    device = torch.device(device)
    training = model.training
    model.eval()
    # One float64 sum on the device: no wait per batch.
    total = torch.zeros((), dtype=torch.float64, device=device)
    with autocast(device, precision):
        for batch in evaluation_batches(corpus, window=window, overlap=overlap, batch_size=batch_size):
            total += loss(model, batch.to(device))
            if progress is not None:
                progress(len(batch.ids))
    model.train(training)
    nats = total.item()
    if not math.isfinite(nats):
        raise NonFiniteError(
            "the loss on the held-out text is not finite; the weights are damaged: go back to a checkpoint"
        )
    return Evaluation(
        nats / math.log(2) / corpus.num_bytes, nats / corpus.num_predictions, corpus.num_bytes, corpus.num_predictions
    )
