"""Texts become records: token ids that were checked against a model, each with the number of its text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hyaena.arguments import as_whole, each, kind_of, whole
from hyaena.errors import HyaenaError, InputError, NonFiniteError
from hyaena.generation.settings import parse_prompts
from hyaena.model import StripedHyena
from hyaena.scoring.strands import reverse_complement
from hyaena.tokenizers import Tokenizer
from hyaena.tokenizers.base import as_list


class _OfOneText(HyaenaError):
    """An error that belongs to one of several texts.

    Attributes:
        index: the number of the text, from 0.
        reason: the message without that number.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"text {index}: {reason}")
        self.index = index
        self.reason = reason


class RecordError(_OfOneText, InputError):
    """One of several texts cannot be used; ``index`` is its number, ``reason`` the message without it."""


class NonFiniteRecordError(_OfOneText, NonFiniteError):
    """A model produced NaN or infinity for one of several texts; ``index`` and ``reason`` as in ``RecordError``."""


def as_texts(texts: Any) -> tuple[list[Any], bool]:
    """A list of texts, and whether there was one that was not in a list. The texts themselves are not checked.

    Raises:
        InputError: there are none.
    """
    if isinstance(texts, str | bytes | bytearray | memoryview | Excerpt):
        return [texts], True
    items = as_list(texts, "texts are text, bytes, a list of token ids, or a list of such, not ")
    if not items:
        raise InputError("there are no texts: give at least one")
    return ([items], True) if all(as_whole(item) is not None for item in items) else (items, False)


def _parse(text: Any) -> str | bytes | list[int]:
    """One text.

    Raises:
        InputError: it is empty, several, or something else.
    """
    if hasattr(text, "__len__") and len(text) == 0:
        raise InputError("it is empty: leave it out")
    if isinstance(text, list) and set(map(type, text)) == {int}:  # what follows takes long for millions of ids
        return text
    parsed, single = parse_prompts(text)
    if not single:
        raise InputError("a text is str, bytes or a list of token ids, not a list of texts")
    return parsed[0]


@dataclass(frozen=True)
class Excerpt:
    """A part of a longer text, which is read behind what stands before it, and scored and pooled alone.

    Attributes:
        text: the part.
        before: read first, as context.
        after: what stands behind; the other strand reads it first.
    """

    text: str
    before: str = ""
    after: str = ""


@dataclass(frozen=True, eq=False)
class Record:
    """The token ids of one text, or of its other strand.

    Attributes:
        index: the number of the text.
        ids: int64 [T], on the host.
        context: leading ids that are not the text's: BOS where it was put in front, and the context of an excerpt.
        reverse: whether this is the other strand.
    """

    index: int
    ids: Tensor
    context: int = 0
    reverse: bool = False

    @property
    def tokens(self) -> Tensor:
        """The text's own ids."""
        return self.ids[self.context :]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns texts into records.

    Attributes:
        tokenizer: of the model.
        vocab_size: of the model.
        max_length: the most tokens of a record.
        bos: whether ``bos_id`` is put in front; None for what the tokenizer does for texts, and not for token ids.
        special: whether names of special tokens in a text become these tokens.
        both_strands: every text gives two records, its own and that of the other strand.
    """

    tokenizer: Tokenizer
    vocab_size: int
    max_length: int
    bos: bool | None
    special: bool
    both_strands: bool

    @classmethod
    def of(
        cls,
        model: StripedHyena,
        tokenizer: Tokenizer,
        *,
        bos: bool | None,
        special: bool,
        both_strands: bool,
        max_length: int | None,
    ) -> Encoder:
        """Check what does not depend on a text.

        Raises:
            InputError: the tokenizer does not fit the model, or has no BOS to put in front.
        """
        size = model.config.vocab_size
        if not isinstance(tokenizer, Tokenizer):
            raise InputError(f"tokenizer must be the one that hyaena.load returns, not {kind_of(tokenizer)}")
        if tokenizer.vocab_size < size:
            raise InputError(
                f"the tokenizer has {tokenizer.vocab_size} ids and the model {size}: "
                f"make the tokenizer with vocab_size={size}"
            )
        if bos and tokenizer.bos_id is None:
            raise InputError("bos=True, but this tokenizer has no id that begins a document: leave it out")
        return cls(
            tokenizer=tokenizer,
            vocab_size=size,
            max_length=model.config.max_length
            if max_length is None
            else whole("max_length", max_length, "at least 1", 1),
            bos=bos,
            special=special,
            both_strands=both_strands,
        )

    @property
    def max_letters(self) -> int:
        """The most letters of a text, for a tokenizer that reads a letter as a token: what BOS leaves of the length."""
        return self.max_length - replace(self, max_length=1 << 62)._record(0, "A", False).context

    def records(self, texts: Iterable[Any]) -> Iterator[Record]:
        """The records of texts, in order.

        Raises:
            RecordError: a text that is empty, too long, or that the tokenizer or the model cannot read.
        """
        for index, text in enumerate(each("texts", texts, "a list of texts, or what gives them one after another")):
            try:
                if isinstance(text, Excerpt):
                    yield from self._excerpt(index, text)
                    continue
                text = _parse(text)
                yield self._record(index, text, False)
                if self.both_strands:
                    if isinstance(text, list):
                        raise InputError("both_strands needs text: token ids have no complement")
                    yield self._record(index, reverse_complement(text), True)
            except RecordError:
                raise
            except HyaenaError as error:
                raise RecordError(index, str(error)) from None

    def _excerpt(self, index: int, excerpt: Excerpt) -> Iterator[Record]:
        sides = [(excerpt.before, excerpt.text, False)]
        if self.both_strands:
            sides.append((reverse_complement(excerpt.after), reverse_complement(excerpt.text), True))
        for before, text, reverse in sides:
            record = self._record(index, _parse(before + text), reverse)
            if len(record.tokens) != len(before) + len(text) or not text:
                raise InputError(
                    f"{len(record.tokens):,} tokens stand for {len(before) + len(text):,} letters: an excerpt takes a "
                    "tokenizer that reads a letter as a token, and a text"
                )
            yield Record(index, record.ids, record.context + len(before), reverse)

    def _record(self, index: int, text: str | bytes | list[int], reverse: bool) -> Record:
        bos, given = self.tokenizer.bos_id, isinstance(text, list)
        if isinstance(text, list):
            ids = text
        else:
            ids = self.tokenizer.encode(text, special=self.special, add_special_tokens=self.bos is not False)
        context = int(not given and self.bos is not False and bos is not None and ids[:1] == [bos])
        if self.bos and not context:
            ids, context = [bos, *ids], 1
        tensor = torch.tensor(ids, dtype=torch.int64, device="cpu")
        if len(ids) == context:
            raise InputError("it has no tokens: leave it out")
        if len(ids) > self.max_length:
            raise InputError(
                f"{len(ids):,} tokens pass the maximum length {self.max_length:,}: "
                "shorten it, or pass a larger max_length"
            )
        low, high = (int(t) for t in tensor.aminmax())
        if low < 0 or high >= self.vocab_size:
            outside = low if low < 0 else high
            raise InputError(f"token id {outside} is outside the vocabulary 0..{self.vocab_size - 1} of the model")
        return Record(index, tensor, context, reverse)
