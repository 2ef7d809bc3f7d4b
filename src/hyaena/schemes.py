"""Schemes of narrow weights: the bits of a number of a linear layer, and what is stored beside it. No torch.

A weight matrix [E,D] is cut along D into groups; the numbers of a group share a scale and, in some schemes, a minimum:

    w = scale·q                  8 bits, q in -128…127, or q an e4m3 number (4 exponent and 3 fraction bits)
    w = scale·(q - 8)            4 bits, q in 0…15, without minima
    w = scale·q + minimum        4 bits, with minima
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hyaena.errors import InputError, shown


@dataclass(frozen=True)
class Scheme:
    """How the numbers of a weight matrix are stored.

    Attributes:
        name: the key of ``SCHEMES``.
        bits: of a number, 8 or 4.
        group: neighbouring numbers of a row that share a scale; None for whole rows.
        minima: whether a group has a minimum beside its scale.
        floating: whether q is an e4m3 number, and no integer.
        scale_bytes: bytes of a scale and of a minimum, 4 (float32) or 2 (float16).
        head: the scheme of a head of its own in a model of this scheme: it is a small part of a model, and what it
            rounds is the logits.
    """

    name: str
    bits: int
    group: int | None
    minima: bool = False
    floating: bool = False
    scale_bytes: int = 2
    head: str = "int8"

    def groups(self, columns: int) -> int:
        """Groups of a row of so many columns."""
        return columns // (self.group or columns)

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix, its scales and its minima."""
        return rows * (columns * self.bits // 8 + self.groups(columns) * self.scale_bytes * (1 + self.minima))

    def check_columns(self, name: str, columns: int) -> None:
        """Refuse a layer whose rows are no whole groups.

        Raises:
            InputError: naming the layer and a scheme that takes it.
        """
        if columns % (self.group or 1):
            near = "int4" if self.group == 128 and columns % 32 == 0 else "int8"
            raise InputError(
                f"{name} has {columns} inputs, which do not divide by the groups of {self.group} of {self.name}: "
                f"choose {near}"
            )


SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", bits=8, group=None, scale_bytes=4),
        Scheme("int4", bits=4, group=32, minima=True),
        Scheme("int4-128", bits=4, group=128, minima=True),
        Scheme("float8", bits=8, group=None, scale_bytes=4, floating=True),
        Scheme("q8_0", bits=8, group=32, head="q8_0"),  # the blocks of GGUF of these names
        Scheme("q4_0", bits=4, group=32, head="q8_0"),
    )
}

CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8")
"""Names of the dtypes of keys and values in a cache; see ``ops.slots``."""


def scheme_of(name: str) -> Scheme:
    """A scheme by its name.

    Raises:
        InputError: there is none of this name.
    """
    found = SCHEMES.get(name) if isinstance(name, str) else None
    if found is None:
        raise InputError(f"weights {shown(name)} are unknown: choose one of {', '.join(SCHEMES)}")
    return found
