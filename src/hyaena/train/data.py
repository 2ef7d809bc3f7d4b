"""Text to packed windows of tokens, the same for the same seed, without leakage between documents.

A corpus is one row of tokens, its documents one after another, each between a start and an end token. An epoch
shuffles the documents, cuts the row into windows of equal length (no padding) and shuffles those. A document may
continue in another window, with fresh state. Inside a window ``segments`` numbers the documents: a model restarts
every state where the number changes, and nothing is predicted across a boundary.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hyaena.errors import InputError
from hyaena.tokenizers import Tokenizer

IGNORE = -100  # the target that cross_entropy skips


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents.

    Attributes:
        tokens: int32 [total], the documents one after another, start and end tokens included.
        starts: int64 [documents], where each begins; the first entry is 0.
        num_bytes: bytes of UTF-8 text, without start and end tokens.
    """

    tokens: Tensor
    starts: Tensor
    num_bytes: int

    @property
    def checksum(self) -> int:
        """CRC-32 of tokens and starts: what a run resumes on must be what it began with."""
        return zlib.crc32(self.starts.numpy().data, zlib.crc32(self.tokens.numpy().data))

    @property
    def num_predictions(self) -> int:
        """Tokens that are predicted: all but the first of each document."""
        return len(self.tokens) - len(self.starts)


@dataclass(frozen=True)
class Batch:
    """Windows [B,T] of inputs (int32), targets (int32, ``IGNORE`` where nothing is predicted) and segments (int32)."""

    ids: Tensor
    targets: Tensor
    segments: Tensor

    @property
    def num_targets(self) -> int:
        return int((self.targets != IGNORE).sum())

    def split(self, size: int) -> list[Batch]:
        """Batches of ``size`` windows."""
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


def read_documents(sources: Iterable[str | Path], pattern: str = "*") -> Iterator[str]:
    """The documents of files and folders, in a fixed order.

    A folder stands for all its files that match ``pattern``, recursively, ordered by path. Each line of a ``.jsonl``
    file is an object whose ``text`` is a document; every other file is one. Empty documents are left out.

    Raises:
        InputError: a source is missing, holds no file, is not UTF-8, or a line is no object with a ``text`` string.
    """
    for source in map(Path, sources):
        paths = [source]
        if source.is_dir():
            paths = sorted(path for path in source.rglob(pattern) if path.is_file())
            if not paths:
                raise InputError(f"the folder {source} holds no file that matches {pattern!r}; change data.pattern")
        for path in paths:
            yield from filter(None, _documents_of(path))


def _documents_of(path: Path) -> Iterator[str]:
    try:
        if path.suffix != ".jsonl":
            # Bytes, not text mode: line ends must reach the model as they are.
            yield path.read_bytes().decode("utf-8")
            return
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _text_of(line, f"{path}, line {number}")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check data.train and data.heldout") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text; exclude it with data.pattern or convert it") from error


def _text_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: {error.msg}; every line must be one JSON object") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputError(f"{where}: expected an object whose `text` is a string")
    return row["text"]


def tokenize(documents: Iterable[str], tokenizer: Tokenizer) -> Corpus:
    """Encode documents as ``start, text, end``.

    The start token is the tokenizer's BOS, or its EOS where there is no BOS (so that the first character of a
    document is predicted too); the end token is its EOS. A tokenizer with neither gets neither.
    """
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    end = tokenizer.eos_id
    tokens, starts, num_bytes = array("i"), array("q"), 0
    for text in documents:
        starts.append(len(tokens))
        if start is not None:
            tokens.append(start)
        tokens.extend(tokenizer.encode(text, add_special_tokens=False))
        if end is not None:
            tokens.append(end)
        num_bytes += len(text.encode("utf-8"))
    if not tokens:
        raise InputError("the data holds no text; check data.train and data.heldout")
    return Corpus(torch.frombuffer(tokens, dtype=torch.int32), torch.frombuffer(starts, dtype=torch.int64), num_bytes)


def _cut(tokens: Tensor, starts: Tensor, first: Tensor, window: int) -> Batch:
    """Windows that begin at the positions ``first`` [B]: T inputs each and the token after each input as its target."""
    positions = first[:, None] + torch.arange(window + 1)
    segments = torch.searchsorted(starts, positions, right=True)
    rows = tokens[positions]
    targets = rows[:, 1:].masked_fill(segments[:, 1:] != segments[:, :-1], IGNORE)
    relative = (segments[:, :-1] - segments[:, :1]).to(torch.int32)
    return Batch(rows[:, :-1].contiguous(), targets.contiguous(), relative)


class PackedWindows:
    """The endless sequence of training batches; ``batch(step)`` is a function of the seed and the step alone.

    So a run resumes exactly by knowing its step. Every epoch has its own order of documents, its own offset of the
    first cut and its own order of windows; a batch may span two epochs. What the cuts leave over at the two ends of
    an epoch (less than two windows) is skipped in that epoch.
    """

    def __init__(self, corpus: Corpus, *, window: int, batch_size: int, seed: int) -> None:
        self.corpus, self.window, self.batch_size, self.seed = corpus, window, batch_size, seed
        # Independent of the random offset (0 … window-1), so that the epoch of a step is plain arithmetic.
        self.windows_per_epoch = (len(corpus.tokens) - window) // window
        if self.windows_per_epoch < 1:
            raise InputError(
                f"the training text has {len(corpus.tokens)} tokens, too few for windows of {window}: "
                f"add text or set window to at most {len(corpus.tokens) // 2}"
            )
        self._epoch: tuple[int, Tensor, Tensor, Tensor] | None = None

    def batch(self, step: int) -> Batch:
        """The batch of optimizer step ``step`` (from 0)."""
        first = step * self.batch_size
        parts = []
        for epoch in range(
            first // self.windows_per_epoch, (first + self.batch_size - 1) // self.windows_per_epoch + 1
        ):
            tokens, starts, cuts = self._shuffled(epoch)
            begin = max(first - epoch * self.windows_per_epoch, 0)
            stop = min(first + self.batch_size - epoch * self.windows_per_epoch, self.windows_per_epoch)
            parts.append(_cut(tokens, starts, cuts[begin:stop], self.window))
        if len(parts) == 1:
            return parts[0]
        return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "targets", "segments")))

    def _shuffled(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        if self._epoch is None or self._epoch[0] != epoch:
            # Mixed by a hash: torch's CPU generator looks at the low 32 bits of a seed only.
            mixed = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(mixed[:4], "big"))
            order = torch.randperm(len(self.corpus.starts), generator=generator)
            offset = int(torch.randint(self.window, (), generator=generator))
            cuts = offset + self.window * torch.randperm(self.windows_per_epoch, generator=generator)
            self._epoch = (epoch, *_reordered(self.corpus, order), cuts)
        return self._epoch[1:]


def _reordered(corpus: Corpus, order: Tensor) -> tuple[Tensor, Tensor]:
    """The corpus with its documents in another order: tokens and starts."""
    ends = torch.cat([corpus.starts[1:], torch.tensor([len(corpus.tokens)])])
    lengths = (ends - corpus.starts)[order]
    pieces = [
        corpus.tokens[start:end] for start, end in zip(corpus.starts[order].tolist(), ends[order].tolist(), strict=True)
    ]
    return torch.cat(pieces), lengths.cumsum(0) - lengths


def evaluation_batches(corpus: Corpus, *, window: int, overlap: int, batch_size: int) -> Iterator[Batch]:
    """Windows over the whole corpus in order, such that every token but a document's first is scored exactly once.

    Consecutive windows share ``overlap`` tokens; the later one sees them as context and does not score them again.
    So a token is predicted from at least ``overlap`` tokens, or from all of its document before it.
    """
    stride = window - overlap
    count = max(math.ceil((len(corpus.tokens) - 1 - overlap) / stride), 1)
    # The tail is filled with a document of its own, whose predictions are ignored.
    filling = overlap + count * stride + 1 - len(corpus.tokens)
    tokens = torch.cat([corpus.tokens, torch.zeros(filling, dtype=torch.int32)])
    starts = torch.cat([corpus.starts, torch.tensor([len(corpus.tokens)])])
    for begin in range(0, count, batch_size):
        first = stride * torch.arange(begin, min(begin + batch_size, count))
        batch = _cut(tokens, starts, first, window)
        batch.targets[first[:, None] + torch.arange(window) + 1 >= len(corpus.tokens)] = IGNORE
        batch.targets[(first > 0)[:, None] & (torch.arange(window) < overlap)] = IGNORE
        yield batch
