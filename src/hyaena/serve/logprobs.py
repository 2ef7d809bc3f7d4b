"""Log-probabilities of tokens in the two forms of the API."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from hyaena.serve.engine import Delta
from hyaena.tokenizers import Tokenizer

MIN_LOGPROB = -9999.0
"""Sent in place of -infinity, which JSON does not have."""


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; one that is no text of its own as its bytes, ``bytes:\\xe2``."""
    name = next((name for name, number in tokenizer.special_tokens.items() if number == token), None)
    if name is not None:
        return name
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return logprob if math.isfinite(logprob) else MIN_LOGPROB


class TokenInfo(NamedTuple):
    """A token of an answer.

    Attributes:
        token: its id.
        logprob: its log-probability; None where nothing predicts it.
        top: the most probable ones in its place.
        text: what it added to the text of the answer: nothing while a character or a stop string was unfinished.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()
    text: str = ""


def infos(deltas: Sequence[Delta]) -> list[TokenInfo]:
    """The tokens of a choice."""
    return [TokenInfo(delta.token, delta.logprob, delta.top, delta.text) for delta in deltas if delta.token is not None]


class TextOffsets:
    """Where the tokens of a text begin, in characters.

    Args:
        tokenizer: of the tokens.
        after: tokens before the text, which are not counted.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer, self._stream, self._length = tokenizer, tokenizer.stream(after=after), 0

    def next(self, token: int) -> int:
        """The place of the next token: of the character that its first byte belongs to."""
        before = self._length
        self._length += len(self._stream.push(token))
        return max(before, self._length - len(self._tokenizer.token_bytes(token).decode(errors="replace")))


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[TokenInfo], offsets: TextOffsets, *, with_ids: bool = False
) -> dict[str, Any]:
    """The form of /v1/completions.

    ``with_ids`` adds ``top_token_ids``, which has an id for every text in ``top_logprobs``.
    """
    texts, values, places, tops, ids = [], [], [], [], []
    for info in tokens:
        text = token_text(tokenizer, info.token)
        texts.append(text)
        places.append(offsets.next(info.token))
        if info.logprob is None:
            for column in (values, tops, ids):
                column.append(None)
            continue
        named = {token_text(tokenizer, token): (token, logprob) for token, logprob in reversed(info.top)}
        named[text] = (info.token, info.logprob)
        values.append(finite(info.logprob))
        tops.append({name: finite(logprob) for name, (_, logprob) in named.items()})
        ids.append({name: token for name, (token, _) in named.items()})
    made = {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": places}
    return made | ({"top_token_ids": ids} if with_ids else {})


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenInfo]) -> dict[str, Any]:
    """The form of /v1/chat/completions."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        data = list(tokenizer.token_bytes(token))
        return {"token": token_text(tokenizer, token), "logprob": finite(logprob or 0.0), "bytes": data}

    return {
        "content": [
            entry(info.token, info.logprob) | {"top_logprobs": [entry(*pair) for pair in info.top]} for info in tokens
        ]
    }
