"""``hyaena score`` and ``hyaena embed`` on contigs in windows: every position behind its context."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

import hyaena
from configs import TINY
from hyaena.cli import main
from hyaena.model import StripedHyena
from hyaena.scoring.reader import Reader

COMMANDS = {"score": "hyaena.cli.score", "embed": "hyaena.cli.embed"}
DRAW = random.Random(7)
CONTIGS = {"chr1": "".join(DRAW.choices("ACGT", k=157)), "chr2": "ACGTNNACGTA", "chr3": "G"}
WINDOW, OVERLAP = 48, 20


@pytest.fixture
def model(golden: Path) -> Path:
    return golden / "evo-tiny"


@pytest.fixture
def genome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("genome.fa").write_text("".join(f">{name} made up\n{text}\n" for name, text in CONTIGS.items()))
    return "genome.fa"


def command(name: str, genome: str, output: str, model: Path, *options: object) -> int:
    windows = ["--window", WINDOW, "--overlap", OVERLAP]
    words = [name, genome, "-o", output, "--model", model, *windows, *options, "--device", "cpu"]
    return main([*map(str, words)], commands=COMMANDS)


def direct(model: Path, contig: str, start: int, end: int, **options: Any) -> np.ndarray:
    """Log-probabilities of a part, behind ``OVERLAP`` letters, by scoring both together."""
    first = max(0, start - OVERLAP)
    text = CONTIGS[contig][first:end]
    return hyaena.score(*hyaena.load(model), text, **options).logprobs[start - first :]


def bedgraph(path: str) -> list[tuple[str, int, int, float]]:
    lines = [line.split("\t") for line in Path(path).read_text().splitlines()]
    return [(contig, int(start), int(end), float(value)) for contig, start, end, value in lines]


def expected_windows() -> list[tuple[str, int, int]]:
    step = WINDOW - OVERLAP
    return [(n, a, min(a + step, len(s))) for n, s in CONTIGS.items() for a in range(0, len(s), step)]


def test_every_position_is_scored_once_behind_its_context(model: Path, genome: str) -> None:
    assert command("score", genome, "s.bedgraph", model) == 0
    found = bedgraph("s.bedgraph")
    # the first letter of a contig is predicted by nothing
    assert [(c, a, b) for c, a, b, _ in found] == [(c, p, p + 1) for c, s in CONTIGS.items() for p in range(1, len(s))]
    values = {(c, a): x for c, a, _, x in found}
    for contig, start, end in expected_windows():
        want = direct(model, contig, start, end)
        for position, value in zip(range(start, end), want, strict=True):
            if position:
                assert values[contig, position] == pytest.approx(value, rel=1e-4)


def test_parquet_has_a_row_per_window(model: Path, genome: str) -> None:
    assert command("score", genome, "s.parquet", model, "--both-strands") == 0
    found = parquet.read_table("s.parquet").to_pylist()
    assert [(r["contig"], r["start"], r["end"]) for r in found] == expected_windows()
    assert [r["name"] for r in found] == [f"{c}:{a}-{b}" for c, a, b in expected_windows()]
    network, tokenizer = hyaena.load(model)
    for r in found:
        contig, start, end = r["contig"], r["start"], r["end"]
        one = direct(model, contig, start, end)
        behind = CONTIGS[contig][start : end + OVERLAP]
        other = hyaena.score(network, tokenizer, hyaena.scoring.reverse_complement(behind)).logprobs
        other = other[len(behind) - (end - start) :][::-1]
        want = np.nanmean([one, other], axis=0) if len(CONTIGS[contig]) > 1 else np.array([np.nan])
        np.testing.assert_allclose(np.array(r["logprobs"], float), want, rtol=1e-4)
        assert r["step"] == 1


def test_bins_are_means(model: Path, genome: str) -> None:
    assert command("score", genome, "s.bedgraph", model) == 0
    assert command("score", genome, "b.bedgraph", model, "--bin", 7) == 0
    single = {(c, a): x for c, a, _, x in bedgraph("s.bedgraph")}
    found = bedgraph("b.bedgraph")
    assert [(c, a, b) for c, a, b, _ in found] == [
        (c, a, min(a + 7, len(s))) for c, s in CONTIGS.items() for a in range(0, len(s), 7) if len(s) > 1
    ]
    for contig, start, end, value in found:
        assert value == pytest.approx(np.mean([single[contig, p] for p in range(max(1, start), end)]), rel=1e-4)


def test_vectors_are_of_the_windows_own_letters(model: Path, genome: str) -> None:
    assert command("embed", genome, "v.jsonl", model, "--layers", "0,norm") == 0
    found = [json.loads(line) for line in Path("v.jsonl").read_text().splitlines()]
    assert [(r["contig"], r["start"], r["end"]) for r in found] == expected_windows()
    network, tokenizer = hyaena.load(model)
    for r in found[:3]:
        first = max(0, r["start"] - OVERLAP)
        text = CONTIGS["chr1"][first : r["end"]]
        rows = hyaena.embed(network, tokenizer, text, 0, pool="none")[r["start"] - first :]
        np.testing.assert_allclose(r["0"], rows.mean(0), rtol=1e-3, atol=1e-5)


def test_shards_cut_chromosomes(model: Path, genome: str) -> None:
    assert command("score", genome, "s.bedgraph", model) == 0
    parts = []
    for number in (1, 2, 3):
        assert command("score", genome, f"{number}.bedgraph", model, "--shard", f"{number}/3") == 0
        parts += bedgraph(f"{number}.bedgraph")
    whole = bedgraph("s.bedgraph")
    assert [line[:3] for line in parts] == [line[:3] for line in whole]
    np.testing.assert_allclose([x for *_, x in parts], [x for *_, x in whole], rtol=1e-4)


def test_what_is_cut_is_told(model: Path, genome: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("score", genome, "s.bedgraph", model, "--method", "truncated") == 0
    assert "hyaena: long filters cut to " in capsys.readouterr().err


def test_the_overlap_is_half_a_window_unless_given(model: Path, genome: str) -> None:
    words = ["score", genome, "-o", "s.jsonl", "--model", str(model), "--window", "48", "--device", "cpu"]
    assert main(words, commands=COMMANDS) == 0
    assert [json.loads(line)["start"] for line in Path("s.jsonl").read_text().splitlines()][:3] == [0, 24, 48]


@pytest.mark.parametrize(
    ("name", "output", "options", "message"),
    [
        ("score", "s.bedgraph", ["--window", 300], "a window of 300 letters is longer than the 256 that"),
        ("score", "s.bedgraph", ["--overlap", 48], "--overlap must be between 0 and less than the window of 48"),
        ("score", "s.bedgraph", ["--window", 0], "--window must be at least 1"),
        ("score", "s.bedgraph", ["--bin", 5], "--bin must divide the 28 letters"),
        ("score", "s.bedgraph", ["--bin", 0], "--bin must divide the 28 letters"),
        ("score", "s.bedgraph", ["--per-token"], "--per-token is of whole records"),
        ("score", "s.csv", [], "a table of text has no place for the column logprobs"),
        ("embed", "s.bedgraph", [], "bedGraph has one number per position"),
    ],
)
def test_mistakes_are_one_line(
    model: Path,
    genome: str,
    name: str,
    output: str,
    options: list[object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(name, genome, output, model, *options) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err
    assert [path.name for path in Path().iterdir()] == [genome]


def test_the_start_token_takes_its_place_in_the_context(genome: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(TINY, vocab_size=260, tokenizer="bytes", max_length=WINDOW)  # whose texts begin with BOS
    hyaena.save_model(StripedHyena(config), "bytes")
    assert command("score", genome, "s.bedgraph", Path("bytes")) == 2
    assert f"longer than the {WINDOW - 1} that the model's context holds" in capsys.readouterr().err
    assert command("score", genome, "s.bedgraph", Path("bytes"), "--no-bos") == 0


def test_options_of_windows_need_windows(model: Path, genome: str, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in ((["--overlap", "5"], "add --window"), (["--bin", "5"], "add --window")):
        words = ["score", genome, "-o", "s.jsonl", "--model", str(model), *options]
        assert main(words, commands=COMMANDS) == 2
        assert message in capsys.readouterr().err


def test_an_interrupted_track_goes_on_to_the_same_bytes(
    model: Path, genome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--save-every", 2 * WINDOW, "--both-strands", "--batch-tokens", 100]
    assert command("score", genome, "whole.bedgraph", model, *options) == 0
    read, made = Reader._read_packed, 0

    def interrupted(*args: Any) -> Any:
        nonlocal made
        made += 1
        if made % 5 == 0:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(Reader, "_read_packed", interrupted)
    statuses = []
    while not statuses or statuses[-1]:
        assert len(statuses) < 20
        statuses.append(command("score", genome, "s.bedgraph", model, *options))
    assert len(statuses) > 1 and set(statuses[:-1]) == {130}
    assert Path("s.bedgraph").read_bytes() == Path("whole.bedgraph").read_bytes()


def test_bedgraph_has_no_place_for_white_space(model: Path, genome: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("names.jsonl").write_text('{"name": "chr 1", "text": "ACGTACGT"}\n')
    assert command("score", "names.jsonl", "s.bedgraph", model) == 2
    assert "line 1, record 'chr 1:0-8': bedGraph has no place for white space in a name" in capsys.readouterr().err
    assert command("score", "names.jsonl", "s.jsonl", model) == 0
    assert [path.name for path in Path().glob("s.*")] == ["s.jsonl"]
