"""``hyaena generate --output x.fasta``: samples as the rows of a file, through interruptions."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

import hyaena
from hyaena import generation, hub
from hyaena.cli import main
from hyaena.errors import NonFiniteError
from hyaena.records import find_source, read_records

COMMANDS = {"generate": "hyaena.cli.generate"}
TAGS = ["|d__Bacteria;p__Pseudomonadota|", "|d__Archaea|ACGT"]


@pytest.fixture
def model(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(golden / "evo-tiny")


def generate(model: str, *args: object) -> int:
    options = ["--model", model, "--device", "cpu", "--max-new-tokens", 70, "--temperature", 9, "--allowed", "ACGT"]
    return main(["generate", *map(str, options), *map(str, args)], commands=COMMANDS)


def headers(path: str) -> list[str]:
    return [line for line in Path(path).read_text().splitlines() if line.startswith(">")]


def test_samples_of_a_species_tag(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, TAGS[0], "-n", 3, "--seed", 5, "--ignore-eos", "-o", "x.fasta") == 0
    assert capsys.readouterr().out == "x.fasta: 3 samples\n"
    records = list(read_records(find_source("x.fasta")))
    assert [record.name for record in records] == ["prompt-1", "prompt-2", "prompt-3"]
    assert len({record.text for record in records}) == 3
    network, tokenizer = hyaena.load(model)
    for number, (record, header) in enumerate(zip(records, headers("x.fasta"), strict=True)):
        alone = hyaena.generate(
            network,
            tokenizer,
            TAGS[0],
            max_new_tokens=70,
            temperature=9.0,
            allowed_tokens="ACGT",
            stop_at_eos=False,
            seed=5 + number,
        )
        assert record.text == alone.text and len(alone.text) == 70
        mean = sum(alone.logprobs) / 70
        assert header.startswith(f">prompt-{number + 1} prompt={TAGS[0]} seed={5 + number} end=length mean_loglik=")
        assert float(header.rsplit("=", 1)[1]) == pytest.approx(mean, abs=1e-3)
    assert max(map(len, Path("x.fasta").read_text().splitlines()[1:3])) == 60


def test_many_prompts_in_batches(model: str) -> None:
    Path("tags.txt").write_text("\n".join(TAGS) + "\n")
    options = ["--prompts", "tags.txt", "-n", 2, "--seed", 1]
    assert generate(model, *options, "-o", "x.fa") == 0
    assert generate(model, *options, "-o", "y.fa", "--batch-rows", 3) == 0
    assert Path("x.fa").read_bytes() == Path("y.fa").read_bytes()
    assert [h.split()[0] for h in headers("x.fa")] == [">1-1", ">1-2", ">2-1", ">2-2"]
    assert [re.findall(r"seed=(\d+)", h)[0] for h in headers("x.fa")] == ["1", "2", "3", "4"]


def test_names_of_prompts_name_the_samples(model: str) -> None:
    Path("genes.fa").write_text(">geneA x\nACGT\n>geneB\nTTGA\n")
    assert generate(model, "--prompts", "genes.fa", "--seed", 1, "--echo", "--ignore-eos", "-o", "x.fna") == 0
    records = list(read_records(find_source("x.fna")))
    assert [(record.name, record.text[:4], len(record.text)) for record in records] == [
        ("geneA-1", "ACGT", 74),
        ("geneB-1", "TTGA", 74),
    ]


def test_without_a_seed_headers_say_how_to_repeat_a_sample(model: str) -> None:
    assert generate(model, "ACGT", "-o", "x.fa", "-n", 2) == 0
    seed = re.findall(r"seed=(\d+)", headers("x.fa")[1])[0]
    assert generate(model, "ACGT", "-o", "y.fa", "--seed", seed) == 0
    sequences = [Path(name).read_text().split(">")[-1].split("\n", 1)[1] for name in ("x.fa", "y.fa")]
    assert sequences[0] == sequences[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ACGT", "-o", "x.txt"], "must end in one of .parquet, .jsonl"),
        (["ACGT", "-o", "x.fa", "--json"], "--json and --logprobs are of what is printed"),
        (["ACGT", "-o", "x.fa", "--allowed", "AC|"], "FASTA holds letters only"),
        (["ACGT", "-o", "x.fa", "--batch-rows", "0"], "--batch-rows must be at least 1"),
        (["ACGT", "-o", "x.fa", "--stats"], "--stats is of one completion"),
        (["ACGT", "-o", "x.fa", "-n", "0"], "n must be between 1 and 1,048,576, not 0"),
        (["ACGT", "-o", "x.fa", "-n", "99999999999999999999"], "n must be between 1 and 1,048,576"),
        (["ACGT", "-o", "no/x.fa"], "cannot write no/x.fa: name a file in a folder that exists"),
        (["--prompts", "half.jsonl", "-o", "x.fa"], "half.jsonl, line 1, record '1': an unpaired surrogate at"),
        (["ACGT", "-n", "2"], "--samples needs --json or --output"),
        (["--prompts", "tags.txt"], "--prompts needs --output"),
        (["ACGT", "--restart"], "--restart needs --output"),
        (["ACGT", "--format", "fasta"], "say how --prompts is read"),
        (["--prompts", ".", "-o", "x.fa"], "is a folder: name a file of records"),
        (["ACGT", "-o", "x.bedgraph"], "bedGraph has one number per position"),
        (["ACGT", "-o", "tags.txt"], "must end in one of .parquet"),
        (["ACGT", "-o", "there.fa"], "there.fa is there already: name another, or add --restart to replace it"),
        (["ACGT", "--prompts", "tags.txt", "-o", "x.fa"], "leave the argument"),
        (["--prompts", "no.txt", "-o", "x.fa"], "cannot read no.txt"),
        (["--prompts", "tags.txt", "-o", "x.fa", "--max-new-tokens", "1000"], "pass the maximum length"),
        (["--prompts", "twice.jsonl", "-o", "x.fa"], "two prompts are named 'a_b'"),
    ],
)
def test_mistakes_are_one_line(
    model: str, args: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "load_model", lambda *_, **__: pytest.fail("read the weights"))
    Path("tags.txt").write_text("ACGT\n")
    Path("there.fa").write_text("mine")
    Path("twice.jsonl").write_text('{"name": "a b", "text": "A"}\n{"name": "a_b", "text": "C"}\n')
    Path("half.jsonl").write_text('{"text": "\\ud800"}\n')
    assert generate(model, *args) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err
    assert not Path("x.fa").exists() and Path("there.fa").read_text() == "mine"


def test_a_prompt_that_is_saved_is_that_of_the_samples(model: str) -> None:
    for path, options in (("a.fa", []), ("b.fa", ["--save-prefix", "p"])):
        assert generate(model, "ACGT", "--seed", 5, "-n", 2, "--ignore-eos", "--echo", "-o", path, *options) == 0
    assert Path("a.fa").read_bytes() == Path("b.fa").read_bytes()


def test_a_tag_has_no_place_in_a_sequence(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "ACGT", "-o", "one.fa") == 0
    assert capsys.readouterr().out == "one.fa: 1 sample\n"
    assert generate(model, TAGS[0], "-o", "x.fa", "--echo") == 2
    assert "for which FASTA has no place: leave --echo out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stop", "status"),
    [(KeyboardInterrupt(), 130), (signal.SIGTERM, 143), (NonFiniteError("the logits are not finite"), 2)],
    ids=["Ctrl-C", "SIGTERM", "an error"],
)
def test_a_job_goes_on_after_an_interruption(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stop: Any, status: int
) -> None:
    Path("tags.txt").write_text("ACGT\nTTGA\n")
    options = ["--prompts", "tags.txt", "-n", 3, "--batch-rows", 2, "--max-new-tokens", 20]
    seeds: list[int] = []

    def fails_third(*args: Any, **options: Any) -> Any:
        seeds.extend(options["seed"])
        if len(seeds) == 6 and isinstance(stop, BaseException):
            raise stop
        if len(seeds) == 6:
            signal.raise_signal(stop)
        return generate_(*args, **options)

    generate_ = generation.generate
    monkeypatch.setattr(generation, "generate", fails_third)
    for name in ("x.fa", "x.jsonl"):
        seeds.clear()
        try:
            assert generate(model, *options, "-o", name) == status
        except SystemExit as end:
            assert end.code == status
        assert f"finished rows are kept in {name}.unfinished: the same command goes on" in capsys.readouterr().err
        assert not Path(name).exists()
        assert generate(model, *options, "--top-k", 1, "-o", name) == 2
        assert "--top-k was 0, and is 1 now" in capsys.readouterr().err
        first = seeds[0]
        assert generate(model, *options, "-o", name) == 0
        assert seeds == [
            *range(first, first + 6),
            first + 4,
            first + 5,
        ]  # finished samples are kept
        whole = Path(name).with_stem("y")
        assert generate(model, *options, "-o", str(whole), "--seed", first) == 0
        assert Path(name).read_bytes() == whole.read_bytes()
    rows = [json.loads(line) for line in Path("x.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["1-1", "1-2", "1-3", "2-1", "2-2", "2-3"]
    assert list(rows[0]) == ["name", "prompt", "seed", "end", "mean_loglik", "text"]
    assert {path.suffix for path in Path().iterdir()} == {".fa", ".jsonl", ".txt"}


def test_texts_of_any_characters_have_other_formats(model: str) -> None:
    Path("odd").write_text(json.dumps({"id": "é x", "body": "a\x1b é"}) + "\n")
    read = ["--prompts", "odd", "--format", "jsonl", "--text-key", "body"]
    assert generate(model, *read, "--seed", 1, "--echo", "--allowed", "AC|", "-o", "x.jsonl") == 0
    row = json.loads(Path("x.jsonl").read_text())
    assert row["name"] == "é_x-1" and row["prompt"] == "a\x1b é" and row["text"].startswith("a\x1b é")
