"""The other strand of DNA."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyaena.errors import InputError
from hyaena.scoring import reverse_complement

IUPAC = "ACGTRYSWKMBDHVN-"
BASES = {
    "A": "A", "C": "C", "G": "G", "T": "T", "R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT", "M": "AC",
    "B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT", "-": "",
}  # fmt: skip


@given(st.text(IUPAC + IUPAC.lower(), max_size=40))
def test_twice_is_the_sequence_and_bytes_are_as_text(sequence: str) -> None:
    other = reverse_complement(sequence)
    assert reverse_complement(other) == sequence
    assert reverse_complement(sequence.encode()) == other.encode()
    assert [c.islower() for c in other] == [c.islower() for c in reversed(sequence)]


@pytest.mark.parametrize("letter", IUPAC)
def test_a_letter_stands_for_the_complements_of_its_bases(letter: str) -> None:
    expected = {{"A": "T", "C": "G", "G": "C", "T": "A"}[base] for base in BASES[letter]}
    assert set(BASES[reverse_complement(letter)]) == expected


def test_order_and_rna() -> None:
    assert reverse_complement("AACGTn") == "nACGTT"
    assert reverse_complement("GAU") == "ATC"


@pytest.mark.parametrize(("text", "letter"), [("ACGX", "X"), ("AC GT", " "), ("ACé", "é"), (b"AC\xff", "ÿ")])
def test_other_characters_are_refused_with_their_position(text: str | bytes, letter: str) -> None:
    position = len(text) - 1 if letter != " " else 2
    with pytest.raises(InputError, match=f"{letter}' at position {position} is no base"):
        reverse_complement(text)
