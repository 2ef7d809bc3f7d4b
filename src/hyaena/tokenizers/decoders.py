"""The ``decoder`` of a ``tokenizer.json``, compiled to a function from a token's name to its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hyaena.errors import UnsupportedError, shown

_MAX_NAME = 2**20
"""Most characters of one token's name, also while it is being decoded."""
_MAX_STEPS = 16


class PieceDecoder:
    """Does to one token's name what a decoder does, as far as that is made of bytes.

    Attributes:
        removes_leading_space: whether a text's leading space is removed.

    Args:
        spec: the ``decoder`` of the file, or None.
        path: the file, for messages.

    Raises:
        UnsupportedError: the decoder is of another kind.
    """

    def __init__(self, spec: Any, path: Path) -> None:
        self._path = path
        self._replacements: list[tuple[str, str]] = []
        self._byte_level = False
        self._byte_fallback = False
        self.removes_leading_space = False
        steps = [] if spec is None else [spec]
        if isinstance(spec, dict) and spec.get("type") == "Sequence" and isinstance(spec.get("decoders"), list):
            steps = spec["decoders"]
        if len(steps) > _MAX_STEPS:
            raise UnsupportedError(f"{path} decodes in {len(steps):,} steps: at most {_MAX_STEPS} are supported")
        for step in steps:
            self._add(step)

    def _add(self, step: Any) -> None:
        match step:
            case {"type": "ByteLevel"}:
                self._byte_level = True
            case {"type": "ByteFallback"}:
                self._byte_fallback = True
            case {"type": "Fuse"}:
                pass  # bytes are always joined
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old:
                self._replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(old)} if old:
                self._replacements.append((old, " "))
                scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
                self.removes_leading_space = scheme != "never"
            case {"type": "Strip", "content": " ", "start": (0 | 1) as start, "stop": 0}:
                self.removes_leading_space = start == 1
            case _:
                kind = step.get("type", step) if isinstance(step, dict) else step
                raise UnsupportedError(
                    f"{self._path} uses the decoder {shown(kind)}; supported: ByteLevel, Metaspace, and "
                    "sequences of Replace, ByteFallback, Fuse and Strip"
                )

    def is_byte(self, name: str) -> bool:
        """Whether a token encodes one byte that the vocabulary has no character for: ``<0x0A>``."""
        if not (self._byte_fallback and len(name) == 6 and name.startswith("<0x") and name.endswith(">")):
            return False
        return all(digit in "0123456789abcdefABCDEF" for digit in name[3:5])

    def __call__(self, name: str) -> bytes:
        """The bytes of a token that is not an added one."""
        if self.is_byte(name):
            return bytes([int(name[3:5], 16)])
        for old, new in self._replacements:
            if len(name) + name.count(old) * len(new) > _MAX_NAME:
                raise UnsupportedError(f"{self._path} has a token of more than {_MAX_NAME:,} characters")
            name = name.replace(old, new)
        if self._byte_level and all(character in _BYTE_OF for character in name):
            return bytes(_BYTE_OF[character] for character in name)
        return name.encode("utf-8", errors="replace")


def _byte_of_character() -> dict[str, int]:
    """The printable character by which byte-level BPE files write each byte.

    Printable Latin-1 bytes stand for themselves; the other 68 take the code points from 256 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + i): value for i, value in enumerate(others)}


_BYTE_OF = _byte_of_character()
CHARACTER_OF = {value: character for character, value in _BYTE_OF.items()}
"""The printable character by which byte-level files write each byte."""
