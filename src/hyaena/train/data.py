"""Packed windows of tokens, the same for the same seed, without leakage between documents.

The documents of a corpus are laid one after another in a row, each between a start and an end token. An epoch shuffles
the documents, cuts the row into windows of equal length (no padding) and shuffles those. A document may continue in
another window, with fresh state. Inside a window ``segments`` numbers the documents: a model restarts every state where
the number changes, and nothing is predicted across a boundary.

Where documents have prompts, an answer without its prompt must not be learned: windows then begin at a document, and
every document that fits is scored in one window. The rest of a window, the beginning of the next document, is not
scored. The row itself is never built: windows are gathered from the corpus, so an epoch costs no memory but the order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyaena.errors import InputError, counted
from hyaena.train.corpus import Corpus

IGNORE = -100  # the target that cross_entropy skips


@dataclass(frozen=True)
class Batch:
    """Windows [B,T] of inputs (int32), targets (int32, ``IGNORE`` where nothing is predicted) and segments (int32)."""

    ids: Tensor
    targets: Tensor
    segments: Tensor

    @property
    def num_targets(self) -> int:
        """Number of predicted tokens."""
        return int((self.targets != IGNORE).sum())

    def split(self, size: int) -> list[Batch]:
        """Split into batches of ``size`` windows."""
        parts = (self.ids.split(size), self.targets.split(size), self.segments.split(size))
        return [Batch(*part) for part in zip(*parts, strict=True)]

    def to(self, device: torch.device) -> Batch:
        """Move to ``device``; from pinned memory and without waiting when that is a GPU."""
        if device.type != "cuda":
            return Batch(self.ids.to(device), self.targets.to(device), self.segments.to(device))
        tensors = (
            tensor.pin_memory().to(device, non_blocking=True) for tensor in (self.ids, self.targets, self.segments)
        )
        return Batch(*tensors)


@dataclass(frozen=True)
class _Windows:
    """Windows to cut from a row: where each begins, and the bounds of the positions that it scores, int64 [windows]."""

    first: NDArray[np.int64]
    low: NDArray[np.int64]
    high: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, which: slice | NDArray[np.int64]) -> _Windows:
        return _Windows(self.first[which], self.low[which], self.high[which])


class _Row:
    """The documents of a corpus in an order, one after another; the tokens stay where they are."""

    def __init__(self, corpus: Corpus, order: NDArray[np.int64]) -> None:
        self.corpus, self.order = corpus, order
        self.ends = np.cumsum((corpus.ends - corpus.starts)[order])
        self.total = len(corpus.tokens)
        # What to add to a position of the row for the position in the corpus.
        self.offsets = corpus.ends[order] - self.ends

    def cut(self, windows: _Windows, length: int) -> Batch:
        """Cut windows of ``length`` inputs; the target of each input is the token after it.

        Beyond the end of the row there is one more document, of zeros, which is not scored.
        """
        positions = windows.first[:, None] + np.arange(length + 1)
        document = np.searchsorted(self.ends, positions, side="right")
        known = np.minimum(document, len(self.order) - 1)
        within = np.minimum(positions + self.offsets[known], self.total - 1)  # in the corpus
        rows = np.where(positions < self.total, self.corpus.tokens[within], 0).astype(np.int32)
        scored = (
            (document[:, 1:] == document[:, :-1])
            & (positions[:, 1:] < self.total)
            & (within >= self.corpus.learned[self.order[known]])[:, 1:]
            & (positions[:, 1:] >= windows.low[:, None])
            & (positions[:, 1:] < windows.high[:, None])
        )
        return Batch(
            torch.from_numpy(rows[:, :-1].copy()),
            torch.from_numpy(np.where(scored, rows[:, 1:], np.int32(IGNORE))),
            torch.from_numpy((document[:, :-1] - document[:, :1]).astype(np.int32)),
        )

    def whole_documents(self, length: int, overlap: int = 0) -> _Windows:
        """Lay out windows such that every document that fits is scored in one window.

        A longer document continues in the next window, which sees ``overlap`` scored tokens as context.
        """
        first, low, high = [], [], []
        begin = scored = 0
        while scored < self.total:
            last = int(np.searchsorted(self.ends, begin + length + 1, side="right")) - 1
            first.append(begin)
            low.append(scored)
            if last >= 0 and self.ends[last] > scored:
                begin = scored = int(self.ends[last])
            else:
                scored = begin + length + 1
                begin += length - overlap
            high.append(scored)
        return _Windows(*(np.array(values, np.int64) for values in (first, low, high)))


class PackedWindows:
    """The endless sequence of training batches; ``batch(step)`` is a function of the seed and the step alone.

    So a run resumes exactly by knowing its step. Every epoch has its own order of documents, its own offset of the
    first cut and its own order of windows; a batch may span two epochs. What the cuts leave over at the two ends of
    an epoch (less than two windows) is skipped in that epoch. Where documents have prompts, the order of documents is
    that of the first epoch in all of them, and nothing is skipped.
    """

    def __init__(self, corpus: Corpus, *, window: int, batch_size: int, seed: int) -> None:
        self.corpus, self.window, self.batch_size, self.seed = corpus, window, batch_size, seed
        self._epoch: tuple[int, _Row, _Windows] | None = None
        self._whole: tuple[_Row, _Windows] | None = None
        if corpus.has_prompts:
            row = self._shuffled_row(self._generator(0))
            self._whole = row, row.whole_documents(window)
            self.windows_per_epoch = len(self._whole[1])
            return
        # Independent of the random offset (0 … window-1), so that the epoch of a step is plain arithmetic.
        self.windows_per_epoch = (len(corpus.tokens) - window) // window
        if self.windows_per_epoch < 1:
            raise InputError(
                f"the training text has {counted(len(corpus.tokens), 'token')}, too few for windows of {window}: "
                f"add text or set window to at most {len(corpus.tokens) // 2}"
            )

    def batch(self, step: int) -> Batch:
        """Cut the batch of optimizer step ``step`` (from 0)."""
        first = step * self.batch_size
        parts = []
        for epoch in range(
            first // self.windows_per_epoch, (first + self.batch_size - 1) // self.windows_per_epoch + 1
        ):
            row, windows = self._windows_of(epoch)
            begin = max(first - epoch * self.windows_per_epoch, 0)
            stop = min(first + self.batch_size - epoch * self.windows_per_epoch, self.windows_per_epoch)
            parts.append(row.cut(windows[begin:stop], self.window))
        if len(parts) == 1:
            return parts[0]
        return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "targets", "segments")))

    def _windows_of(self, epoch: int) -> tuple[_Row, _Windows]:
        if self._epoch is None or self._epoch[0] != epoch:
            generator = self._generator(epoch)
            if self._whole is not None:
                row, windows = self._whole
                windows = windows[torch.randperm(len(windows), generator=generator, device="cpu").numpy()]
            else:
                row = self._shuffled_row(generator)
                offset = int(torch.randint(self.window, (), generator=generator, device="cpu"))
                cuts = torch.randperm(self.windows_per_epoch, generator=generator, device="cpu").numpy()
                first = offset + self.window * cuts
                windows = _Windows(first, first, first + self.window + 1)
            self._epoch = (epoch, row, windows)
        return self._epoch[1:]

    def _generator(self, epoch: int) -> torch.Generator:
        # Mixed by a hash: torch's CPU generator looks at the low 32 bits of a seed only.
        mixed = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(mixed[:4], "big"))

    def _shuffled_row(self, generator: torch.Generator) -> _Row:
        return _Row(self.corpus, torch.randperm(len(self.corpus.starts), generator=generator, device="cpu").numpy())


def evaluation_batches(corpus: Corpus, *, window: int, overlap: int, batch_size: int) -> Iterator[Batch]:
    """Cut windows over the whole corpus in order, such that every token to predict is scored exactly once.

    Consecutive windows share ``overlap`` tokens; the later one sees them as context and does not score them again.
    So a token is predicted from at least ``overlap`` tokens, or from all of its document before it. Where documents
    have prompts, every document that fits into a window is scored in one.
    """
    row = _Row(corpus, np.arange(len(corpus.starts)))
    if corpus.has_prompts:
        windows = row.whole_documents(window, overlap)
    else:
        stride = window - overlap
        first = stride * np.arange(max(math.ceil((row.total - 1 - overlap) / stride), 1))
        windows = _Windows(first, np.where(first > 0, first + overlap + 1, 0), np.full_like(first, row.total))
    for begin in range(0, len(windows), batch_size):
        yield row.cut(windows[begin : begin + batch_size], window)
