"""``benchmarks.kernels`` on tiny sizes: every figure is taken and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is made for Linux only")

from benchmarks.kernels import cache_dtypes, decode, few_rows, fp8, hyena, pages

from hyaena.bench import rates
from hyaena.bench.rates import Sizes
from hyaena.ops.triton.hyena.launch import BackwardTiling, Tiling


@pytest.fixture(autouse=True)
def _small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rates.SIZES, "cpu", Sizes(10_000, 32, 2))


def figures(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["figures"]


def test_the_operator_in_every_tiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hyena, "TILINGS", {"small": Tiling(channels=16, segments=2, steps=4, group=2)})
    monkeypatch.setattr(hyena, "BACKWARD", {"small": BackwardTiling(16, 2, 16)})
    monkeypatch.setattr(hyena, "QUICK", (16, (2, 5), 1))
    hyena.main(["--quick", "--output", str(tmp_path)])
    found = figures(tmp_path / "hyena.json")
    assert [(f["what"], f["name"]) for f in found] == [
        *(("forward", name) for _ in range(2) for name in ("small", "blocked", "fft")),
        ("backward", "small"),
        *(("both", name) for name in ("triton", "blocked", "fft")),
        *(("step", name) for _ in range(2) for name in ("step kernel", "recurrence")),
    ]
    assert all(f["bound"] > 0 and min(f["seconds"]) > 0 for f in found)


def test_the_products_of_a_decoding_step_and_the_step_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "shapes", lambda config: [("gate", config.intermediate_size, config.hidden_size)])
    monkeypatch.setattr(decode, "CUDA", False)
    decode.main(["--quick", "--output", str(tmp_path)])
    known = json.loads((tmp_path / "decode.json").read_text(encoding="utf-8"))
    *products, step = known["figures"]
    assert [(p["kind"], p["shape"], len(p["tiles"])) for p in products] == [("gate", [192, 64], 1)]
    assert step["what"] == "products by torch" and step["context"] == 60 and len(step["seconds"]) == 4
    assert known["tuned_tiles"] == {"('gate', 96, 64)": [8, 64, 1, 1]}


def test_the_products_of_several_rows_and_their_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "shapes", lambda config: [("gate", config.intermediate_size, config.hidden_size)])
    monkeypatch.setattr(few_rows, "CUDA", False)
    few_rows.main(["--quick", "--output", str(tmp_path)])
    known = json.loads((tmp_path / "few_rows.json").read_text(encoding="utf-8"))
    assert [(f["what"], f.get("tile", f.get("name"))) for f in known["figures"]] == [
        ("gate 96x64", "torch"), ("gate 96x64", "(64, 128, 1, 3, 4)"), ("gate 96x64", "(16, 64, 1, 2, 4)"),
        ("step", "tiles by rule"),
    ]  # fmt: skip
    assert list(known["fastest"]) == ["('gate', 16, 96, 64)"]
    few_rows.main(["--quick", "--compile", "1/1", "--vectors", "3"])


def test_pages_and_storage_of_rows_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "CUDA", False)
    pages.main(["--quick", "--output", str(tmp_path)])
    found = figures(tmp_path / "pages.json")
    assert [(f["what"], f["name"], f["batch"]) for f in found] == [
        *(("attention", name, batch) for batch in (1, 3) for name in ("storage of rows", "pages")),
        ("shared prefix", "every row reads", 4),
        ("shared prefix", "every page once", 4),
        *(("step", name, batch) for batch in (1, 3) for name in ("storage of rows", "pages")),
    ]  # fmt: skip
    assert all(min(f["seconds"]) > 0 for f in found)
    known = json.loads((tmp_path / "pages.json").read_text(encoding="utf-8"))
    assert known["cache_gb"] < known["unshared_gb"]


def test_dtypes_of_a_cache_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="the operators of a CPU are compiled by numba")
    monkeypatch.setattr(cache_dtypes, "ROUNDS", 1)
    cache_dtypes.main(["--quick", "--output", str(tmp_path)])
    found = figures(tmp_path / "cache_dtypes.json")
    assert [(f["name"], f["batch"]) for f in found if f["name"] == "int8"] == [("int8", 1), ("int8", 3)]
    assert all(f["bound"] > 0 and min(f["seconds"]) > 0 for f in found)


def test_rows_of_a_benchmark_share_what_they_should() -> None:
    count, rows = pages.random_pages(3, 5 * 64 - 1, shared=2)
    assert count == 2 + 3 * 3 and [row[:2] for row in rows] == [rows[0][:2]] * 3
    assert sorted({page for row in rows for page in row}) == list(range(count))


def test_fp8_layers_beside_bfloat16_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "EMULATED", (1, 3))
    fp8.main(["--quick", "--output", str(tmp_path)])
    found = figures(tmp_path / "fp8.json")
    assert [(f["what"], f["rows"]) for f in found[:2]] == [("emulation", 1), ("emulation", 3)]
    assert [(f["what"], f["name"], f["rows"]) for f in found[2:]] == [
        ("projection", name, rows) for rows in (1, 20) for name in ("FP8", "bfloat16")
    ]
    assert all(f["bound"] > 0 and min(f["seconds"]) > 0 for f in found)
