"""``hyaena score``: the numbers of ``hyaena.score``, from every kind of file into every kind of file."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

import hyaena
from hyaena import hub
from hyaena.cli import main
from hyaena.cli.progress import Progress

SRC = Path(__file__).parents[2] / "src"
COMMANDS = {"score": "hyaena.cli.score"}
TEXTS = {"geneA": "ACGTACGTAAGGCCTTACGTN", "geneB": "TTGACA", "geneC": "G", "geneD": "ACGT" * 30}
FASTA = "".join(f">{name} of a test\n{text}\n" for name, text in TEXTS.items())


@pytest.fixture
def model(golden: Path) -> Path:
    """A tiny model of characters."""
    return golden / "evo-tiny"


@pytest.fixture
def genes(tmp_path: Path) -> Path:
    path = tmp_path / "genes.fa"
    path.write_text(FASTA)
    return path


def score(*args: object) -> int:
    return main(["score", *map(str, args), "--device", "cpu"], commands=COMMANDS)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def close(found: Any, expected: Any) -> None:
    expected = [None if np.isnan(x) else x for x in np.atleast_1d(expected).tolist()]
    found = [None if x is None or np.isnan(x) else x for x in np.atleast_1d(np.array(found, float)).tolist()]
    assert [x is None for x in found] == [x is None for x in expected]
    pairs = [pair for pair in zip(found, expected, strict=True) if pair[0] is not None]
    for one, other in pairs:  # float32 whose sums were taken in another order
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_rows_are_the_numbers_of_the_function(
    model: Path, genes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.jsonl"
    assert score(genes, "-o", out, "--model", model, "--per-token") == 0
    assert capsys.readouterr().out == f"{out}: 4 records, {sum(map(len, TEXTS.values()))} tokens\n"
    (tmp_path / "one.fa").write_text(">x\nA\n")
    assert score(tmp_path / "one.fa", "-o", tmp_path / "one.jsonl", "--model", model) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'one.jsonl'}: 1 record, 1 token\n"
    network, tokenizer = hyaena.load(model)
    expected = hyaena.score(network, tokenizer, list(TEXTS.values()))
    assert isinstance(expected, list)
    for row, name, one in zip(rows(out), TEXTS, expected, strict=True):
        assert list(row) == [
            *("name", "tokens", "predicted", "sum", "mean", "perplexity", "ids", "logprobs", "entropies", "ranks")
        ]
        assert (row["name"], row["tokens"], row["predicted"]) == (name, len(TEXTS[name]), len(TEXTS[name]) - 1)
        assert row["ids"] == list(TEXTS[name].encode()) and row["ranks"] == one.ranks.tolist()
        for column in ("sum", "mean", "perplexity", "logprobs", "entropies"):
            close(row[column], getattr(one, column))


def test_both_strands(model: Path, genes: Path, tmp_path: Path) -> None:
    assert score(genes, "-o", tmp_path / "s.jsonl", "--model", model, "--per-token", "--both-strands") == 0
    expected = hyaena.score(*hyaena.load(model), list(TEXTS.values()), both_strands=True)
    assert isinstance(expected, list)
    for row, one in zip(rows(tmp_path / "s.jsonl"), expected, strict=True):
        assert "ranks" not in row
        close(row["sum"], one.sum)
        close(row["logprobs"], one.logprobs)


def test_every_format_gives_the_same_rows(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {
        "x.fa.gz": gzip.compress(FASTA.encode()),
        "x.fastq": "".join(f"@{n}\n{t}\n+\n{'I' * len(t)}\n" for n, t in TEXTS.items()).encode(),
        "x.jsonl": "".join(json.dumps({"id": n, "text": t}) + "\n" for n, t in TEXTS.items()).encode(),
        "x.txt": "".join(f"{t}\n" for t in TEXTS.values()).encode(),
    }
    for name, content in inputs.items():
        (tmp_path / name).write_bytes(content)
    table = pyarrow.table({"gene": list(TEXTS), "seq": list(TEXTS.values())})
    parquet.write_table(table, tmp_path / "x.parquet")
    options: dict[str, list[str]] = {"x.parquet": ["--text-key", "seq", "--name-key", "gene"]}
    expected: list[dict[str, Any]] = []
    for name in (*inputs, "x.parquet"):
        out = tmp_path / f"{name}.out.jsonl"
        assert score(tmp_path / name, "-o", out, "--model", model, *options.get(name, [])) == 0
        found = rows(out)
        assert [row.pop("name") for row in found] == ([*"1234"] if name == "x.txt" else list(TEXTS))
        expected = expected or found
        assert found == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(FASTA.encode()))))
    assert score("-", "--format", "fasta", "-o", tmp_path / "stdin.jsonl", "--model", model) == 0
    assert (tmp_path / "stdin.jsonl").read_bytes() == (tmp_path / "x.fa.gz.out.jsonl").read_bytes()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set()


def test_a_pipe_is_an_input(model: Path, genes: Path, tmp_path: Path) -> None:
    assert score(genes, "-o", tmp_path / "a.jsonl", "--model", model) == 0
    os.mkfifo(tmp_path / "pipe.fa")
    with subprocess.Popen(["cp", genes, tmp_path / "pipe.fa"]):
        assert score(tmp_path / "pipe.fa", "-o", tmp_path / "b.jsonl", "--model", model) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_parquet_and_npz(model: Path, genes: Path, tmp_path: Path) -> None:
    for name in ("s.jsonl", "s.parquet", "s.npz"):
        assert score(genes, "-o", tmp_path / name, "--model", model, "--per-token") == 0
    expected = rows(tmp_path / "s.jsonl")
    table = parquet.read_table(tmp_path / "s.parquet").to_pylist()
    with np.load(tmp_path / "s.npz") as found:
        assert found["name"].tolist() == list(TEXTS)
        for index, row in enumerate(expected):
            assert table[index]["tokens"] == found["tokens"][index] == row["tokens"]
            for column in ("sum", "mean"):
                np.testing.assert_equal(table[index][column], found[column][index])
                close(row[column], found[column][index])
            for column in ("logprobs", "ranks", "ids"):
                members = found[f"{column}/{row['name']}"]
                np.testing.assert_array_equal(np.array(table[index][column], members.dtype), members)
                close(row[column], members)


def test_shards_one_after_another_are_the_whole(model: Path, genes: Path, tmp_path: Path) -> None:
    assert score(genes, "-o", tmp_path / "whole.jsonl", "--model", model) == 0
    parts: list[list[dict[str, Any]]] = []
    for number in (1, 2, 3, 4, 5):
        assert (
            score(genes, "-o", tmp_path / f"{number}.jsonl", "--model", model, "--shard", f"{number}/5", "--quiet") == 0
        )
        parts.append(rows(tmp_path / f"{number}.jsonl"))
    assert [] in parts  # geneD is most of the file
    for row, expected in zip(itertools.chain(*parts), rows(tmp_path / "whole.jsonl"), strict=True):
        assert row["name"] == expected["name"]
        close(np.nan if row["sum"] is None else row["sum"], expected["sum"])


# --- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_job_goes_on(
    model: Path,
    genes: Path,
    tmp_path: Path,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from hyaena.jobs.journal import Journal

    options = ["--model", model, "--save-every", 20]
    assert score(genes, "-o", tmp_path / "whole.jsonl", *options) == 0
    mark = Journal.mark

    def interrupted(self: Journal, digest: str) -> None:
        if len(self.marks) == 1:
            signal.raise_signal(number)
        mark(self, digest)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "mark", interrupted)
        if number == signal.SIGINT:
            assert score(genes, "-o", tmp_path / "s.jsonl", *options) == 130
        else:
            with pytest.raises(SystemExit, match="143"):
                score(genes, "-o", tmp_path / "s.jsonl", *options)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"hyaena: finished rows are kept in {tmp_path / 's.jsonl.unfinished'}: the same command goes on"
    assert lines[1:] == ["hyaena: interrupted"] * (number == signal.SIGINT)
    assert not (tmp_path / "s.jsonl").exists()
    assert score(genes, "-o", tmp_path / "s.jsonl", *options, "--per-token") == 2
    assert "--per-token was False, and is True now" in capsys.readouterr().err
    assert score(genes, "-o", tmp_path / "s.jsonl", *options) == 0
    assert (tmp_path / "s.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert score(genes, "-o", tmp_path / "s.jsonl", *options) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_model_that_has_changed_is_refused(
    model: Path, genes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hyaena.jobs.journal import Journal

    mark, options = Journal.mark, ["-o", tmp_path / "s.jsonl", "--model", tmp_path / "m", "--save-every", 20]

    def interrupted(self: Journal, digest: str) -> None:
        mark(self, digest)
        signal.raise_signal(signal.SIGINT)

    network, _ = hyaena.load(model)
    hyaena.save_model(network, tmp_path / "m")
    (tmp_path / "bad.npz").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "mark", interrupted)
        assert score(genes, *options) == 130
    network.layers[0].mlp.down_proj.weight.data[0, 0] += 1  # type: ignore[union-attr]
    hyaena.save_model(network, tmp_path / "m", overwrite=True)
    assert score(genes, *options) == 2
    assert "(the digest of the model's files was " in capsys.readouterr().err


@pytest.mark.integration
@pytest.mark.parametrize("suffix", [".parquet", ".npz", ".jsonl"])
def test_a_process_killed_at_random_loses_nothing(model: Path, tmp_path: Path, suffix: str) -> None:
    """After random times of the processor, which other processes do not stretch."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice([*"ACGT"], length)) for length in rng.integers(5, 250, 100)]
    genes = tmp_path / "genes.fa"
    genes.write_text("".join(f">g{i}\n{text}\n" for i, text in enumerate(texts)))
    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"s{suffix}"
    command = [genes, "--model", model, "--save-every", 1000, "--per-token", "-o"]
    for options in ([], ["--restart"]):  # the second time, nothing is imported any more
        began = time.process_time()
        assert score(*command, whole, *options) == 0
        seconds = time.process_time() - began
    killed = 0
    while not out.exists():
        child = os.fork()  # a process of its own, without the time that imports take
        if child == 0:
            signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process, wherever it is
            signal.setitimer(signal.ITIMER_PROF, seconds * rng.uniform(0.1, 0.4) * (1 + killed / 5))
            os._exit(score(*command, out))
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGPROF)
        killed += status != 0
    assert killed > 0
    if out.with_name(f"s{suffix}.unfinished").exists():  # killed when only the folder was to be removed
        assert score(*command, out) in (0, 2)
    assert out.read_bytes() == whole.read_bytes()
    assert not out.with_name(f"s{suffix}.unfinished").exists()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("x.fa", ">a\nAC\n>b\n>c\nG\n", [], "x.fa, line 3: the record 'b' is empty; remove it"),
        ("x.fa", ">a\nAC\n>a\nG\n", [], "x.fa: two records are named 'a', line 1 and line 3; rename one"),
        ("x.fa", ">a\nAC\n>b\nAEC\n", ["--both-strands"], "x.fa, line 3, record 'b': 'E' at position 1 is no base"),
        ("x.txt", "AC\nA\0\n", [], "x.txt, line 2, record '2': the text has the byte 0 at position 1"),
        ("x.txt", "AC\nACGT\n", ["--max-length", 3], "x.txt, line 2, record '2': 4 tokens pass the maximum length 3"),
        ("x.fa", "", [], "x.fa holds no record"),
        ("x.csv", "", [], "does not tell its format: end it in .fa"),
        ("x.fa", ">a\nAC\n", ["--shard", "0/3"], "a shard is I/N with I from 1 to N"),
        ("x.fa", ">a\nAC\n", ["--save-every", 0], "--save-every must be at least 1"),
        ("x.fa", ">a\nAC\n", ["--batch-tokens", 0], "tokens_per_pass must be at least 1, not 0"),
        ("x.fa", ">a\nAC\n", ["--method", "magic"], "magic"),
        ("x.fa", ">a\nAC\n", ["--dtype", "int8"], "dtype int8 cannot hold a model"),
        ("x.fa", ">a\nAC\n", ["--text-key", "seq"], "read as fasta, which has no keys"),
        ("x.fa", ">a\nAC\n", ["-o", "s.xls"], "must end in one of .parquet"),
        ("x.jsonl", '{"text": "AC"}', ["-o", "x.jsonl", "--restart"], "x.jsonl is the input and the output"),
    ],
)
def test_mistakes_are_one_line_before_weights_are_read(
    model: Path,
    tmp_path: Path,
    name: str,
    content: str,
    options: list[object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "load_model", lambda *_, **__: pytest.fail("read the weights"))
    Path(name).write_text(content)
    assert score(name, "-o", "deep/s.jsonl", "--model", model, *options) == 2
    err = capsys.readouterr().err
    assert err.startswith("hyaena: error: ") and err.count("\n") == 1 and message in err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_numbers_that_are_not_finite_name_the_record(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = hub.load_model

    def load_broken(*args: Any, **options: Any) -> Any:
        network = load(*args, **options)
        nan = float("nan")
        network.embed_tokens.register_forward_hook(lambda _, ids, x: x.masked_fill((ids[0] == 78)[..., None], nan))
        return network

    monkeypatch.setattr(hub, "load_model", load_broken)
    genes = tmp_path / "x.fa"
    genes.write_text(">a\nACGT\n>b\nACNGT\n>c\nAC\n")
    command = [genes, "-o", tmp_path / "s.jsonl", "--model", model, "--save-every", 1]
    for _ in range(2):
        assert score(*command) == 2
        err = capsys.readouterr().err
        kept, problem = err.splitlines()
        assert kept.endswith("s.jsonl.unfinished: the same command goes on")
        assert "x.fa, line 3, record 'b': " in problem and "not finite" in problem
    genes.write_text(">a\nACGT\n>c\nAC\n")
    assert score(*command) == 0
    assert [row["name"] for row in rows(tmp_path / "s.jsonl")] == ["a", "c"]


def test_standard_input_needs_a_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score("-", "-o", tmp_path / "s.jsonl") == 2
    assert "add --format fasta|fastq|jsonl|parquet|lines" in capsys.readouterr().err


def test_a_missing_file_is_named_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from hyaena.cli import main\n"
        f"assert main(['score', 'absent.fa', '-o', 'x.jsonl'], commands={COMMANDS!r}) == 2\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(SRC)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "cannot read absent.fa: No such file or directory; check its name" in done.stderr


def test_the_progress_bar_counts_tokens(
    model: Path, genes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    options = ["--model", model, "--save-every", 20, "--batch-tokens", 32, "--both-strands"]
    assert score(genes, "-o", tmp_path / "s.jsonl", *options) == 0
    total = 2 * sum(map(len, TEXTS.values()))
    assert "100%" in sys.stderr.getvalue() and f"{total}/{total} [" in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_the_rate_is_that_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress(100, unit="tokens", show=True) as progress:
        progress.skip(60)
        progress.begin()
        for counts in ((4, 5), (20, 25), (10,)):
            tell = progress.window()
            for tokens in counts:
                tell(tokens)
        bar = progress._bar
        assert bar is not None and (bar.n, bar.initial) == (100, 60)
