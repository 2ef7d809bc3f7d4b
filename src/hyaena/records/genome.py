"""Contigs of a genome, read a window at a time: from FASTA with an index, or from memory."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from hyaena import extras
from hyaena.arguments import as_text_path
from hyaena.errors import InputError, OutputError, nearest, printable, shown
from hyaena.files import write_atomically
from hyaena.records.fai import FastaIndex
from hyaena.records.source import BLOCK, GZIP, is_bgzip, open_source

_CURE = "check its name and permissions"
_LETTERS = frozenset("ACGTURYSWKMBDHVN")


class Genome(Protocol):
    """Contigs by name.

    Attributes:
        lengths: letters of each contig.
    """

    @property
    def lengths(self) -> Mapping[str, int]: ...

    def fetch(self, contig: str, start: int, stop: int) -> str:
        """The letters ``start`` to ``stop`` - 1 of a contig, from 0, in upper case."""
        ...


class MemoryGenome:
    """Contigs that are there as text.

    Args:
        sequences: contig -> letters.

    Raises:
        InputError: something that is no text.
    """

    def __init__(self, sequences: Mapping[str, str]) -> None:
        for name, text in sequences.items():
            if not isinstance(text, str):
                raise InputError(f"contig {shown(name)} must be text, not {type(text).__name__}")
        self._sequences = dict(sequences)
        self.lengths = {name: len(text) for name, text in self._sequences.items()}

    def fetch(self, contig: str, start: int, stop: int) -> str:
        """See ``Genome``."""
        return _checked(self._sequences[contig][start:stop], contig, start, stop)


class FastaGenome:
    """Contigs of a FASTA file, plain or compressed by bgzip, through its index (``.fai``, with bgzip ``.gzi`` too).

    An index that is not there is made beside the file, or where that cannot be written, for this process alone.

    Args:
        path: the file.

    Raises:
        InputError: the file or its index cannot be used; the message says what to do.
        UnsupportedError: pysam is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = as_text_path("the genome", path, "pysam")
        self.label = printable(str(self.path))
        extras.require("pysam", extra="genomics", purpose="reading a genome")
        if self.path.is_dir():
            raise InputError(f"{self.label} is a folder: name a FASTA file")
        if self.path.exists() and not self.path.is_file():
            raise InputError(f"{self.label} is a pipe or a device, where no part can be read alone: name a FASTA file")
        with open_source(self.path, self.label, compressed=False, cure=_CURE) as file:
            head = file.read(18)
        self._compressed = head.startswith(GZIP)
        if self._compressed and not is_bgzip(head):
            raise InputError(
                f"{self.label} is compressed by gzip, of which no part can be read alone: decompress it (gunzip), or "
                "compress it again with bgzip"
            )
        with (
            open_source(self.path, self.label, compressed=self._compressed, cure=_CURE),  # is the whole file there?
            tempfile.TemporaryDirectory() as folder,
            quiet(),
        ):
            self._file, self._index = self._open(Path(folder))
        self.lengths = dict(zip(self._file.references, self._file.lengths, strict=True))
        self._fitting = set[str]()  # contigs whose places in the index were checked
        if not self.lengths:
            raise InputError(f"{self.label} holds no sequence")

    def fetch(self, contig: str, start: int, stop: int) -> str:
        """See ``Genome``.

        Raises:
            InputError: the file is not what its index says, or something stands there that is no letter of DNA.
        """
        self._require_fitting(contig)
        try:
            with quiet():
                text = self._file.fetch(contig, start, stop)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {self.label}: {error}; {self._again}") from error
        if len(text) != stop - start:
            raise InputError(
                f"{self.label} ends inside contig {shown(contig)}, other than its index says; {self._again}"
            )
        try:
            return _checked(text, contig, start, stop)
        except InputError as error:
            raise InputError(f"{self.label}: {error}") from error

    def _require_fitting(self, contig: str) -> None:
        if contig in self._fitting:
            return
        try:
            fits = self._index.fits(contig)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"cannot read {self.label}: {error}; {self._again}") from error
        if not fits:
            raise InputError(
                f"{self.label} does not hold contig {shown(contig)} where its index says: {self._again}, and white "
                "space inside lines, where there is any"
            )
        self._fitting.add(contig)

    @property
    def _again(self) -> str:
        return f"remove {self.label}.fai, so that it is made again"

    def _open(self, folder: Path) -> tuple[Any, FastaIndex]:
        import pysam

        indices = [self.path.with_name(self.path.name + suffix) for suffix in (".fai", ".gzi")[: 1 + self._compressed]]
        if all(index.exists() for index in indices):
            if any(index.stat().st_mtime < self.path.stat().st_mtime for index in indices):
                raise InputError(f"{self.label} is newer than its index {printable(str(indices[0]))}; {self._again}")
        else:
            indices = self._make(folder, indices)
        options = dict(zip(("filepath_index", "filepath_index_compressed"), map(str, indices), strict=False))
        try:
            blocks = indices[1] if self._compressed else None
            file, index = pysam.FastaFile(str(self.path), **options), FastaIndex(self.path, indices[0], blocks)
            left_out = index.leaves_out()
        except (OSError, ValueError, EOFError, zlib.error) as error:
            raise InputError(f"cannot read {self.label} by its index: {error}; {self._again}") from error
        if left_out is not None:
            raise InputError(f"{self.label} holds a contig {shown(left_out)} that its index leaves out; {self._again}")
        return file, index

    def _make(self, folder: Path, wanted: list[Path]) -> list[Path]:
        """Make the index; return where it is."""
        import pysam

        self._check_names()
        made = [folder / index.name for index in wanted]
        options = [word for pair in zip(("--fai-idx", "--gzi-idx"), made, strict=False) for word in map(str, pair)]
        try:
            pysam.faidx(str(self.path), *options)  # pyright: ignore[reportAttributeAccessIssue]
        except pysam.SamtoolsError as error:
            raise InputError(
                f"{self.label} cannot be indexed: a contig is a line '>' and its name, and lines of equal length, the "
                "last one excepted; write it again, with `seqtk seq -l 60` or the like"
            ) from error
        try:
            for index, place in zip(made, wanted, strict=True):
                content = index.read_bytes()
                write_atomically(place, lambda file, content=content: file.write(content))
        except OutputError:  # a folder of somebody else's
            return made
        return wanted

    def _check_names(self) -> None:
        """Refuse a name that two contigs have: an index would hide the second."""
        seen, number, begins = set[bytes](), 0, True
        with open_source(self.path, self.label, compressed=self._compressed, cure=_CURE) as file:
            while line := file.readline(BLOCK):  # a contig may be one line
                number += begins
                if begins and line.startswith(b">"):
                    name = line[1:].split(maxsplit=1)[:1]
                    if not name:
                        raise InputError(f"{self.label}, line {number}: the contig has no name; give it one")
                    text = name[0].decode(errors="replace")
                    if text.encode() != name[0] or "\0" in text:
                        raise InputError(f"{self.label}, line {number}: {shown(text)} is no name in UTF-8; rename it")
                    if name[0] in seen:
                        twice = shown(text)
                        raise InputError(f"{self.label}, line {number}: a second contig is named {twice}; rename one")
                    seen.add(name[0])
                begins = line.endswith(b"\n")


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, pysam's library prints nothing: what it would print is an exception as well."""
    import pysam

    before = pysam.set_verbosity(0)
    try:
        yield
    finally:
        pysam.set_verbosity(before)


def missing_contig(genome: Genome, contig: str) -> str:
    """Say that a genome has no such contig, and what it has."""
    known = list(genome.lengths)
    near = next((name for name in (f"chr{contig}", contig.removeprefix("chr")) if name in known), None)
    near = near or nearest(contig, known)
    has = (
        f"did you mean {shown(near)}?" if near else f"it has {printable(', '.join(known[:5]))}{' …' * (len(known) > 5)}"
    )
    return f"the genome has no contig {shown(contig)}: {has}"


def _checked(text: str, contig: str, start: int, stop: int) -> str:
    text = text.upper()
    if wrong := set(text) - _LETTERS:
        place = min(text.index(letter) for letter in wrong)
        raise InputError(f"{shown(text[place])} at {contig}:{start + place + 1:,} is no letter of DNA")
    return text
