"""Parts of a stream: what is sent without the encoder is what the encoder writes."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from hyaena.serve.answers import CompletionAnswer
from hyaena.serve.engine import Delta
from hyaena.serve.protocol import CompletionBody
from hyaena.serve.service import Choice
from hyaena.tokenizers import ByteTokenizer

SERVED: Any = SimpleNamespace(name="tiny", tokenizer=ByteTokenizer())


@pytest.mark.parametrize("text", ["", "a", '"\\', "\u2028\x00é\n"])
def test_plain_parts(text: str) -> None:
    answer, choice = CompletionAnswer(SERVED, CompletionBody(prompt="x"), ()), Choice(3, [1])
    for reason in (None, "length"):
        part = answer.part(choice, [Delta(97, text, finish_reason=reason)])
        assert part.isascii() and "\n" not in part
        assert json.loads(part) == {"index": 3, "text": text, "logprobs": None, "finish_reason": reason}


def test_what_echo_puts_in_front_comes_once_however_much_has_come() -> None:
    """A reader that is late finds several tokens of a choice."""
    answer = CompletionAnswer(SERVED, CompletionBody(prompt="x", echo=True), [("before ", [])])
    choice = Choice(0, [1])
    choice.deltas += [Delta(97, "a"), Delta(98, "b")]
    texts = [json.loads(answer.part(choice, [delta]))["text"] for delta in choice.deltas]
    assert texts == ["before a", "b"]
