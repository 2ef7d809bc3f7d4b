"""Chat templates on tokenizers of transformers."""

from __future__ import annotations

from typing import Any

from hyaena.errors import InputError, nearest, printable
from hyaena.tokenizers import TEMPLATES


def set_chat_template(tokenizer: Any, name: str = "nous") -> None:
    """Give a tokenizer a chat template of this package, in place: ``apply_chat_template`` and TRL then use it.

    The template writes the end token by its name. So from then on names of special tokens inside a text are read as the
    tokens, in messages, too: remove them from what others write.

    Args:
        tokenizer: of transformers.
        name: ``"nous"``, the format of StripedHyena-Nous-7B; see ``tokenizers.chat``.

    Raises:
        InputError: an unknown name, or a tokenizer without an end token, whose responses would never end.
    """
    if name not in TEMPLATES:
        known = nearest(name, TEMPLATES) or ", ".join(TEMPLATES)
        raise InputError(f"there is no chat template {printable(name)}: choose {known}")
    if tokenizer.eos_token is None:
        raise InputError("the tokenizer has no end token (eos_token): name one, so that responses end")
    tokenizer.chat_template = TEMPLATES[name]
    tokenizer.split_special_tokens = False
