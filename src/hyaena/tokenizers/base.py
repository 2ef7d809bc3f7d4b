"""What every tokenizer offers, and decoding of single tokens as they arrive."""

from __future__ import annotations

import codecs
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import cached_property
from typing import Any

from hyaena.arguments import as_whole, kind_of, switch
from hyaena.errors import InputError, shown

MAX_VOCAB_SIZE = 2**22
"""Most ids of a vocabulary; a file that numbers its tokens beyond would only fill the memory."""


MAX_ITEMS = 2**24
"""Most items of a sequence that is read: an iterator might never end."""


class Tokenizer(ABC):
    """Turns text into token ids and back.

    Attributes:
        vocab_size: V, the ids are 0..V-1.
        bos_id: the id that begins a document, or None.
        eos_id: the id that ends a document in training, or None.
        other_eos_ids: further ids at which generation ends, from ``generation_config.json``.
        pad_id: the id that fills padded positions, or None.
    """

    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    other_eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    _pieces: list[bytes]
    # The encoder puts a space before each text, which decoding removes.
    _removes_leading_space: bool = False
    # The encoder puts one after each token of ``_verbatim``, too.
    _removes_space_after_added: bool = False
    # Added tokens that the encoder cuts out of a text before anything else: their own spaces are the text's.
    _verbatim: frozenset[int] = frozenset()

    @cached_property
    def _texts(self) -> dict[int, str]:
        """Texts of tokens that were met between characters: of what can be decoded by itself."""
        return {}

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id at which generation ends, ``eos_id`` first."""
        own = () if self.eos_id is None else (self.eos_id,)
        return own + tuple(token for token in self.other_eos_ids if token != self.eos_id)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Control tokens by name, such as ``{"</s>": 2}``; they decode to no text."""
        return {}

    def encode(
        self, text: str | bytes | bytearray | memoryview, *, special: bool = False, add_special_tokens: bool = True
    ) -> list[int]:
        """Turn a text into ids.

        Args:
            text: bytes are taken as they are where the tokenizer works on bytes, and must be UTF-8 where it does not.
            special: whether the name of a special token inside the text becomes that token. By default it is plain
                text: what people write, and what documents contain, must not end or begin a document.
            add_special_tokens: put ``bos_id`` in front (once) where the tokenizer's models expect it.

        Raises:
            InputError: the text cannot be encoded.
        """
        switch("special", special)
        switch("add_special_tokens", add_special_tokens)
        if isinstance(text, memoryview) and text.itemsize != 1:
            raise InputError(f"a memoryview of numbers ({text.format}) is no text: pass a list of token ids")
        if isinstance(text, bytearray | memoryview):
            text = bytes(text)
        if not isinstance(text, str | bytes):
            raise InputError(f"only text can be encoded (str or bytes), not {kind_of(text)}")
        return self._encode(text, special, add_special_tokens)

    def tokens_within(self, characters: str) -> list[int]:
        """The ids of all tokens whose text has no other characters than these, special tokens left out.

        Raises:
            InputError: no characters, or one that occurs in none of these tokens.
        """
        wanted, found = set(characters), {}
        for token, piece in enumerate(self._pieces[: self.vocab_size]):
            try:
                text = piece.decode()
            except UnicodeDecodeError:  # part of a character
                continue
            if text and wanted.issuperset(text):
                found[token] = text
        missing = wanted.difference(*found.values())
        if missing or not wanted:
            what = f"{min(missing)!r}" if missing else "no character"
            raise InputError(f"no token of the tokenizer stands for {what} alone: name token ids")
        return list(found)

    @abstractmethod
    def _encode(self, text: str | bytes, special: bool, add_special_tokens: bool) -> list[int]:
        """``encode`` with checked arguments."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the exact bytes that the ids stand for; special tokens stand for none.

        Raises:
            InputError: something that is no id, or an id outside 0..V-1.
        """
        remove, parts = self._removes_leading_space, []
        for token in token_ids(ids):
            data, remove = self._bytes_of(token, remove)
            parts.append(data)
        return b"".join(parts)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token inside a text: those of ``decode_bytes``, with its leading space.

        Raises:
            InputError: as ``decode_bytes``.
        """
        return self._bytes_of(token, remove=False)[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text that the ids stand for; bytes that are not UTF-8 become U+FFFD (see ``decode_bytes``).

        Raises:
            InputError: as ``decode_bytes``.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self, *, after: Iterable[int] = ()) -> TextStream:
        """Return a decoder for ids that arrive one by one.

        Args:
            after: the ids before the stream, usually the prompt. Their text is not repeated, but a character that
                they leave unfinished is finished, and a leading space is kept when they stand for text.

        Raises:
            InputError: as ``decode_bytes``.
        """
        return TextStream(self, token_ids(after))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._described()})"

    def _described(self) -> str:
        return f"vocab_size={self.vocab_size}, bos_id={self.bos_id}, eos_ids={list(self.eos_ids)}"

    def _piece(self, token: int) -> bytes:
        if type(token) is not int:  # of numpy, say; anything else has no table entry
            number = as_whole(token)
            if number is None:
                raise InputError(f"a token id is a whole number, not {shown(token)}")
            token = number
        if not 0 <= token < self.vocab_size:
            raise InputError(f"token id {shown(token)} is outside the vocabulary 0..{self.vocab_size - 1}")
        return self._pieces[token]

    def _bytes_of(self, token: int, remove: bool) -> tuple[bytes, bool]:
        """The bytes of a token, and whether the next one loses its leading space; ``remove``: whether this one does."""
        data = self._piece(token)
        if token in self._verbatim:
            return data, self._removes_space_after_added or (remove and not data)
        if not data:
            return data, remove
        return data.removeprefix(b" ") if remove else data, False


class TextStream:
    """Decodes ids one by one; never emits part of a character.

    The texts that ``push`` and ``flush`` return, joined, are ``tokenizer.decode`` of all ids. Each push costs
    time proportional to the token's own bytes; at most three bytes are held back.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._known = tokenizer._texts
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # An unfinished character is at most three bytes long, and what precedes it cannot change its meaning.
        context = b""
        first = len(after)
        while first > 0 and len(context) < 3:
            first -= 1
            context = tokenizer._piece(after[first]) + context
        # Whether a leading space is removed depends on the last token that decodes to text, and what follows it.
        self._remove = tokenizer._removes_leading_space and first == 0
        for token in after[first:]:
            _, self._remove = tokenizer._bytes_of(token, self._remove)
        self._utf8.decode(context[-3:])
        self._plain = self._between

    @property
    def _between(self) -> bool:
        """Whether the next token's text is its own: no character is unfinished, and no space is to be removed."""
        return not (self._remove or self._utf8.getstate()[0])

    def push(self, token: int) -> str:
        """Return the text that this token completes; empty while a character is unfinished."""
        if self._plain and type(token) is int and (known := self._known.get(token)) is not None:
            return known
        before = self._plain
        data, self._remove = self._tokenizer._bytes_of(token, self._remove)
        text = self._utf8.decode(data)
        self._plain = self._between
        if before and self._plain and type(token) is int:
            self._known[token] = text
        return text

    def flush(self) -> str:
        """Return the rest at the end: U+FFFD if a character stayed unfinished. Then the decoder is at its start."""
        text = self._utf8.decode(b"", final=True)
        self._plain = self._between
        return text


def token_ids(values: Any, what: str = "token ids") -> list[int]:
    """Turn any sequence of whole numbers into a list: lists, ranges, iterators, numpy arrays, tensors of one dimension.

    Raises:
        InputError: texts, mappings, sets, single numbers, several dimensions, or values that are no whole numbers.
    """
    items = as_list(values, f"{what} must be a list of whole numbers, not ")
    if all(type(item) is int for item in items):
        return items
    ids = [as_whole(item) for item in items]
    for item, number in zip(items, ids, strict=True):
        if number is None:
            raise InputError(f"{what} must be whole numbers, and one is {shown(item)}")
    return ids  # pyright: ignore[reportReturnType]  None was excluded


def as_list(values: Any, problem: str) -> list[Any]:
    """The items of a sequence, an iterator, an array or a tensor.

    Raises:
        InputError: ``problem`` and what the value is: text, something without items or without their order, a tensor
            without values, or an iterator that does not end.
    """
    if isinstance(values, str | bytes | bytearray | memoryview | Mapping | Set) or not hasattr(values, "__iter__"):
        raise InputError(problem + kind_of(values))
    try:
        content = values.tolist() if hasattr(values, "tolist") else values
        if isinstance(content, str | bytes):  # an array without dimensions that holds a text
            raise InputError(problem + kind_of(values))
        items = list(itertools.islice(content, MAX_ITEMS + 1))
    except (TypeError, ValueError, RuntimeError) as error:  # on the meta device, or without dimensions
        raise InputError(problem + kind_of(values)) from error
    if len(items) > MAX_ITEMS:
        raise InputError(f"{problem}{kind_of(values)} of more than {MAX_ITEMS:,} items")
    return items


def to_bytes(text: str | bytes, *, allow_escapes: bool = True) -> bytes:
    """The UTF-8 bytes of a text.

    Raises:
        InputError: the text has an unpaired surrogate.
    """
    if isinstance(text, bytes):
        return text
    try:
        # Python represents undecodable bytes of arguments and file names by lone surrogates: turn them back.
        return text.encode("utf-8", errors="surrogateescape" if allow_escapes else "strict")
    except UnicodeEncodeError as error:
        raise InputError(f"the text has an unpaired surrogate at character {error.start}: not valid Unicode") from error
