"""The other strand of a DNA sequence."""

from __future__ import annotations

from typing import TypeVar

from hyaena.errors import InputError, shown

Text = TypeVar("Text", bound=str | bytes)

_LETTERS = "ACGTURYSWKMBDHVN-"
_COMPLEMENTS = "TGCAAYRSWMKVHDBN-"
_PAIRS = dict(zip(_LETTERS + _LETTERS.lower(), _COMPLEMENTS + _COMPLEMENTS.lower(), strict=True))
_TABLE = str.maketrans(_PAIRS)


def reverse_complement(sequence: Text) -> Text:
    """Return the other strand, read in its own direction: complemented letter by letter, and reversed.

    Letters are those of IUPAC, in either case, which is kept: R (A or G) becomes Y (C or T), and so on; N, S, W and the
    gap ``-`` are their own complements. U becomes A, and A becomes T.

    Args:
        sequence: str or bytes.

    Raises:
        InputError: another character.

    Source: Cornish-Bowden 1985, "Nomenclature for incompletely specified bases in nucleic acid sequences".
    """
    text = sequence.decode("latin-1") if isinstance(sequence, bytes) else str(sequence)
    wrong = set(text) - _PAIRS.keys()
    if wrong:
        position = min(text.index(letter) for letter in wrong)
        raise InputError(
            f"{shown(text[position])} at position {position:,} is no base: the other strand needs A, C, G, T or IUPAC"
        )
    other = text.translate(_TABLE)[::-1]
    return other.encode("latin-1") if isinstance(sequence, bytes) else other  # type: ignore[return-value]
