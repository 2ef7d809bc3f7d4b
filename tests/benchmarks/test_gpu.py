"""``benchmarks.gpu`` on tiny sizes: what it measures, what it writes, and what it compares with."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is made for Linux only")

from benchmarks.gpu import SUITE, baseline, continuous, correctness, evo2, model, train
from benchmarks.gpu.engine import request_shapes
from benchmarks.gpu.session import GpuSession
from benchmarks.gpu.sizes import FULL, QUICK
from benchmarks.registry import IncorrectError

from benchmarks import report, run
from hyaena.bench import rates
from hyaena.bench.rates import Sizes
from serve.clients import until


@pytest.fixture(autouse=True)
def _small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rates.SIZES, "cpu", Sizes(10_000, 32, 3))


def run_quick(folder: Path, only: str) -> tuple[int, dict[str, report.Part]]:
    status = run.main(SUITE, ["--quick", "--output", str(folder), "--commit", "abc", "--only", only])
    return status, {p["name"]: p for p in report.read(folder / "gpu.json")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_full_run_wants_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(SUITE, [])
    assert stopped.value.code == 2 and "no CUDA device" in capsys.readouterr().err


def test_a_quick_run_measures_everything_but_the_baseline(tmp_path: Path) -> None:
    status, parts = run_quick(tmp_path, "rates,operator,decode,train,lora,prefill")
    assert list(parts) == ["rates", "operator", "decode", "train", "lora", "prefill"]
    errors = [error for p in parts.values() for error in p["errors"]]
    if torch.cuda.is_available():
        assert not errors and status == 0
    else:
        assert [error.split(":")[0] for error in errors] == ["peak memory"] and status == 1
    rows = {name: report.rows_of(p) for name, p in parts.items()}
    count = {name: len(found) for name, found in rows.items()}
    targets = [(r.ratio_name, r.target.relation, r.target.value) for found in rows.values() for r in found if r.target]
    assert {name: count[name] for name in ("rates", "operator", "decode", "train", "lora")} == {
        "rates": 2, "operator": 19, "decode": 3, "train": 6, "lora": 2,
    }  # fmt: skip
    for expected in (
        ("ours / bound", "<=", 1.5),
        ("baseline / ours", ">=", 10),
        ("baseline / ours", ">=", 5),
        ("ours / bound (mbu)", ">=", 0.92),
        ("ours / bound (mfu)", ">=", 0.7),
        ("ours / baseline", ">=", 1.25),
        ("ours / baseline", ">=", 1.4),
        ("ours / baseline", ">=", 1.1),
        ("ours / baseline", "<=", 1.1),
    ):
        assert expected in targets
    assert all("bound by a " in r.baseline_name for r in rows["decode"])
    assert "documents of" in rows["train"][1].note
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]


def test_a_quick_run_measures_evo2_and_narrow_weights(tmp_path: Path) -> None:
    _, parts = run_quick(tmp_path, "narrow,evo2")
    rows = {name: report.rows_of(p) for name, p in parts.items()}
    missing = [error for p in parts.values() for error in p["errors"]]
    assert [error.split(":")[0] for error in missing] == (
        [] if torch.cuda.is_available() else ["tiny evo2, one sequence"]  # its memory is known on CUDA devices only
    )
    targets = {name: [(r.ratio_name, r.target.value) for r in found if r.target] for name, found in rows.items()}
    share, times = "ours / bound (mbu)", "narrow / wide"
    assert targets["narrow"] == [
        *((share, 0.88), (times, 1.8)),
        *((share, 0.88), (times, 2.8), (times, 1.0)),
        *((share, 0.88), (times, 1.8), (times, 1.3)),
    ]
    assert targets["evo2"][:6] == [
        *(pair for speed in (35_000, 30_000) for pair in (("ours / bound (mfu)", 0.75), ("", speed))),
        *[(share, 0.9)] * 2,
    ]  # fmt: skip
    assert len(rows["evo2"]) == 4 + 1 + 2 + 1 + torch.cuda.is_available()


def test_evo2_is_measured_at_the_lengths_of_its_targets() -> None:
    sizes = evo2.FULL
    assert sizes.prompts == ((8192, 35_000), (32_768, 30_000), (131_072, 18_000))
    assert sizes.decodes == ((1, 4096), (96, 4096)) and sizes.sequence == 1_000_000
    assert sizes.config.max_length >= sizes.sequence and evo2.MOST_MEMORY == 55


def test_the_full_sizes_have_every_target_of_training_and_decoding() -> None:
    assert FULL.training == ((32_768, 1.25, 1.1), (65_536, 1.4, None), (131_072, 1.57, None))
    assert {target for batch, _, target in FULL.decodes if batch == 1} == {0.92}
    config = FULL.training_config
    assert config.layer_types == ("hyena", "attention") * 2 and config.hidden_size == FULL.config.hidden_size


def test_documents_fill_a_window() -> None:
    documents = train.pack(32_768, 256, 8192)
    assert sum(documents) == 32_768 and len(documents) > 4
    assert all(256 <= n <= 8192 for n in documents[:-1]) and 0 < documents[-1] <= 8192


def test_a_training_step_recomputes_its_layers_and_keeps_no_gradient() -> None:
    made = train.trainable(QUICK.training_config, torch.device("cpu"), torch.float32)
    passes: list[None] = []
    made.layers[0].mlp_norm.register_forward_hook(lambda *args: passes.append(None))
    ids = torch.randint(512, (1, 12))
    train.step(made, ids, torch.tensor([[0] * 5 + [1] * 7]))
    assert len(passes) == 2 and all(p.grad is None for p in made.parameters())


# --- the tests of the kernels


def finished(monkeypatch: pytest.MonkeyPatch, status: int, out: str) -> list[Any]:
    commands: list[Any] = []

    def fake(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append((command, options))
        return subprocess.CompletedProcess(command, status, stdout=out, stderr="")

    monkeypatch.setattr(subprocess, "run", fake)
    return commands


def test_tests_that_pass_are_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = finished(monkeypatch, 0, "...\n===== 512 passed, 3 skipped in 80.10s =====\n")
    line = correctness.pytest(GpuSession(quick=True, deadline=float("inf")))
    assert line.met and line.ours.median == 0 and line.note == "512 passed, 3 skipped in 80.10s."
    command, options = commands[0]
    assert "--wide" in command and "--collect-only" in command and options["timeout"] == correctness.LIMIT
    assert all((Path(options["cwd"]) / path).exists() for path in correctness.PATHS)


def test_tests_that_fail_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    finished(monkeypatch, 1, "FAILED tests/a.py::b - AssertionError\n===== 1 failed in 1.0s =====\n")
    with pytest.raises(IncorrectError, match=r"tests/a\.py::b"):
        correctness.pytest(GpuSession(quick=True))


def test_wide_tests_need_the_option_and_a_gpu(request: pytest.FixtureRequest) -> None:
    assert any(marker.startswith("wide: ") for marker in request.config.getini("markers"))
    assert request.config.getoption("--wide") in (True, False)


# --- children


def child(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_a_child_printed_survives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "GRACE", 0.0)
    printed = "print('noise'); print('{\"a\": 1}', flush=True); "
    assert baseline.finish(child(printed), 60) == ([{"a": 1}], "")
    assert baseline.finish(child(printed + "raise SystemExit('no memory')"), 60) == ([{"a": 1}], "no memory")
    mark = tmp_path / "printed"
    slow = child(printed + f"open({str(mark)!r}, 'w').close(); import time; time.sleep(300)")
    until(mark.exists)
    assert baseline.finish(slow, 0.01) == ([{"a": 1}], "it did not end in time")
    assert slow.returncode is not None


# --- the baseline


def test_a_baseline_stands_beside_ours_or_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        {"name": "prefill 48", "seconds": [2.0, 1.0, 3.0], "note": "one pass", "peak_memory": 10**9},
        {"name": "prefill 96", "seconds": [1.0], "note": "one pass"},
        {"name": "decode 1 48", "error": "OOM"},
    ]
    monkeypatch.setattr(baseline, "start", lambda *arguments: None)
    monkeypatch.setattr(baseline, "finish", lambda child, seconds: (lines, "exit status 1"))
    session = GpuSession(quick=True)
    model.prefill_of(session, 48)
    first, long, short, step, many = baseline.compare(session)
    assert list(first.run()) == []
    (line,) = long.run()
    assert (
        line.baseline is not None
        and line.baseline.median == 24
        and line.note == ("The baseline: one pass, peak memory 1.0 GB.")
    )
    assert line.ours.median == statistics.median(48 / s for s in session.prefills[48].seconds.values)
    for found, message in ((short, "our side was not"), (step, "the baseline: OOM"), (many, "exit status 1")):
        with pytest.raises(RuntimeError, match=message):
            list(found.run())


def test_the_baseline_is_measured() -> None:
    pytest.importorskip("transformers")
    lines = list(baseline.measure(QUICK))
    assert [line["name"] for line in lines] == ["prefill 48", "prefill 96", "decode 1 48", "decode 3 24"]
    assert all(len(line["seconds"]) >= 2 and "error" not in line for line in lines)
    assert [line["name"] for line in baseline.measure(QUICK, rehearse=True)] == ["decode 1 48", "decode 3 24"]


@torch.inference_mode()
def test_the_baselines_static_steps_and_chunks_are_its_one_pass() -> None:
    pytest.importorskip("transformers")
    from benchmarks.mistral import Mistral

    mistral = Mistral(QUICK.config)
    for p in mistral.model.parameters():
        p.normal_(std=0.2)
    ids = torch.randint(QUICK.config.vocab_size, (1, 20))
    whole = mistral.prefill(ids)
    torch.testing.assert_close(mistral.prefill(ids, chunk=7), whole)
    cache = mistral.static_cache(1, 40)
    mistral.model(ids, past_key_values=cache, use_cache=True)
    step = baseline.static_steps(mistral, 1, 20, room=0, compiled=False, cache=cache)
    token, written = whole.argmax(-1, keepdim=True), ids
    for _ in range(5):
        written = torch.cat([written, token], dim=1)
        token = step(token)
        assert torch.equal(token, mistral.prefill(written).argmax(-1, keepdim=True))


# --- continuous batching


def test_the_baseline_of_many_requests_writes_every_token() -> None:
    pytest.importorskip("transformers", minversion="5.17")
    found = continuous.measure(QUICK, num_blocks=64, max_batch_tokens=64)
    assert found["tokens"] == sum(new for _, new in request_shapes(QUICK)[:3]) and found["seconds"] > 0


def test_many_requests_are_held_against_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = request_shapes(QUICK)[: QUICK.compared_requests]
    tokens = sum(new for _, new in shapes)
    theirs = {"seconds": 8.0, "tokens": tokens, "start": 1.0, "note": "attention sdpa"}
    monkeypatch.setattr(continuous, "time_requests", lambda session, given: (2.0, 0) if given == shapes else None)
    monkeypatch.setattr(continuous.baseline, "start", lambda *arguments, module: None)
    monkeypatch.setattr(continuous.baseline, "finish", lambda child, seconds: ([theirs], ""))
    row = continuous.beside(GpuSession(quick=True))
    assert row.met and row.ratio is not None and row.ratio.median == 4.0 and row.ours.median == tokens / 2
    theirs["tokens"] -= 1
    with pytest.raises(IncorrectError, match="asked for"):
        continuous.beside(GpuSession(quick=True))
