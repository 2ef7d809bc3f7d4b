"""The tensor names of checkpoints that transformers writes: ours, with ``model.`` before all but the head's."""

from __future__ import annotations

from collections.abc import Iterable

PREFIX = "model."
_HEAD = "lm_head.weight"


def matches_tensors(keys: Iterable[str]) -> bool:
    """Whether a state dict is that of a ``StripedHyenaForCausalLM``."""
    keys = list(keys)
    return bool(keys) and all(key == _HEAD or key.startswith(PREFIX) for key in keys) and keys != [_HEAD]


def our_name(key: str) -> str:
    """Our name of a tensor."""
    return key.removeprefix(PREFIX)


def their_name(name: str) -> str:
    """The name in a ``StripedHyenaForCausalLM`` of a tensor of ours."""
    return name if name == _HEAD else PREFIX + name
