"""Variants of a VCF file, checked against a genome, and the windows in which they are scored."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from hyaena import extras
from hyaena.arguments import as_path, as_text_path, as_whole, each, whole
from hyaena.errors import InputError, printable, shown
from hyaena.records.genome import Genome, missing_contig, quiet
from hyaena.records.source import BYTE_ORDER_MARK, GZIP, open_source

_CURE = "check its name and permissions"
_BASES = frozenset("ACGT")
_LINE = 1 << 24
"""Bytes of a line that are read; genotypes may follow behind."""


class Variant(NamedTuple):
    """One alternative allele.

    Attributes:
        contig: its name.
        start: where the reference allele begins, from 0; VCF counts from 1.
        reference, alternative: letters in upper case. A symbolic alternative is as the file has it.
        name: the file's ID, or empty.
        place: where it stands in its file, for messages: ``line 12``.
    """

    contig: str
    start: int
    reference: str
    alternative: str
    name: str = ""
    place: str = ""

    def __str__(self) -> str:
        return f"{self.contig}:{self.start + 1} {self.reference}>{self.alternative}"


class Windows(NamedTuple):
    """Where the window of a variant begins and ends.

    Attributes:
        size: letters of a window.
        grid: windows begin at its multiples, so that neighbouring variants share one. 1 puts a variant in the middle.
    """

    size: int
    grid: int = 1

    @classmethod
    def of(cls, size: int, grid: int = 1) -> Windows:
        """Check both numbers.

        Raises:
            InputError: one is out of range.
        """
        whole("window", size, "at least 2", 2)
        whole("grid", grid, f"between 1 and half a window, {size // 2}", 1, size // 2)
        return cls(size, grid)

    def place(self, start: int, length: int) -> tuple[int, int]:
        """The window of a variant at ``start`` in a contig of ``length`` letters: first letter, and behind the last.

        It begins at ``floor((start - size // 2) / grid) * grid``, so that ``size // 2`` to ``size // 2 + grid - 1``
        letters stand before the variant, but not before the contig. It is cut off where the contig ends.
        """
        first = max(0, (start - self.size // 2) // self.grid * self.grid)
        return first, min(length, first + self.size)


class Checked(NamedTuple):
    """A variant in its window, or why it cannot be scored; what a job calls a record.

    Attributes:
        index: its number among the alternatives of the file, from 0.
        variant: of the file.
        first, stop: the window, from 0, half-open.
        text: letters of the window; the reason where the variant cannot be scored.
        problem: whether ``text`` is a reason.
    """

    index: int
    variant: Variant
    first: int
    stop: int
    text: str
    problem: bool = False

    @property
    def name(self) -> str:
        """The variant and its ID, which is in its row."""
        return f"{self.variant} ({self.variant.name})" if self.variant.name else str(self.variant)

    @property
    def place(self) -> str:
        return self.variant.place


def read_variants(path: str | Path) -> Iterator[Variant]:
    """Read the alternatives of a VCF or BCF file, plain or compressed by gzip or bgzip, in order.

    Raises:
        InputError: the file cannot be read, or is not VCF; the message names the line.
        UnsupportedError: the file is BCF, and pysam is not installed.
    """
    path = as_path("the file of variants", path)
    label = printable(str(path))
    if path.is_dir():
        raise InputError(f"{label} is a folder: name a VCF file")
    if path.exists() and not path.is_file():
        raise InputError(f"{label} is a pipe or a device, and variants are read more than once: write them to a file")
    with open_source(path, label, compressed=False, cure=_CURE) as file:
        compressed = file.read(2) == GZIP
    with open_source(path, label, compressed=compressed, cure=_CURE) as file:
        is_bcf = file.read(3) == b"BCF"
    rows = _read_bcf(path, label) if is_bcf else _read_vcf(path, label, compressed)
    for contig, position, name, reference, alternatives, place in rows:
        for alternative in alternatives:
            letters = alternative if _is_symbolic(alternative) else alternative.upper()
            yield Variant(contig, position - 1, reference.upper(), letters, "" if name == "." else name, place)


_Rows = Iterator[tuple[str, int, str, str, Sequence[str], str]]
"""CHROM, POS, ID, REF, the alternatives and the place of each record."""


def _read_vcf(path: Path, label: str, compressed: bool) -> _Rows:
    """The first five columns of each line; what follows them, genotypes among them, is counted only."""
    number, header, tabs = 0, False, 0  # tabs of the header
    with open_source(path, label, compressed=compressed, cure=_CURE) as file:
        while raw := file.readline(_LINE):
            number += 1
            raw = raw.removeprefix(BYTE_ORDER_MARK if number == 1 else b"")
            line, found = raw, raw.count(b"\t")
            while not line.endswith(b"\n") and (line := file.readline(_LINE)):
                found += line.count(b"\t")
            if number == 1 and not raw.startswith(b"##fileformat=VCF"):
                raise InputError(f"{label} is not VCF, which begins with '##fileformat=VCFv4.2' or another version")
            if raw.startswith(b"#"):
                if raw.startswith(b"#CHROM"):
                    header, tabs = True, found
                continue
            if not raw.strip():
                continue
            columns = raw.rstrip(b"\r\n").split(b"\t", 5)
            whole = len(columns) == 6 or len(raw) < _LINE
            if header and 4 <= found < tabs and not line.endswith(b"\n"):  # half an allele is another variant
                raise InputError(
                    f"{label}, line {number}: the file ends after {found + 1:,} of {tabs + 1:,} columns, not with a "
                    "line: it was cut off; copy it again"
                )
            if not header or len(columns) < 5 or not whole or not re.fullmatch(rb"\d{1,18}", columns[1]):
                raise InputError(
                    f"{label}, line {number}: not a record of VCF, which has CHROM, POS, ID, REF and ALT between tabs "
                    f"(less than {_LINE >> 20} MiB together), below a line '#CHROM…'; correct it, or remove it"
                )
            try:
                contig, _, name, reference, alternatives = (column.decode() for column in columns[:5])
            except UnicodeDecodeError as error:
                raise InputError(f"{label}, line {number}: not UTF-8; correct it, or remove it") from error
            yield contig, int(columns[1]), name, reference, alternatives.split(","), f"line {number}"
    if not header:
        raise InputError(f"{label} is not VCF, which has a line that begins with '#CHROM' above its records")


def _read_bcf(path: Path, label: str) -> _Rows:
    extras.require("pysam", extra="genomics", purpose="reading BCF")
    path = as_text_path("the file of variants", path, "pysam")
    import pysam

    number = 0
    try:
        with quiet(), pysam.VariantFile(str(path), drop_samples=True) as file:
            for number, record in enumerate(file, start=1):
                place = f"record {number}"
                yield record.contig, record.pos, record.id or "", record.ref or "", record.alts or (".",), place
    except (OSError, ValueError) as error:
        raise InputError(
            f"{label}, record {number + 1}: not BCF ({printable(str(error), limit=80)}); write it again with bcftools"
        ) from error


def check_variants(
    variants: Iterable[Variant], genome: Genome, windows: Windows, *, max_length: int
) -> Iterator[Checked]:
    """Put variants into their windows, and find out which of them cannot be scored.

    Args:
        variants: of a file.
        genome: whose letters they change.
        windows: where windows lie.
        max_length: the most letters of a window, its alternative in place.

    Raises:
        InputError: the genome cannot be read.
    """
    seen = _Seen()
    last: tuple[tuple[str, int, int], str] | None = None
    for index, variant in enumerate(each("variants", variants, "a list of records.Variant")):
        _require_variant(index, variant)
        reason = _reason(variant, genome)
        first = stop = 0
        if reason is None:
            first, stop = windows.place(variant.start, genome.lengths[variant.contig])
            grown = stop - first + len(variant.alternative) - len(variant.reference)
            if variant.start + len(variant.reference) > stop:
                reason = f"its reference allele of {len(variant.reference):,} letters reaches out of the window"
            elif grown > max_length:
                smaller = windows.size - grown + max_length
                would_do = f" (a window of {smaller:,} would do)" if smaller > 1 else ""
                reason = (
                    f"its window has {grown:,} letters with the alternative, and the model reads {max_length:,}"
                    f"{would_do}"
                )
        if reason is None:
            key = (variant.contig, first, stop)
            if last is None or last[0] != key:
                last = key, genome.fetch(*key)
            found = last[1][variant.start - first :][: len(variant.reference)]
            if found != variant.reference:
                reason = f"its reference allele is {_cut(variant.reference)}, and the genome has {_cut(found)} there"
            elif not seen.add(variant):
                reason = "the same variant stands before it"
        if reason is None and last is not None:
            yield Checked(index, variant, first, stop, last[1])
        else:
            yield Checked(index, variant, 0, 0, reason or "", True)


class _Seen:
    """The variants that stood before: 8 bytes each while positions rise, as in a sorted file, about 70 from then on."""

    def __init__(self) -> None:
        self._hashes = array("q")  # of all, while positions rise
        self._furthest: dict[str, int] = {}  # position in each contig
        self._place: tuple[str, int] | None = None  # of the last variant
        self._known = set[int]()  # hashes: of those at that place while positions rise, of all from then on
        self._rising = True

    def add(self, variant: Variant) -> bool:
        """Add a variant; return whether it is the first of its kind."""
        place = variant.contig, variant.start
        if self._rising and place != self._place:
            if variant.start > self._furthest.get(variant.contig, -1):
                self._known = set()
                self._place, self._furthest[variant.contig] = place, variant.start
            else:
                self._known = set(self._hashes)
                self._rising, self._hashes = False, array("q")
        identity = hash(variant[:4])
        if identity in self._known:
            return False
        self._known.add(identity)
        if self._rising:
            self._hashes.append(identity)
        return True


def _require_variant(index: int, variant: object) -> None:
    if isinstance(variant, Variant) and as_whole(variant.start) is not None:
        texts = variant.contig, variant.reference, variant.alternative
        if all(isinstance(text, str) for text in texts):
            return
    raise InputError(
        f"variant {index} must be a records.Variant: a contig, a start from 0, and the letters of the reference and of "
        f"the alternative, not {shown(variant)}"
    )


def _reason(variant: Variant, genome: Genome) -> str | None:
    """Why a variant cannot be scored, as far as its window does not matter."""
    contig, start, reference, alternative = variant[:4]
    if contig not in genome.lengths:
        return missing_contig(genome, contig)
    length = genome.lengths[contig]
    if not 0 <= start < length:
        return f"position {start + 1:,} is outside the contig, which has {length:,} letters"
    if alternative == ".":
        return "it has no alternative allele"
    if _is_symbolic(alternative):
        return f"its alternative {shown(alternative)} is symbolic, and names no letters"
    for what, allele in (("reference allele", reference), ("alternative", alternative)):
        if wrong := set(allele) - _BASES:
            return f"its {what} {_cut(allele)} has {shown(min(wrong))}, which is none of A, C, G, T"
        if not allele:
            return f"its {what} is empty"
    if reference == alternative:
        return "its alternative is the reference"
    return None


def _is_symbolic(allele: str) -> bool:
    """Whether an allele is ``<DEL>``, ``*``, a breakend or missing, by VCF 4.3, section 1.6.1."""
    return any(character in allele for character in "<>*[].")


def _cut(allele: str) -> str:
    return shown(allele if len(allele) <= 20 else allele[:17] + "…")
