"""Genomes and variants: every kind of variant against a row written by hand, and files that lie."""

from __future__ import annotations

import gzip
import os
import random
import shutil
import tracemalloc
from pathlib import Path

import pytest

from hyaena.errors import InputError
from hyaena.records import Checked, FastaGenome, MemoryGenome, Variant, Windows, check_variants, read_variants

pysam = pytest.importorskip("pysam")

HEADER = "##fileformat=VCFv4.2\n##contig=<ID=chr1>\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
GENOME = MemoryGenome({"chr1": "ACGTNacgt" + "G" * 40, "chr2": "TTAGGG"})


def vcf(folder: Path, *rows: str, header: str = HEADER, name: str = "calls.vcf") -> Path:
    path = folder / name
    text = header + "".join("\t".join(row.split()) + "\t.\t.\t.\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def fasta(folder: Path, text: str, name: str = "genome.fa") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["calls.vcf", "calls.vcf.gz"])
def test_variants_of_every_kind(tmp_path: Path, name: str) -> None:
    path = vcf(
        tmp_path,
        *("chr1 1 rs1 A G", "chr1 2 . CG C", "chr1 3 . g gTT", "chr1 4 rs2;rs3 T A,C,<DEL>", "chr1 7 . C *"),
        *("chr1 8 . G G]chr2:3]", "chr2 1 . T .", "chr9 0 . N A"),
        name=name,
    )
    assert list(read_variants(path)) == [
        Variant("chr1", 0, "A", "G", "rs1", "line 4"),
        Variant("chr1", 1, "CG", "C", "", "line 5"),
        Variant("chr1", 2, "G", "GTT", "", "line 6"),
        Variant("chr1", 3, "T", "A", "rs2;rs3", "line 7"),
        Variant("chr1", 3, "T", "C", "rs2;rs3", "line 7"),
        Variant("chr1", 3, "T", "<DEL>", "rs2;rs3", "line 7"),
        Variant("chr1", 6, "C", "*", "", "line 8"),
        Variant("chr1", 7, "G", "G]chr2:3]", "", "line 9"),
        Variant("chr2", 0, "T", ".", "", "line 10"),
        Variant("chr9", -1, "N", "A", "", "line 11"),
    ]


def test_bcf_has_records_and_no_lines(tmp_path: Path) -> None:
    path = vcf(tmp_path, "chr1 1 rs1 A G", "chr1 2 . C T")
    with (
        pysam.VariantFile(str(path)) as file,
        pysam.VariantFile(str(tmp_path / "c.bcf"), "wb", header=file.header) as out,
    ):
        for record in file:
            out.write(record)
    assert [(v.start, v.place) for v in read_variants(tmp_path / "c.bcf")] == [(0, "record 1"), (1, "record 2")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not VCF"),
        (b"chr1\t5\t.\tA\tG\t.\t.\t.\n", "is not VCF"),
        (b"\x00\x01\x02", "is not VCF"),
        (HEADER.encode() + b"chr1\t5\t.\tA\n", "line 4: not a record of VCF"),
        (HEADER.encode() + b"chr1\t1\t.\tA\tG\t.\t.\t.\nchr1\tx\t.\tA\tG\t.\t.\t.\n", "line 5: not a record of VCF"),
        (HEADER.encode() + b"chr1 1 . A G\n", "line 4: not a record of VCF, .* between tabs"),
        (HEADER.encode() + b"chr1\t1\t.\tA\tGAT", "line 4: the file ends after 5 of 8 columns"),
        (HEADER.encode() + b"chr1\t-1\t.\tA\tG\t.\t.\t.\n", "line 4: not a record of VCF"),
        (HEADER.encode() + b"chr1\t" + b"9" * 50 + b"\t.\tA\tG\t.\t.\t.\n", "line 4: not a record of VCF"),
        (HEADER.encode() + b"chr1\t1\t.\tA\t\xff\t.\t.\t.\n", "line 4: not UTF-8"),
        (b"##fileformat=VCFv4.2\n", "line that begins with '#CHROM'"),
        (b"##fileformat=VCFv4.2\nchr1\t1\t.\tA\tG\n", "line 2: not a record of VCF"),
        (b"BCF\x02\x02nonsense", "not BCF"),
        (gzip.compress(HEADER.encode() * 99, mtime=0)[:60], "not a whole gzip file"),
    ],
)
def test_files_that_are_no_vcf(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "calls.vcf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_variants(path))


def test_five_columns_below_five_are_enough(tmp_path: Path) -> None:
    path = tmp_path / "calls.vcf"
    path.write_text("##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\nchr1\t1\t.\tA\tG")
    assert [str(one) for one in read_variants(path)] == ["chr1:1 A>G"]


def test_a_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    path = vcf(tmp_path, "chr1 1 rs1 A G")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [one.name for one in read_variants(path)] == ["rs1"]


def test_bgzip_without_its_last_block_is_cut_off(tmp_path: Path) -> None:
    # what is left is whole blocks, so it is a whole, shorter file of gzip
    text = vcf(tmp_path, *(f"chr1 {i} name{i} A G" for i in range(1, 9)))
    whole = tmp_path / "whole.vcf.gz"
    pysam.tabix_compress(str(text), str(whole))
    assert len(list(read_variants(whole))) == 8
    cut = tmp_path / "cut.vcf.gz"
    cut.write_bytes(whole.read_bytes()[:-28])
    assert gzip.decompress(cut.read_bytes()) == text.read_bytes()
    with pytest.raises(InputError, match=r"cut\.vcf\.gz: not a whole file of bgzip \(its end is missing\)"):
        list(read_variants(cut))


def test_a_genome_of_bgzip_without_its_last_block_is_cut_off(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.fa.gz", tmp_path / "cut.fa.gz"
    pysam.tabix_compress(str(fasta(tmp_path, ">chr1\nACGT\n")), str(whole))
    assert FastaGenome(whole).fetch("chr1", 0, 4) == "ACGT"
    odd = Path(shutil.copy(whole, whole.with_name(os.fsdecode(b"\xff.fa"))))
    with pytest.raises(InputError, match="the name is not UTF-8, which pysam needs"):
        FastaGenome(odd)
    cut.write_bytes(whole.read_bytes()[:-28])
    with pytest.raises(InputError, match="its end is missing"):
        FastaGenome(cut)
    assert not (tmp_path / "cut.fa.gz.fai").exists()


def test_pipes_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(InputError, match="is a pipe or a device, where no part can be read alone"):
        FastaGenome(pipe)
    with pytest.raises(InputError, match="is a pipe or a device, and variants are read more than once"):
        next(read_variants(pipe))


def test_lines_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Genotypes of thousands of samples are not kept, and an allele that fills the memory is refused."""
    monkeypatch.setattr("hyaena.records.variants._LINE", 64)
    path = tmp_path / "calls.vcf"
    rest = "\t.\t.\t.\tGT" + "\t0|1" * 100
    path.write_text(f"{HEADER}chr1\t1\t.\tA\tG{rest}\n\nchr1\t2\t.\tC\tT\n")
    assert [(v.start, v.place) for v in read_variants(path)] == [(0, "line 4"), (1, "line 6")]
    path.write_text(f"{HEADER}chr1\t1\t.\tA\t{'G' * 100}\n")
    with pytest.raises(InputError, match="line 4: not a record"):
        list(read_variants(path))


def test_vcf_that_is_not_there(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "no.vcf", "No such file")):
        with pytest.raises(InputError, match=message):
            next(read_variants(path))
    with pytest.raises(InputError, match="No such file"):
        next(read_variants("http://localhost/calls.vcf"))


def check(variant: Variant, *, window: int = 8, grid: int = 1, max_length: int = 12) -> Checked:
    return next(check_variants([variant], GENOME, Windows.of(window, grid), max_length=max_length))


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        (Variant("chr3", 0, "A", "G"), "the genome has no contig 'chr3': did you mean 'chr2'"),
        (Variant("2", 0, "T", "G"), "the genome has no contig '2': did you mean 'chr2'"),
        (Variant("chr2", 6, "A", "G"), "position 7 is outside the contig, which has 6 letters"),
        (Variant("chr2", -1, "A", "G"), "position 0 is outside"),
        (Variant("chr1", 10**11, "A", "G"), "position 100,000,000,001 is outside"),
        (Variant("chr2", 0, "T", "."), "it has no alternative allele"),
        (Variant("chr2", 0, "T", "<DEL>"), "its alternative '<DEL>' is symbolic"),
        (Variant("chr2", 0, "T", "*"), "its alternative '*' is symbolic"),
        (Variant("chr2", 0, "T", "]chr1:2]T"), "is symbolic"),
        (Variant("chr1", 4, "N", "A"), "its reference allele 'N' has 'N', which is none of A, C, G, T"),
        (Variant("chr2", 0, "T", "R"), "its alternative 'R' has 'R'"),
        (Variant("chr2", 0, "", "R"), "its reference allele is empty"),
        (Variant("chr2", 0, "T", "T"), "its alternative is the reference"),
        (Variant("chr2", 0, "A", "T"), "its reference allele is 'A', and the genome has 'T' there"),
        (Variant("chr2", 4, "GGA", "G"), "its reference allele of 3 letters reaches out of the window"),
        (Variant("chr1", 20, "G" * 5, "G"), "its reference allele of 5 letters reaches out of the window"),
        (
            Variant("chr1", 20, "G", "G" * 6),
            "and the model reads 12 (a window of 7 would do",
        ),
    ],
)
def test_variants_that_cannot_be_scored(variant: Variant, reason: str) -> None:
    found = check(variant)
    assert found.problem
    assert reason in found.text


def test_no_window_would_do_for_an_allele_as_long_as_the_context() -> None:
    found = check(Variant("chr1", 20, "G", "G" * 30), window=8, max_length=12)
    assert found.problem and found.text.endswith("letters with the alternative, and the model reads 12")


def test_the_second_of_two_equal_variants_is_named() -> None:
    one = Variant("chr2", 0, "T", "G", "rs1", "line 4")
    found = list(check_variants([one, one._replace(place="line 5", name="")], GENOME, Windows.of(8), max_length=8))
    assert [(c.problem, c.index) for c in found] == [(False, 0), (True, 1)]
    assert found[1].text == "the same variant stands before it"


def test_equal_variants_are_found_in_any_order() -> None:
    genome = MemoryGenome({"a": "A" * 9, "b": "A" * 9})
    draw = random.Random(1)
    for ordered in (True, False):
        for _ in range(40):
            given = [Variant(draw.choice("ab"), draw.randrange(9), "A", draw.choice("CGT")) for _ in range(12)]
            given = sorted(given) if ordered else given
            found = check_variants(given, genome, Windows.of(8), max_length=8)
            assert [one.problem for one in found] == [given.index(one) < i for i, one in enumerate(given)]


def test_a_sorted_file_takes_little_memory_per_variant() -> None:
    genome = MemoryGenome({"a": "A" * 3_000})
    given = (Variant("a", i, "A", "C") for i in range(3_000))
    tracemalloc.start()
    assert not any(one.problem for one in check_variants(given, genome, Windows.of(8), max_length=8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000 * 40


def test_windows() -> None:
    """First letter, and behind the last, of contigs of 100 letters."""
    exact, grid = Windows.of(20), Windows.of(20, 8)
    assert [exact.place(p, 100) for p in (0, 9, 10, 50, 89, 95, 99)] == [
        *((0, 20), (0, 20), (0, 20), (40, 60), (79, 99), (85, 100), (89, 100)),
    ]
    assert [grid.place(p, 100) for p in (0, 17, 18, 50, 57, 58, 99)] == [
        *((0, 20), (0, 20), (8, 28), (40, 60), (40, 60), (48, 68), (88, 100)),
    ]
    assert exact.place(3, 7) == (0, 7)
    for size in (2, 20, 33):
        for step in {1, size // 3 or 1, size // 2}:
            for p in range(100):
                first, stop = Windows.of(size, step).place(p, 100)
                assert first <= p < stop <= 100 and stop - first <= size
                assert p - first >= min(p, size // 2)
                assert first == 0 or (first % step == 0 and p - first < size // 2 + step)
    for size, step in ((1, 1), (20, 11), (20, 0), (True, 1)):
        with pytest.raises(InputError):
            Windows.of(size, step)


def test_a_window_has_the_letters_of_the_genome() -> None:
    found = check(Variant("chr1", 5, "A", "C"), window=6)
    assert (found.first, found.stop, found.text, found.problem) == (2, 8, "GTNACG", False)
    assert (found.name, found.index) == ("chr1:6 A>C", 0)


# --- genomes


@pytest.mark.parametrize("name", ["genome.fa", "genome.fa.gz"])
def test_a_genome_is_read_by_its_index(tmp_path: Path, name: str) -> None:
    plain = fasta(tmp_path, ">chr1 made up\r\nACGTACG\r\nTTnn\r\n>chr2\r\nGG\r\n")
    if name.endswith(".gz"):
        pysam.tabix_compress(str(plain), str(tmp_path / name), force=True)
    genome = FastaGenome(tmp_path / name)
    assert dict(genome.lengths) == {"chr1": 11, "chr2": 2}
    assert (genome.fetch("chr1", 5, 10), genome.fetch("chr2", 0, 2)) == ("CGTTN", "GG")
    made = {path.name for path in tmp_path.iterdir()} - {plain.name, name}
    assert made == ({f"{name}.fai", f"{name}.gzi"} if name.endswith(".gz") else {f"{name}.fai"})
    assert FastaGenome(tmp_path / name).fetch("chr1", 0, 1) == "A"


def test_a_genome_in_a_folder_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fasta(tmp_path, ">c\nACGT\n")

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "replace", refuse)
    assert FastaGenome(path).fetch("c", 1, 3) == "CG"
    assert not path.with_name("genome.fa.fai").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (">c\nACGT\nAC\nACGT\n", "cannot be indexed"),
        ("ACGT\n", "cannot be indexed"),
        ("", "cannot be indexed"),
        (">c\nAC\n>d\nAC\n>c\nGT\n", "line 5: a second contig is named 'c'"),
        (">\nAC\n", "line 1: the contig has no name"),
        (">c\n" + "AC" * 2**20 + "\n>c\nAC\n", "line 3: a second contig is named 'c'"),
        (">é\nAC\n", "line 1: .* is no name in UTF-8"),
        (">a\0b\nAC\n", "line 1: .* is no name in UTF-8"),
    ],
)
def test_files_that_are_no_genome(tmp_path: Path, content: str, message: str) -> None:
    path = fasta(tmp_path, content)
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        FastaGenome(path)
    assert [path.name for path in tmp_path.iterdir()] == ["genome.fa"]


def test_letters_that_are_no_dna(tmp_path: Path) -> None:
    genome = FastaGenome(fasta(tmp_path, ">c\nACG-T*ACGT\n"))
    assert genome.fetch("c", 0, 3) == "ACG"
    with pytest.raises(InputError, match=r"genome\.fa: '-' at c:4 is no letter of DNA"):
        genome.fetch("c", 1, 8)
    with pytest.raises(InputError, match="contig 'c' must be text"):
        MemoryGenome({"c": b"ACGT"})  # pyright: ignore[reportArgumentType]


def test_plain_gzip_says_what_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "genome.fa.gz"
    path.write_bytes(gzip.compress(b">c\nACGT\n", mtime=0))
    with pytest.raises(InputError, match=r"no part can be read alone: decompress it \(gunzip\), or .* bgzip"):
        FastaGenome(path)


def test_an_index_that_lies(tmp_path: Path) -> None:
    path = fasta(tmp_path, ">c\nACGT\n")
    FastaGenome(path)
    index = path.with_name("genome.fa.fai")
    os.utime(index, (1, 1))
    with pytest.raises(InputError, match="newer than its index"):
        FastaGenome(path)
    index.write_text("c\t400\t3\t4\t5\n")
    with pytest.raises(InputError, match=r"remove .*genome\.fa\.fai"):
        FastaGenome(path).fetch("c", 100, 200)
    index.write_text("nonsense")
    with pytest.raises(InputError, match=r"remove .*genome\.fa\.fai"):
        FastaGenome(path)


@pytest.mark.parametrize("name", ["genome.fa", "genome.fa.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "contigs",
    [["c", "c", "d"], ["d", "c", "c"], ["c", "d", "c"], ["c x y", "d z", "e", "c a", "f"], ["a", "b", "a", "c"]],
)
def test_an_index_that_leaves_a_contig_out(tmp_path: Path, name: str, end: str, contigs: list[str]) -> None:
    """As that of samtools does, where two contigs have one name."""

    def write(contigs: list[str]) -> Path:
        path = fasta(tmp_path, "".join(f">{contig}{end}ACGT{end}AC{end}" for contig in contigs))
        if name.endswith(".gz"):
            pysam.tabix_compress(str(path), str(tmp_path / name), force=True)
        pysam.faidx(str(tmp_path / name))  # pyright: ignore[reportAttributeAccessIssue]
        return tmp_path / name

    path = write(contigs)
    with pytest.raises(InputError, match=rf"a contig '[ac]' that its index leaves out; remove .*{name}\.fai"):
        FastaGenome(path)
    path = write([f"{i}{contig} about it" for i, contig in enumerate(contigs)])
    assert len(FastaGenome(path).lengths) == len(contigs)


@pytest.mark.parametrize("name", ["genome.fa", "genome.fa.gz"])
def test_an_index_of_another_file(tmp_path: Path, name: str) -> None:
    """Offsets, lengths or lines that are not those of the file are found at the first letter that is read."""
    contigs = {f"c{i}": "".join(random.Random(i).choices("ACGT", k=40_000)) for i in range(3)}

    def write(width: int, end: str, skip: int = 0) -> Path:
        path = fasta(
            tmp_path,
            "".join(
                f">{contig} x>y{end}" + "".join(text[i : i + width] + end for i in range(skip, len(text), width))
                for contig, text in contigs.items()
            ),
        )
        if name.endswith(".gz"):
            pysam.tabix_compress(str(path), str(tmp_path / name), force=True)
        return tmp_path / name

    for width, end in ((50_000, "\n"), (61, "\r\n"), (60, "\n")):
        for index in tmp_path.glob("*.*i"):
            index.unlink()
        genome = FastaGenome(write(width, end))
        assert [genome.fetch(contig, 70, 80) for contig in contigs] == [text[70:80] for text in contigs.values()]
    for width, end, skip in ((61, "\n", 0), (60, "\r\n", 0), (60, "\n", 1)):
        path = write(width, end, skip)
        for index in tmp_path.glob("*.*i"):
            os.utime(index)
        for contig in contigs:
            with pytest.raises(InputError, match=r"remove .*genome\.fa.*\.fai, so that it is made again"):
                FastaGenome(path).fetch(contig, 70, 80)


def test_genomes_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        FastaGenome(tmp_path)
    with pytest.raises(InputError, match="cannot read"):
        FastaGenome(tmp_path / "no.fa")
