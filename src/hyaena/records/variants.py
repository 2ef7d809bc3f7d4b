"""Variants of a VCF file, checked against a genome, and the windows in which they are scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from hyaena import extras
from hyaena.arguments import whole
from hyaena.errors import InputError, printable, shown
from hyaena.records.genome import Genome, missing_contig
from hyaena.records.source import open_source

_CURE = "check its name and permissions"
_GZIP = b"\x1f\x8b"
_BASES = frozenset("ACGT")


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
        return str(self.variant)

    @property
    def place(self) -> str:
        return self.variant.place


def read_variants(path: str | Path) -> Iterator[Variant]:
    """Read the alternatives of a VCF or BCF file, plain or compressed by gzip or bgzip, in order.

    Raises:
        InputError: the file cannot be read, or is not VCF; the message names the line.
        UnsupportedError: pysam is not installed.
    """
    path, label = Path(path), printable(str(path))
    extras.require("pysam", extra="genomics", purpose="reading VCF")
    header = _header_lines(path, label)
    import pysam

    before = pysam.set_verbosity(0)  # what it prints of contigs that the header does not name
    try:
        with pysam.VariantFile(str(path), drop_samples=True) as file:
            yield from _alternatives(file, label, header)
    except (OSError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"{label} is not VCF or BCF ({printable(str(error), limit=80)}): VCF begins with '##fileformat=VCFv4.2'"
        ) from error
    finally:
        pysam.set_verbosity(before)


def _alternatives(file: Iterable, label: str, header: int | None) -> Iterator[Variant]:
    records, number = iter(file), 0
    while True:
        number += 1
        place = f"record {number}" if header is None else f"line {header + number}"
        try:
            record = next(records, None)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{label}, {place}: not a record of VCF, which has CHROM, POS, ID, REF and ALT between tabs, and no "
                "blank lines; correct it, or remove it"
            ) from error
        if record is None:
            return
        for alternative in record.alts or (".",):
            symbolic = _is_symbolic(alternative)
            yield Variant(
                record.contig,
                record.pos - 1,
                (record.ref or "").upper(),
                alternative if symbolic else alternative.upper(),
                record.id or "",
                place,
            )


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
    seen: set[int] = set()
    last: tuple[tuple[str, int, int], str] | None = None
    for index, variant in enumerate(variants):
        reason = _reason(variant, genome)
        first = stop = 0
        if reason is None:
            first, stop = windows.place(variant.start, genome.lengths[variant.contig])
            grown = stop - first + len(variant.alternative) - len(variant.reference)
            if variant.start + len(variant.reference) > stop:
                reason = f"its reference allele of {len(variant.reference):,} letters reaches out of the window"
            elif grown > max_length:
                reason = f"its window has {grown:,} letters with the alternative, and the model reads {max_length:,}"
        if reason is None:
            key = (variant.contig, first, stop)
            if last is None or last[0] != key:
                last = key, genome.fetch(*key)
            found = last[1][variant.start - first :][: len(variant.reference)]
            identity = hash(variant[:4])
            if found != variant.reference:
                reason = f"its reference allele is {_cut(variant.reference)}, and the genome has {_cut(found)} there"
            elif identity in seen:
                reason = "the same variant stands before it"
            seen.add(identity)
        if reason is None and last is not None:
            yield Checked(index, variant, first, stop, last[1])
        else:
            yield Checked(index, variant, 0, 0, reason or "", True)


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


def _header_lines(path: Path, label: str) -> int | None:
    """How many lines the header of a VCF file has; None for BCF, which has no lines.

    Raises:
        InputError: the file cannot be opened, or is a folder.
    """
    if path.is_dir():
        raise InputError(f"{label} is a folder: name a VCF file")
    if not path.is_file():
        raise InputError(f"cannot read {label}: no such file; {_CURE}")
    with open_source(path, label, compressed=False, cure=_CURE) as file:
        compressed = file.read(2) == _GZIP
    with open_source(path, label, compressed=compressed, cure=_CURE) as file:
        if file.read(3) == b"BCF":
            return None
    count = 0
    with open_source(path, label, compressed=compressed, cure=_CURE) as file:
        while line := file.readline(1 << 20):
            if not line.startswith(b"#"):
                break
            count += 1
            while not line.endswith(b"\n") and (line := file.readline(1 << 20)):
                pass
    return count
