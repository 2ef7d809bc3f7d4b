"""What a client gets for a completion or a chat: as a whole, or as the parts of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from hyaena.serve.engine import Delta
from hyaena.serve.logprobs import TextOffsets, TokenInfo, chat_logprobs, completion_logprobs, infos
from hyaena.serve.protocol import ChatBody, CompletionBody
from hyaena.serve.service import (
    Choice,
    Generation,
    Served,
    Unwritten,
    new_id,
    reason,
    text_of,
)

ENCODER = json.JSONEncoder(separators=(",", ":"))
"""All in ASCII: many clients take U+2028, U+2029 or U+0085 in a text for the end of an event's line."""


class CompletionAnswer:
    """The form of /v1/completions.

    Args:
        served: the model.
        body: of the client.
        prefixes: what ``echo`` puts in front of the completions, by prompt.

    Attributes:
        long: whether parts may have log-probabilities of a prompt, which take milliseconds to be written.
    """

    def __init__(self, served: Served, body: CompletionBody, prefixes: Sequence[tuple[str, list[TokenInfo]]]) -> None:
        self.served, self.body, self.prefixes = served, body, prefixes
        self.long = any(tokens for _, tokens in prefixes)
        self.frame = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }
        self._offsets: dict[int, TextOffsets] = {}  # of choices of which something was sent
        self._begun: set[int] = set()  # choices of which something was sent
        self._plain = body.logprobs is None and not body.return_token_ids and not prefixes

    def _prefix(self, choice: Choice) -> tuple[str, list[TokenInfo]]:
        return self.prefixes[choice.index // (self.body.n or 1)] if self.prefixes else ("", [])

    def _choice(self, choice: Choice, deltas: Sequence[Delta], finish_reason: str | None) -> dict[str, Any]:
        """Tokens of a choice behind those that were sent, if any were."""
        text, tokens = text_of(deltas), infos(deltas)
        if choice.index not in self._begun:
            self._begun.add(choice.index)
            prefix, before = self._prefix(choice)
            text, tokens = prefix + text, before + tokens
        made = {"index": choice.index, "text": text, "logprobs": None, "finish_reason": finish_reason}
        if self.body.logprobs is not None:
            made["logprobs"] = self._logprobs(choice, tokens)
        if self.body.return_token_ids:
            made["token_ids"] = [info.token for info in tokens]
            made["token_texts"] = [info.text for info in tokens]
        return made

    def _logprobs(self, choice: Choice, tokens: Sequence[TokenInfo]) -> dict[str, Any]:
        tokenizer = self.served.tokenizer
        if choice.index not in self._offsets:
            self._offsets[choice.index] = TextOffsets(tokenizer, () if self.prefixes else choice.prompt)
        return completion_logprobs(tokenizer, tokens, self._offsets[choice.index], with_ids=self.body.return_token_ids)

    def first(self, choices: Sequence[Choice]) -> list[str]:
        """What a stream begins with: choices as JSON."""
        return []

    def part(self, choice: Choice, deltas: Sequence[Delta]) -> str:
        """Tokens of a stream that came together: a choice as JSON."""
        ended = reason(deltas)
        if self._plain and ended is None:  # without the encoder, which takes longer
            text = json.dumps(text_of(deltas))
            return f'{{"index":{choice.index},"text":{text},"logprobs":null,"finish_reason":null}}'
        return ENCODER.encode(self._choice(choice, deltas, ended))

    def whole(self, generation: Generation | Unwritten) -> dict[str, Any]:
        """The answer without streaming."""
        made = [self._choice(choice, choice.deltas, choice.finish_reason) for choice in generation.choices]
        return self.frame | {"choices": made, "usage": generation.usage()}


class ChatAnswer:
    """The form of /v1/chat/completions.

    Args:
        served: the model.
        body: of the client.

    Attributes:
        long: see ``CompletionAnswer``.
    """

    long = False

    def __init__(self, served: Served, body: ChatBody) -> None:
        self.served, self.body = served, body
        self.frame = {
            "id": new_id("chatcmpl"),
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": served.name,
        }

    def _logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        return chat_logprobs(self.served.tokenizer, infos(deltas)) if self.body.logprobs else None

    def first(self, choices: Sequence[Choice]) -> list[str]:
        """See ``CompletionAnswer``."""
        delta = {"role": "assistant", "content": ""}
        return [
            ENCODER.encode({"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None})
            for choice in choices
        ]

    def part(self, choice: Choice, deltas: Sequence[Delta]) -> str:
        """See ``CompletionAnswer``."""
        text = text_of(deltas)
        ended = reason(deltas)
        if not self.body.logprobs and ended is None:
            said = f'{{"content":{json.dumps(text)}}}' if text else "{}"
            return f'{{"index":{choice.index},"delta":{said},"logprobs":null,"finish_reason":null}}'
        made = {"index": choice.index, "delta": {"content": text} if text else {}, "logprobs": self._logprobs(deltas)}
        return ENCODER.encode(made | {"finish_reason": ended})

    def whole(self, generation: Generation | Unwritten) -> dict[str, Any]:
        """See ``CompletionAnswer``."""
        made = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice.deltas),
                "finish_reason": choice.finish_reason,
            }
            for choice in generation.choices
        ]
        return self.frame | {"choices": made, "usage": generation.usage()}
