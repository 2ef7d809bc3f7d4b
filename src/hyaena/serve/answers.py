"""What a client gets for a completion or a chat: as a whole, or as the parts of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from hyaena.serve.engine import Delta
from hyaena.serve.protocol import ChatBody, CompletionBody, usage
from hyaena.serve.service import (
    Choice,
    Generation,
    Served,
    TokenInfo,
    chat_logprobs,
    completion_logprobs,
    infos,
    new_id,
    reason,
)

ENCODER = json.JSONEncoder(separators=(",", ":"))
"""All in ASCII: many clients take U+2028, U+2029 or U+0085 in a text for the end of an event's line."""


class CompletionAnswer:
    """The form of /v1/completions.

    Args:
        served: the model.
        body: of the client.
        prefixes: what ``echo`` puts in front of the completions, by prompt.
    """

    def __init__(self, served: Served, body: CompletionBody, prefixes: Sequence[tuple[str, list[TokenInfo]]]) -> None:
        self.served, self.body, self.prefixes = served, body, prefixes
        self.frame = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }
        self._offsets: dict[int, int] = {}  # characters of what a choice has sent
        self._begun: set[int] = set()  # choices of which something was sent
        self._plain = body.logprobs is None and not body.return_token_ids and not prefixes

    def _prefix(self, choice: Choice) -> tuple[str, list[TokenInfo]]:
        return self.prefixes[choice.index // (self.body.n or 1)] if self.prefixes else ("", [])

    def _choice(self, index: int, text: str, tokens: Sequence[TokenInfo], finish_reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self.body.logprobs is not None:
            logprobs, self._offsets[index] = completion_logprobs(
                self.served.tokenizer,
                tokens,
                self._offsets.get(index, 0),
                with_ids=self.body.return_token_ids,
            )
        made = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        if self.body.return_token_ids:
            made["token_ids"] = [info.token for info in tokens]
        return made

    def first(self, choices: Sequence[Choice]) -> list[str]:
        """What a stream begins with: choices as JSON."""
        return []

    def part(self, choice: Choice, delta: Delta) -> str:
        """One token of a stream: a choice as JSON."""
        if self._plain and delta.finish_reason is None:  # without the encoder, which takes longer
            return f'{{"index":{choice.index},"text":{json.dumps(delta.text)},"logprobs":null,"finish_reason":null}}'
        text, tokens = delta.text, list(infos([delta]))
        if choice.index not in self._begun:
            self._begun.add(choice.index)
            prefix, before = self._prefix(choice)
            text, tokens = prefix + text, before + tokens
        return ENCODER.encode(self._choice(choice.index, text, tokens, reason(delta)))

    def whole(self, choices: Sequence[Choice], generation: Generation | None) -> dict[str, Any]:
        """The answer without streaming; ``generation`` is None where the request wants no new token."""
        made = []
        for choice in choices:
            prefix, before = self._prefix(choice)
            tokens = [*before, *infos(choice.deltas)]
            made.append(self._choice(choice.index, prefix + choice.text, tokens, choice.finish_reason or "length"))
        used = generation.usage() if generation else usage(sum(len(choice.prompt) for choice in choices), 0, 0)
        return self.frame | {"choices": made, "usage": used}


class ChatAnswer:
    """The form of /v1/chat/completions.

    Args:
        served: the model.
        body: of the client.
    """

    def __init__(self, served: Served, body: ChatBody) -> None:
        self.served, self.body = served, body
        self.frame = {
            "id": new_id("chatcmpl"),
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": served.name,
        }

    def _logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        return chat_logprobs(self.served.tokenizer, list(infos(deltas))) if self.body.logprobs else None

    def first(self, choices: Sequence[Choice]) -> list[str]:
        """See ``CompletionAnswer``."""
        delta = {"role": "assistant", "content": ""}
        return [
            ENCODER.encode({"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None})
            for choice in choices
        ]

    def part(self, choice: Choice, delta: Delta) -> str:
        """See ``CompletionAnswer``."""
        said = {"content": delta.text} if delta.text else {}
        made = {"index": choice.index, "delta": said, "logprobs": self._logprobs([delta])}
        return ENCODER.encode(made | {"finish_reason": reason(delta)})

    def whole(self, choices: Sequence[Choice], generation: Generation) -> dict[str, Any]:
        made = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice.deltas),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return self.frame | {"choices": made, "usage": generation.usage()}
