"""``hyaena variants``: the numbers of both full windows, from files, through interruptions."""

from __future__ import annotations

import csv
import io
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

import hyaena
from configs import TINY
from hyaena import hub
from hyaena.cli import main
from hyaena.model import StripedHyena
from hyaena.scoring import edits as scoring

pytest.importorskip("pysam")

COMMANDS = {"variants": "hyaena.cli.variants"}
HEADER = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
DRAW = random.Random(3)
GENOME = {
    "chr1": "".join(DRAW.choices("ACGT", k=600)),
    "chr2": "".join(DRAW.choices("acgt", k=80)) + "NNNN" + "".join(DRAW.choices("ACGT", k=40)),
}
WINDOW = 64


def other(letter: str) -> str:
    return "ACGT"["CGTA".index(letter.upper())]


def row(contig: str, position: int, ref: str | int, alt: str | None = None, name: str = ".") -> str:
    """A row of VCF; ``ref`` may be a number of letters, and the alternative then a substitution of the first."""
    if isinstance(ref, int):
        ref = GENOME[contig][position - 1 : position - 1 + ref].upper()
    return "\t".join([contig, str(position), name, ref, alt or other(ref[0]) + ref[1:], ".", ".", "."]) + "\n"


GOOD = [
    *(row("chr1", p, 1, name=f"rs{p}") for p in (1, 2, 30, 33, 34, 40, 100, 101, 102, 163, 180, 333, 599, 600)),
    row("chr1", 50, 1, GENOME["chr1"][49] + "ACGTA"),
    row("chr1", 60, 7, GENOME["chr1"][59]),
    row("chr1", 70, 2, "TTT" if not GENOME["chr1"][69:].startswith("TT") else "CCC"),
    row("chr1", 90, 1, ",".join(x for x in "ACGT" if x != GENOME["chr1"][89])),
    row("chr2", 5, 1),
    row("chr2", 100, 1),
]
"""Rows that fit the genome: every kind of variant, both ends of a contig, lower case, a window with N."""


@pytest.fixture
def model(golden: Path) -> Path:
    return golden / "evo-tiny"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    text = "".join(
        f">{name} made up\n" + "".join(s[i : i + 50] + "\n" for i in range(0, len(s), 50)) for name, s in GENOME.items()
    )
    Path("genome.fa").write_text(text)
    Path("calls.vcf").write_text(HEADER + "".join(GOOD))
    return tmp_path


def variants(model: Path, *args: object, vcf: str = "calls.vcf") -> int:
    command = ["variants", "--reference", "genome.fa", "--vcf", vcf, "--model", model, "--window", WINDOW]
    return main([*map(str, command), *map(str, args), "--device", "cpu"], commands=COMMANDS)


def rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("name", ["evo-tiny", "evo2-tiny"])
@pytest.mark.parametrize("grid", [1, 16])
@pytest.mark.parametrize("both", [False, True])
def test_rows_are_the_scores_of_both_full_windows(
    golden: Path, folder: Path, grid: int, both: bool, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = golden / name
    assert variants(model, "-o", "s.jsonl", "--grid", grid, *["--both-strands"] * both) == 0
    out, err = capsys.readouterr()
    assert out == "s.jsonl: 22 variants\n"
    assert err == "hyaena: 1 window with letters other than A, C, G, T; see the column unknown\n"
    network, tokenizer = hyaena.load(model)
    found = rows("s.jsonl")
    lines = [line.split("\t") for line in GOOD]
    expected = [(c, int(p), n, r.upper(), a) for c, p, n, r, alts, *_ in lines for a in alts.split(",")]
    assert len(found) == len(expected)
    for one, (contig, position, rs, ref, alt) in zip(found, expected, strict=True):
        assert (one["contig"], one["position"], one["ref"], one["alt"]) == (contig, position, ref, alt)
        assert one["id"] == ("" if rs == "." else rs)
        start = max(0, (position - 1 - WINDOW // 2) // grid * grid)
        stop = min(len(GENOME[contig]), start + WINDOW)
        assert (one["window_start"], one["window_end"]) == (start, stop)
        text, at = GENOME[contig][start:stop].upper(), position - 1 - start
        changed = text[:at] + alt + text[at + len(ref) :]
        assert one["unknown"] == text.count("N")
        ours = hyaena.score(network, tokenizer, [text, changed], both_strands=both)
        assert (one["ref_loglik"], one["alt_loglik"]) == pytest.approx(tuple(s.sum for s in ours), rel=1e-5)
        assert one["difference"] == pytest.approx(ours[1].sum - ours[0].sum, abs=1e-3)


def test_every_output_has_the_same_rows(model: Path, folder: Path) -> None:
    for name in ("s.jsonl", "s.parquet", "s.tsv", "s.csv", "s.npz"):
        assert variants(model, "-o", name) == 0
    expected = rows("s.jsonl")
    assert parquet.read_table("s.parquet").to_pylist() == expected
    for name, delimiter in (("s.csv", ","), ("s.tsv", "\t")):
        with open(name, newline="") as file:
            found = list(csv.DictReader(file, delimiter=delimiter))
        assert found == [{key: str(value) for key, value in one.items()} for one in expected]
    with np.load("s.npz") as arrays:
        for key in expected[0]:
            assert arrays[key].tolist() == [one[key] for one in expected]


@pytest.mark.parametrize("options", [[], ["--grid", "16", "--both-strands"]])
def test_an_interrupted_job_goes_on_and_gives_the_same_bytes(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    command = ["--save-every", 2 * WINDOW, *options]
    assert variants(model, "-o", "whole.parquet", *command) == 0
    read, made = scoring._Reading.read, 0

    def interrupted(*args: Any) -> Any:
        nonlocal made
        made += 1
        if made % 3 == 0:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(scoring._Reading, "read", interrupted)
    statuses = []
    while not statuses or statuses[-1]:
        assert len(statuses) < 20
        statuses.append(variants(model, "-o", "s.parquet", *command))
        assert Path("s.parquet.unfinished").exists() == bool(statuses[-1])
    assert set(statuses[:-1]) == {130} and len(statuses) > 2
    assert "finished rows are kept in s.parquet.unfinished: the same command goes on" in capsys.readouterr().err
    assert Path("s.parquet").read_bytes() == Path("whole.parquet").read_bytes()


def test_a_job_does_not_go_on_with_another_genome_or_other_options(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = scoring._Reading.read
    count = iter(range(100))
    monkeypatch.setattr(
        scoring._Reading, "read", lambda *a: read(*a) if next(count) < 4 else (_ for _ in ()).throw(OSError("x"))
    )
    command = ["-o", "s.parquet", "--save-every", 2 * WINDOW]
    assert variants(model, *command) == 2
    capsys.readouterr()
    assert variants(model, *command, "--grid", 2) == 2
    assert "--grid was 1, and is 2 now" in capsys.readouterr().err
    Path("calls.vcf").write_text(HEADER + "".join(GOOD).replace("rs2", "rs7"))
    assert variants(model, *command) == 2
    assert "the input has changed since" in capsys.readouterr().err
    Path("calls.vcf").write_text(HEADER + "".join(GOOD))
    text = Path("genome.fa").read_text()
    Path("genome.fa").write_text(text[:40] + other(text[40]) + text[41:])
    Path("genome.fa.fai").unlink()
    Path("calls.vcf").write_text(HEADER + "".join(line for line in GOOD if "\t27\t" not in line))
    assert variants(model, *command) == 2
    assert "the input has changed since" in capsys.readouterr().err


def test_shards_are_the_whole(model: Path, folder: Path) -> None:
    assert variants(model, "-o", "s.jsonl") == 0
    for number in (1, 2, 3):
        assert variants(model, "-o", f"{number}.jsonl", "--shard", f"{number}/3") == 0
    parts = [rows(f"{number}.jsonl") for number in (1, 2, 3)]
    assert [len(part) for part in parts] == [7, 7, 8]
    for one, whole in zip([one for part in parts for one in part], rows("s.jsonl"), strict=True):
        assert one.pop("difference") == pytest.approx(whole.pop("difference"), abs=1e-4)
        assert {k: v for k, v in one.items() if "loglik" not in k} == {
            k: v for k, v in whole.items() if "loglik" not in k
        }


BAD = [
    (row("chr1", 10, "A", "<DEL>"), "its alternative '<DEL>' is symbolic"),
    (row("chr7", 10, "A", "C"), "no contig 'chr7'"),
    (row("chr1", 601, "A", "C"), "position 601 is outside the contig, which has 600 letters"),
    (row("chr1", 20, other(GENOME["chr1"][19]), GENOME["chr1"][19]), "its reference allele is"),
    (row("chr2", 82, "N", "A"), "its reference allele 'N' has 'N'"),
    (GOOD[0], "the same variant stands before it"),
]


@pytest.mark.parametrize("policy", ["fail", "skip", "keep"])
def test_variants_that_do_not_fit(
    model: Path, folder: Path, policy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("calls.vcf").write_text(HEADER + GOOD[0] + "".join(line for line, _ in BAD) + GOOD[1])
    if policy == "fail":
        monkeypatch.setattr(hub, "load_model", lambda *_, **__: pytest.fail("read the weights"))
    status = variants(model, "-o", "s.jsonl", "--on-error", policy)
    err = capsys.readouterr().err.splitlines()
    if policy == "fail":
        assert status == 2 and len(err) == 1 and not Path("s.jsonl").exists()
        assert "calls.vcf, line 4, chr1:10 A><DEL>: its alternative '<DEL>'" in err[0]
        assert "(6 of 8 variants cannot be scored): correct the file, or add --on-error skip or keep" in err[0]
        return
    assert status == 0 and len(err) == 6
    for number, (line, (_, reason)) in enumerate(zip(err, BAD, strict=True), start=4):
        assert f"calls.vcf, line {number}, " in line and reason in line
    found = rows("s.jsonl")
    if policy == "skip":
        assert [one["position"] for one in found] == [1, 2]
        return
    assert [one["difference"] is None for one in found] == [False, *[True] * 6, False]
    assert [reason in one["note"] for one, (_, reason) in zip(found[1:-1], BAD, strict=True)] == [True] * 6
    assert found[0]["note"] == found[-1]["note"] == ""


def test_the_start_token_takes_its_place_in_the_context(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(TINY, vocab_size=260, tokenizer="bytes", max_length=WINDOW + 1)  # whose texts begin with BOS
    hyaena.save_model(StripedHyena(config), folder / "bytes")
    letter = GENOME["chr1"][119]
    model, long = Path("bytes"), row("chr1", 120, letter, f"{letter}T")
    Path("calls.vcf").write_text(HEADER + GOOD[0] + long)
    assert variants(model, "-o", "s.jsonl", "--window", WINDOW + 1) == 2
    assert f"longer than the {WINDOW} that the model's context holds" in capsys.readouterr().err
    assert variants(model, "-o", "s.jsonl") == 2
    assert f"line 4, chr1:120 {letter}>{letter}T: its window has {WINDOW + 1} letters" in capsys.readouterr().err
    assert variants(model, "-o", "s.jsonl", "--on-error", "skip") == 0
    assert len(rows("s.jsonl")) == 1
    assert variants(model, "-o", "t.jsonl", "--no-bos") == 0
    assert len(rows("t.jsonl")) == 2


def test_many_variants_that_do_not_fit_are_counted(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("calls.vcf").write_text(HEADER + GOOD[0] + "".join(row("chr9", p, "A", "C") for p in range(1, 31)))
    assert variants(model, "-o", "s.csv", "--on-error", "skip") == 0
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 21 and err[-1] == "hyaena: and 10 more"
    Path("calls.vcf").write_text(HEADER + row("chr9", 1, "A", "C"))
    assert variants(model, "-o", "t.csv", "--on-error", "skip") == 2
    assert "none of 1 variants can be scored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", 512], "a window of 512 letters is longer than the 256 that the model's context holds"),
        (["--window", 1], "window must be at least 2"),
        (["--grid", 33], "grid must be between 1 and half a window, 32, not 33"),
        (["--grid", 0], "grid must be between 1 and half a window"),
        (["--save-every", 0], "--save-every must be at least 1"),
        (["--method", "fast"], "unknown method 'fast'"),
        (["--batch-tokens", 0], "tokens_per_pass must be at least 1"),
        (["--vcf", "no.vcf"], "cannot read no.vcf: No such file"),
        (["--vcf", "genome.fa"], "genome.fa is not VCF"),
        (["--reference", "no.fa"], "cannot read no.fa"),
        (["--reference", "calls.vcf"], "calls.vcf cannot be indexed"),
        (["--shard", "3/2"], "a shard is I/N"),
        (["-o", "s.bedgraph"], "bedGraph has one number per position"),
        (["-o", "s.txt"], "must end in one of"),
        (["--device", ""], "--device is empty"),
    ],
)
def test_mistakes_are_one_line(
    model: Path,
    folder: Path,
    options: list[object],
    message: str,
    capfd: pytest.CaptureFixture[str],  # libraries in C print, too
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub, "load_model", lambda *_, **__: pytest.fail("read the weights"))
    command = ["variants", "--reference", "genome.fa", "--vcf", "calls.vcf", "--model", model, "--window", WINDOW]
    assert main([*map(str, command), "-o", "s.csv", *map(str, options)], commands=COMMANDS) == 2
    err = capfd.readouterr().err
    assert err.startswith("hyaena: error: ") and err.count("\n") == 1 and message in err
    assert {path.name for path in folder.iterdir()} <= {"genome.fa", "genome.fa.fai", "calls.vcf"}


def test_what_is_cut_is_told(model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert variants(model, "-o", "s.csv", "--method", "truncated") == 0
    assert "hyaena: long filters cut to " in capsys.readouterr().err


def test_a_model_of_other_tokens_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    from hyaena.tokenizers import CharacterTokenizer

    monkeypatch.setattr(hub, "load_model", lambda *_, **__: pytest.fail("read the weights"))
    monkeypatch.setattr(CharacterTokenizer, "_encode", lambda self, text, *_: list(text.encode())[::2])
    assert variants(model, "-o", "s.csv") == 2
    assert "edits are scored with models that read a letter as a token" in capsys.readouterr().err


def test_the_progress_bar_counts_variants(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert variants(model, "-o", "s.csv", "--save-every", 3 * WINDOW) == 0
    assert "22.0/22.0 [" in sys.stderr.getvalue()  # type: ignore[attr-defined]
