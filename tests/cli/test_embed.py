"""``hyaena embed``: the vectors of ``hyaena.embed``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

import hyaena
from hyaena import hub
from hyaena.cli import main
from hyaena.cli.embed import parse_layers, parse_pool
from hyaena.errors import InputError
from hyaena.jobs.journal import Journal

COMMANDS = {"embed": "hyaena.cli.embed"}
TEXTS = {"geneA": "ACGTACGTAAGGCCTTACGTN", "chr1/b": "TTGACA", "geneC": "G"}
LAYERS = ["0", "blocks.1.mlp.l3", "norm", "-1"]
WANTED: list[int | str] = [0, "blocks.1.mlp.l3", "norm", -1]


@pytest.fixture
def model(golden: Path) -> Path:
    return golden / "evo-tiny"


@pytest.fixture
def genes(tmp_path: Path) -> Path:
    path = tmp_path / "genes.fa"
    path.write_text("".join(f">{name}\n{text}\n" for name, text in TEXTS.items()))
    return path


def embed(*args: object) -> int:
    return main(["embed", *map(str, args), "--device", "cpu"], commands=COMMANDS)


def expected(model: Path, pool: Any, **options: Any) -> list[dict[int | str, Any]]:
    network, tokenizer = hyaena.load(model)
    return [
        vectors
        for _, vectors in hyaena.iter_embeddings(network, tokenizer, TEXTS.values(), WANTED, pool=pool, **options)
    ]


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(np.asarray(found, np.float32), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_pooled_vectors(model: Path, genes: Path, tmp_path: Path, pool: str) -> None:
    for name in ("e.npz", "e.parquet", "e.jsonl"):
        assert embed(genes, "-o", tmp_path / name, "--model", model, "--layers", ",".join(LAYERS), "--pool", pool) == 0
    table = parquet.read_table(tmp_path / "e.parquet").to_pylist()
    lines = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    with np.load(tmp_path / "e.npz") as found:
        assert found.files == ["name", *LAYERS] and found["name"].tolist() == list(TEXTS)
        for index, vectors in enumerate(expected(model, pool)):
            for layer, wanted in vectors.items():
                assert wanted.shape == (64,)
                close(found[str(layer)][index], wanted)
                close(table[index][str(layer)], wanted)
                close(lines[index][str(layer)], wanted)


@pytest.mark.parametrize("pool", ["none", "0,-1"])
def test_vectors_of_tokens(model: Path, genes: Path, tmp_path: Path, pool: str) -> None:
    for name in ("e.npz", "e.parquet"):
        assert (
            embed(genes, "-o", tmp_path / name, "--model", model, f"--layers={','.join(LAYERS)}", "--pool", pool) == 0
        )
    table = parquet.read_table(tmp_path / "e.parquet").to_pylist()
    with np.load(tmp_path / "e.npz") as found:
        for index, vectors in enumerate(expected(model, parse_pool(pool))):
            for layer, wanted in vectors.items():
                close(found[f"{layer}/{list(TEXTS)[index]}"], wanted)
                close(table[index][str(layer)], wanted)


def test_both_strands_and_one_layer(model: Path, genes: Path, tmp_path: Path) -> None:
    assert embed(genes, "-o", tmp_path / "e.npz", "--model", model, "--layers=-1", "--both-strands") == 0
    with np.load(tmp_path / "e.npz") as found:
        close(found["-1"], [vectors[-1] for vectors in expected(model, "mean", both_strands=True)])


def test_an_interrupted_job_goes_on(model: Path, genes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--model", model, "--save-every", 1, "--pool", "none"]
    assert embed(genes, "-o", tmp_path / "whole.npz", *options) == 0
    mark = Journal.mark

    def interrupted(self: Journal, digest: str) -> None:
        if len(self.marks) == 2:
            raise KeyboardInterrupt
        mark(self, digest)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "mark", interrupted)
        assert embed(genes, "-o", tmp_path / "e.npz", *options) == 130
    assert embed(genes, "-o", tmp_path / "e.npz", *options) == 0
    assert (tmp_path / "e.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "99"], "layer 99 does not exist: this model has layers 0 … 3"),
        (["--layers", "blocks.1.mlp.l4"], "the model has no layer 'blocks.1.mlp.l4': did you mean blocks.1.mlp.l"),
        (["--layers", "0,,1"], "--layers must be different layers separated by commas, not '0,,1'"),
        (["--layers", "0,0"], "--layers must be different layers"),
        (["--pool", "max"], "pool must be mean, last, none or a list of positions, not 'max'"),
        (["--pool", "0,5"], "genes.fa, line 5, record 'geneC': position 5 is outside its 1 tokens"),
    ],
)
def test_mistakes_are_one_line(
    model: Path,
    genes: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--pool" not in options or "max" in options:
        monkeypatch.setattr(hub, "load_model", lambda *_, **__: pytest.fail("read the weights"))
    assert embed(genes, "-o", tmp_path / "e.npz", "--model", model, *options) == 2
    err = capsys.readouterr().err
    assert err.startswith("hyaena: error: ") and err.count("\n") == 1 and message in err


def test_layers_and_pools_are_parsed() -> None:
    assert parse_layers("12, blocks.20.mlp.l3,-1") == [12, "blocks.20.mlp.l3", -1]
    assert (parse_pool("mean"), parse_pool("3"), parse_pool("0,-1")) == ("mean", [3], [0, -1])
    with pytest.raises(InputError):
        parse_layers("name")
