"""Conversations as prompts: chat templates, rendered in a sandbox, and tokenized so that messages stay text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hyaena.errors import InputError, printable
from hyaena.mappings import read_mapping, read_text
from hyaena.tokenizers import Tokenizer
from hyaena.tokenizers.chat import TEMPLATES

MAX_TEMPLATE = 2**16
"""Characters of a template."""

MAX_RENDERED = 2**24
"""Characters of a rendered conversation."""


class _Generation(Extension):
    """``{% generation %}``, by which templates mark what a loss counts: here its content."""

    tags = {"generation"}  # noqa: RUF012, jinja2's interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Turns messages into the ids of a prompt.

    Args:
        source: a Jinja template over ``messages``, ``bos_token``, ``eos_token`` and ``add_generation_prompt``.

    Raises:
        InputError: it is too long, or no template.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE:
            raise InputError(f"the chat template has {len(source):,} characters, more than {MAX_TEMPLATE:,}")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        self.source = source
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise InputError(f"the chat template cannot be read: {printable(str(error))}") from None

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation, up to where the assistant speaks.

        Names of special tokens that the template writes become these tokens; inside a message they are text.

        Raises:
            InputError: messages that the template does not take.
        """
        special = tokenizer.special_tokens
        names = sorted(special, key=len, reverse=True)
        mark = _unused_character(messages)
        pattern = re.compile("|".join(map(re.escape, names))) if names else None

        heads = {name[:end] for name in names for end in range(1, len(name))}
        tails = {name[start:] for name in names for start in range(1, len(name))}

        def marked(text: str) -> str:
            if pattern is None:
                return text
            text = pattern.sub(lambda found: found[0][0] + mark + found[0][1:], text)
            # Nor does it become one together with what the template, or the next message, puts beside it.
            begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
            if any(text[:end].endswith(head) for head in heads):
                text = text[:end] + mark + text[end:]
            if any(text.startswith(tail, begin) for tail in tails):
                text = text[:begin] + mark + text[begin:]
            return text

        text = self._render(tokenizer, [{**message, "content": marked(message["content"])} for message in messages])
        if pattern is None:
            return tokenizer.encode(text)
        ids: list[int] = []
        end = 0
        for found in pattern.finditer(text):
            ids += self._encode_text(tokenizer, text[end : found.start()].replace(mark, ""))
            ids.append(special[found[0]])
            end = found.end()
        ids += self._encode_text(tokenizer, text[end:].replace(mark, ""))
        return ids

    def _render(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> str:
        by_id = {token: name for name, token in tokenizer.special_tokens.items()}
        parts, length = [], 0
        try:
            for part in self._template.generate(
                messages=messages,
                add_generation_prompt=True,
                bos_token="" if tokenizer.bos_id is None else by_id.get(tokenizer.bos_id, ""),
                eos_token="" if tokenizer.eos_id is None else by_id.get(tokenizer.eos_id, ""),
            ):
                parts.append(part)
                length += len(part)
                if length > MAX_RENDERED:
                    raise InputError(f"the conversation is longer than {MAX_RENDERED:,} characters: shorten it")
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the chat template does not take these messages: {printable(str(error))}") from None
        return "".join(parts)

    @staticmethod
    def _encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False) if text else []


def _raise(message: str) -> None:
    raise TemplateError(message)


def _unused_character(messages: Sequence[Mapping[str, str]]) -> str:
    """A character of the private use area that no message has."""
    used = {character for message in messages for character in message["content"]}
    return next(chr(code) for code in itertools.count(0xE000) if chr(code) not in used)


def find_template(name: str | None, folders: Sequence[Path], model_name: str) -> ChatTemplate | None:
    """The template of a model: one that is named, that of a folder, or what is known of the model.

    Args:
        name: a name in ``tokenizers.TEMPLATES``, or a file.
        folders: of its adapter and of the model: the first with a template in ``chat_template.jinja`` or in
            ``tokenizer_config.json``.
        model_name: StripedHyena-Nous-7B has the format of its card.

    Raises:
        InputError: an unknown name, or a file that cannot be read.
    """
    if name is not None:
        if name in TEMPLATES:
            return ChatTemplate(TEMPLATES[name])
        if not Path(name).is_file():
            raise InputError(f"there is no chat template {printable(name)}: name {', '.join(TEMPLATES)}, or a file")
        return ChatTemplate(read_text(Path(name)))
    for folder in folders:
        if (folder / "chat_template.jinja").is_file():
            return ChatTemplate(read_text(folder / "chat_template.jinja"))
        if (folder / "tokenizer_config.json").is_file():
            found = read_mapping(folder / "tokenizer_config.json").get("chat_template")
            if isinstance(found, list):  # of several, each with a name
                named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
                found = named.get("default")
            if isinstance(found, str):
                return ChatTemplate(found)
    return ChatTemplate(TEMPLATES["nous"]) if "nous" in model_name.lower() else None
