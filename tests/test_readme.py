"""The README: its commands and programs run in a bare clone, its figures are those of the pages, its links lead on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import pages
from hyaena.bench import rates
from hyaena.bench.rates import Sizes

README = pages.ROOT / "README.md"
RESULTS = pages.ROOT / "benchmarks" / "results"


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = [kind for kind, _ in pages.blocks(README)]
    assert kinds.count("python") >= 4 and kinds.count("bash") >= 4
    pages.clone(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(rates.SIZES, "cpu", Sizes(10_000, 32, 3))  # what `hyaena bench` measures beside the model
    pages.run(README, monkeypatch)
    assert {path.name for path in tmp_path.iterdir()} - before == {
        "converted",
        "scores.jsonl",
        "bench.json",
        "bench.png",
    }
    out = capsys.readouterr().out
    assert '"finish_reason"' in out and "7,912,224" in out and "7,646,023,680" in out


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_every_link_and_every_named_command_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for target, anchor in re.findall(r"\]\(([^)#:]*\.md)?#([^)]*)\)", text):
        headings = re.findall(r"^#+ (.*)$", ((page.parent / target) if target else page).read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}, f"#{anchor}"
    targets = set(re.findall(r"^([\w-]+):", (pages.ROOT / "Makefile").read_text(), re.MULTILINE))
    # Commands stand in code: after a backquote, a prompt or an indentation.
    for name in re.findall(r"(?:`|\$ |    )make (?:[A-Z_]+=\S+ )*([a-z][\w-]*)(?![\w/-])", text):
        assert name in targets, f"{page.name}: make {name}"
    for path in re.findall(r"(?:`|\$ |    )python (?!-)(\S+\.py)", text):
        assert (pages.ROOT / path).exists(), f"{page.name}: python {path}"
    for module in re.findall(r"python -m ((?:benchmarks|hyaena)[\w.]*)", text):
        path = pages.ROOT / ("src" if module.startswith("hyaena") else "") / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir(), f"{page.name}: python -m {module}"


def test_the_figures_of_the_table_are_those_of_the_pages() -> None:
    """Within 5 %: that much a repeated run may differ, and the README need not follow every one."""
    names = ("gpu.json", "cpu.json", "scoring.json")
    benchmarks = [entry for name in names for entry in json.loads((RESULTS / name).read_text(encoding="utf-8"))]
    layers = "two Hyena and two attention layers, D 4096"
    rows = (
        ("H100", "decoding, batch 1, context 2,048", "bound", 191, 0.96),
        ("H100", "decoding, batch 1, context 32,768", "bound", 168, 0.96),
        ("H100", "prefill of 8,192 tokens", "bound", 36936, 0.79),
        ("H100", "prefill of 32,768 tokens", "bound", 33328, 0.94),
        ("H100", "prefill of 131,072 tokens", "bound", 19817, 0.87),
        ("H200", "decoding, batch 1, context 32,768", "Mistral", 230, 3.5),
        ("H100", f"training step, T 32,768, {layers}", "four", 60553, 1.26),
        ("H100", f"training step, T 131,072, {layers}", "four", 32691, 1.58),
        ("H100", f"training step, T 32,768, {layers}, packed", "the same", 75786, 1.24),
        ("H200", "scoring 2,000 sequences of 200 to 4,000 tokens: log-probabilities", "bound", 39800, 0.88),
        ("H200", "scoring one sequence of 1,000,000 tokens, layer by layer", "bound", 4124, 0.76),
        ("H200", "evo2-7b, prefill of 8,192 tokens", "bound", 46872, 0.84),
        ("H200", "evo2-7b, prefill of 32,768 tokens", "bound", 44535, 0.91),
        ("H200", "evo2-7b, prefill of 131,072 tokens", "bound", 36046, 0.90),
        ("H200", "evo2-7b, decoding, batch 1, context 4,096", "bound", 287, 0.93),
        ("", "peak memory growth of one batch of 15 prompts of 10 bytes and one of 24,000, cub", "the short", 67, 0.87),
    )
    table = README.read_text(encoding="utf-8").split("**Measured**")[1].split("![")[0]
    for device, what, baseline, rate, ratio in rows:
        (row,) = (
            row
            for benchmark in benchmarks
            if device in benchmark["machine"].get("device", "")
            for row in benchmark["rows"]
            if row["what"] == what and row["baseline_name"].startswith(baseline)
        )
        assert row["ours"]["median"] == pytest.approx(rate, rel=0.05) and f"{rate:,}" in table, what
        assert row["ratio"]["median"] == pytest.approx(ratio, rel=0.05), what
        shown = {0.96: "96 %", 0.93: "93 %", 0.87: "0.87"}.get(ratio, str(ratio))
        assert shown in table, what
