"""Tokenised documents in one row, kept in a file on the disk and mapped into memory."""

from __future__ import annotations

import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hyaena.errors import InputError, OutputError
from hyaena.files import cure
from hyaena.tokenizers import ByteTokenizer, CharacterTokenizer, Tokenizer
from hyaena.train.documents import Piece

_BYTEWISE = (ByteTokenizer, CharacterTokenizer)
"""Tokenizers that encode a text byte by byte: the ids of two pieces are the ids of the pieces joined."""


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents.

    Attributes:
        tokens: uint8, uint16 or uint32 [total], the documents one after another, start and end tokens included.
        starts: int64 [documents], where each begins; the first entry is 0.
        learned: int64 [documents], the position of the first token of each document that is predicted: the second
            one, or the first after the prompt.
        num_bytes: bytes of UTF-8 text that are predicted: without prompts, start and end tokens.
    """

    tokens: NDArray[np.unsignedinteger]
    starts: NDArray[np.int64]
    learned: NDArray[np.int64]
    num_bytes: int

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of the tokens and the documents' bounds: a run resumes on the text that it began with."""
        checksum = 0
        for values in (self.tokens, self.starts, self.learned):
            checksum = zlib.crc32(np.ascontiguousarray(values).data.cast("B"), checksum)
        return checksum

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """int64 [documents], the position after the last token of each document."""
        return np.append(self.starts[1:], len(self.tokens))

    @property
    def num_predictions(self) -> int:
        """Number of predicted tokens: all but the first of each document and its prompt."""
        return int((self.ends - self.learned).sum())

    @property
    def has_prompts(self) -> bool:
        """Whether any document begins with a prompt, which is context only."""
        return bool((self.learned > self.starts + 1).any())


def tokenize(
    pieces: Iterable[Piece], tokenizer: Tokenizer, *, window: int | None = None, folder: Path | None = None
) -> Corpus:
    """Encode documents as ``start, text, end``, or ``start, prompt, completion, end``.

    The start token is the tokenizer's BOS, or its EOS where there is no BOS (so that the first character of a
    document is predicted too); the end token is its EOS. A tokenizer with neither gets neither, and a document of which
    it makes no token is left out. Text is only text: the
    name of a special token in it does not become that token.

    The ids go to an unnamed temporary file, in the narrowest unsigned type that holds the vocabulary, and are mapped
    from there; the file vanishes with the corpus, or with the process. Bytes and characters are encoded piece by piece,
    in bounded memory; a ``tokenizer.json`` encodes every document as a whole. A completion is encoded as the
    continuation of its prompt where the ids of both together begin with the prompt's, and by itself elsewhere.

    Args:
        pieces: from ``read_documents``.
        tokenizer: of the model.
        window: the most tokens of a document with a prompt, or None for any number.
        folder: where the temporary file lies; by default the system's folder for such files.

    Raises:
        InputError: there is no text, or none that is predicted; a text cannot be encoded; a prompt and its completion
            are longer than ``window``.
        OutputError: there is no room for the temporary file.
    """
    bytewise = isinstance(tokenizer, _BYTEWISE)
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    end = tokenizer.eos_id
    # A byte-wise vocabulary has more ids than it ever gives to text.
    largest = max(255 if bytewise else tokenizer.vocab_size - 1, start or 0, end or 0)
    starts, learned, sizes = array("q"), array("q"), array("q")
    with _TokenFile(np.dtype(np.min_scalar_type(largest)), folder) as tokens:

        def finish(last: Piece) -> None:
            if end is not None:
                tokens.append([end])
            length = tokens.count - starts[-1]
            if not length:  # a tokenizer may drop white space, and has no end token here: there is no document
                del starts[-1], learned[-1], sizes[-1]
                return
            if window is not None and learned[-1] > starts[-1] + 1 and length > window + 1:
                raise InputError(
                    f"{last.path}, line {last.line}: prompt and completion take {length:,} tokens, more than the "
                    f"window of {window:,}: raise window, or shorten or remove the document"
                )

        opening, last = True, None
        for piece, ids in _encoded(pieces, tokenizer, bytewise):
            opening = opening or piece.begins
            if not piece.text:
                continue
            if opening:
                if last is not None:
                    finish(last)
                starts.append(tokens.count)
                learned.append(-1)
                sizes.append(0)
                if start is not None:
                    tokens.append([start])
                opening = False
            if piece.learned:
                if learned[-1] < 0:
                    learned[-1] = max(tokens.count, starts[-1] + 1)
                sizes[-1] += len(piece.text.encode())
            tokens.append(ids)
            last = piece
        if last is None:
            raise InputError("the files hold no text; name others")
        finish(last)
        if not starts:
            raise InputError("the tokenizer makes no token of the text in the files; name others")
        corpus = Corpus(tokens.mapped(), np.array(starts), np.array(learned), sum(sizes))
        if not corpus.num_predictions:
            raise InputError("nothing in the text is predicted: every document is a single token; name longer ones")
        return corpus


def _encoded(pieces: Iterable[Piece], tokenizer: Tokenizer, bytewise: bool) -> Iterator[tuple[Piece, list[int]]]:
    """Pair pieces with their ids; with a tokenizer that is not byte-wise, the pieces of a document are joined first."""
    if bytewise:
        yield from ((piece, _encode(piece, tokenizer)) for piece in pieces)
        return
    prompt, before = Piece(""), list[int]()
    for piece in _joined(pieces):
        ids = _encode(piece, tokenizer)
        if not piece.learned:
            prompt, before = piece, ids
        elif not piece.begins:
            both = _encode(replace(piece, text=prompt.text + piece.text), tokenizer)
            if both[: len(before)] == before:
                ids = both[len(before) :]
        yield piece, ids


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Join the pieces of a document; a prompt and its completion stay apart."""
    first, texts = None, list[str]()
    for piece in pieces:
        if first is None or piece.begins or piece.learned != first.learned:
            if first is not None:
                yield replace(first, text="".join(texts))
            first, texts = piece, []
        texts.append(piece.text)
    if first is not None:
        yield replace(first, text="".join(texts))


def _encode(piece: Piece, tokenizer: Tokenizer) -> list[int]:
    try:
        piece.text.encode()  # an unpaired surrogate, which JSON can name, is no character
        return tokenizer.encode(piece.text, add_special_tokens=False)
    except UnicodeEncodeError as error:
        raise InputError(
            f"{piece.path}, line {piece.line}: an unpaired surrogate at character {error.start} is not valid Unicode"
        ) from error
    except InputError as error:
        raise InputError(f"{piece.path}, line {_failing_line(piece, tokenizer)}: {error}") from None


def _failing_line(piece: Piece, tokenizer: Tokenizer) -> int:
    """Find the line of the file that the tokenizer refuses."""
    for number, line in enumerate(piece.text.split("\n") if piece.verbatim else [], start=piece.line):
        try:
            tokenizer.encode(line, add_special_tokens=False)
        except InputError:
            return number
    return piece.line


_TYPECODES = {array(code).itemsize: code for code in "LIHB"}


class _TokenFile:
    """An unnamed temporary file of token ids; the mapping outlives it."""

    def __init__(self, dtype: np.dtype[np.unsignedinteger], folder: Path | None) -> None:
        self.dtype, self.folder, self.count = dtype, folder, 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by __exit__
        except OSError as error:
            raise self._failure(error) from error

    def __enter__(self) -> _TokenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, ids: list[int]) -> None:
        try:
            self._file.write(array(_TYPECODES[self.dtype.itemsize], ids))  # faster than through numpy
        except OSError as error:
            raise self._failure(error) from error
        self.count += len(ids)

    def mapped(self) -> NDArray[np.unsignedinteger]:
        try:
            self._file.flush()
            return np.memmap(self._file, self.dtype, "r", shape=(self.count,))
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> OutputError:
        where = self.folder or tempfile.gettempdir()
        return OutputError(f"cannot keep the tokens in a temporary file in {where}: {error.strerror}; {cure(error)}")
