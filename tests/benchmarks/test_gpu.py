"""``benchmarks.gpu`` on tiny sizes: what it promises, what it writes, and what a failure leaves standing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is made for Linux only")

from benchmarks.gpu_sizes import FULL, QUICK, Claim, claims
from benchmarks.registry import Bar, IncorrectError, Spread

from benchmarks import gpu, gpu_checks, gpu_page, gpu_peer, gpu_phases


def known(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu.json").read_text(encoding="utf-8"))


def lines_of(folder: Path) -> list[str]:
    return [line for line in (folder / "gpu.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]


# --- what is promised ------------------------------------------------------------------------------------------------


def test_every_bar_of_the_plan_is_claimed() -> None:
    bars = {name: (c.bar.relation, c.bar.value) for name, c in claims(FULL).items() if c.bar is not None}
    assert bars == {
        "operator 32768 floor": ("<=", 1.5),
        "operator 131072 floor": ("<=", 1.5),
        "operator 32768 fft": (">=", 10),
        "operator 131072 fft": (">=", 10),
        "training": (">=", 5),
        **{f"prefill {n} floor": (">=", 0.7) for n in (8192, 32_768, 131_072)},
        "memory": ("<=", 8),
        "decode 1 2048 floor": (">=", 0.85),
        "decode 1 32768 floor": (">=", 0.85),
        "prefill 32768 peer": (">", 1),
        "prefill 131072 peer": (">", 1),
        "decode 1 32768 peer": (">", 1),
        "decode 64 8192 peer": (">=", 1.5),
    }


@pytest.mark.parametrize("sizes", [FULL, QUICK])
def test_steps_answer_every_claim_once(sizes: Any) -> None:
    phases = gpu_phases.phases(sizes)
    assert tuple(phases) == gpu.PHASES
    answered = [(phase, name) for phase, steps in phases.items() for step in steps for name in step.claims]
    assert sorted(answered) == sorted((claim.phase, name) for name, claim in claims(sizes).items())


def test_ratios_are_held_against_their_bars_the_right_way_round() -> None:
    ours, other = Spread.of([2.0, 4.0, 5.0]), Spread.of([1.0, 2.0, 8.0])
    floor = Claim(phase="p", what="w", unit="s", peer_name="floor", ratio="ours / floor", bar=Bar("<=", 2))
    assert floor.row(ours, other).ratio == Spread(0.25, 2.0, 5.0, 3) and floor.row(ours, other).met
    fft = Claim(phase="p", what="w", unit="s", peer_name="fft", ratio="peer / ours", bar=Bar(">=", 0.6))
    assert fft.row(ours, other).ratio == Spread(0.2, 0.5, 4.0, 3) and not fft.row(ours, other).met
    alone = Claim(phase="p", what="w", unit="GB", bar=Bar("<=", 3))
    assert alone.row(ours).ratio is None and not alone.row(ours).met
    assert not Bar(">", 1).met_by(1.0) and Bar(">", 1).met_by(1.01)


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_quick_run_measures_everything_but_the_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phases = ["checks", "rates", "operator", "prefill", "decode"]
    assert gpu.main(["--quick", "--output", str(tmp_path), "--commit", "abc", "--only", *phases]) == 0
    found = known(tmp_path)
    left_out = {name for name, claim in claims(QUICK).items() if claim.phase == "peer"}
    if not torch.cuda.is_available():
        left_out.add("memory")
        assert found["missing"]["memory"] == "peak memory can be told on CUDA devices only"
    assert set(found["rows"]) == set(claims(QUICK)) - left_out and set(found["missing"]) == left_out
    assert found["occasion"]["commit"] == "abc" and found["occasion"]["command"].startswith("python -m benchmarks.gpu")
    assert set(found["seconds"]) == set(gpu.PHASES)
    assert set(found["raw"]["checks"]) == set(gpu_checks.checks(quick=True))
    table = lines_of(tmp_path)
    assert sum("not measured" in line for line in table) == len(left_out)
    out = capsys.readouterr().out
    assert "not measured: prefill 48 peer: left out of this run" in out and "peer 0 s" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]


def one_step(monkeypatch: pytest.MonkeyPatch, **steps: Callable[[Any], Any]) -> None:
    """Phases of one made-up step each, which answer the copy's and the product's rates."""
    names = {"rates": ("copy",), "operator": ("product",)}
    made = {phase: [gpu_phases.Step(names.get(phase, ()), run)] for phase, run in steps.items()}
    monkeypatch.setattr(gpu_phases, "phases", lambda sizes: made)


def fine(name: str) -> Callable[[Any], Any]:
    return lambda bench: {name: bench.claims[name].row(Spread.of([1.0]))}


def broken(bench: Any) -> Any:
    raise RuntimeError("it\nbroke")


def test_a_step_that_fails_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one_step(monkeypatch, rates=broken, operator=fine("product"))
    assert gpu.main(["--quick", "--output", str(tmp_path)]) == 1
    found = known(tmp_path)
    assert found["missing"]["copy"] == "RuntimeError: it broke" and list(found["rows"]) == ["product"]
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "read and written bytes: not measured: RuntimeError: it broke" in page


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong() -> Any:
        raise IncorrectError("the sides disagree")

    made = {"gradients": gpu_checks.Check(wrong, ("operator",)), "steps": gpu_checks.Check(list, ("rates",))}
    monkeypatch.setattr(gpu_checks, "checks", lambda quick: made)
    one_step(monkeypatch, checks=gpu_phases.check, rates=fine("copy"), operator=fine("product"))
    assert gpu.main(["--quick", "--output", str(tmp_path)]) == 1
    found = known(tmp_path)
    assert list(found["rows"]) == ["copy"]
    assert found["missing"]["product"] == "the check of gradients failed: the sides disagree"
    assert "gradients: wrong or unfinished" in (tmp_path / "gpu.md").read_text(encoding="utf-8")


def test_without_checks_nothing_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one_step(monkeypatch, checks=broken, rates=fine("copy"), operator=fine("product"))
    assert gpu.main(["--quick", "--output", str(tmp_path)]) == 1
    found = known(tmp_path)
    assert not found["rows"] and found["missing"]["copy"] == "the checks did not end: RuntimeError: it broke"


def test_nothing_begins_after_the_limit(tmp_path: Path) -> None:
    assert gpu.main(["--quick", "--limit", "0", "--output", str(tmp_path)]) == 0
    found = known(tmp_path)
    assert not found["rows"] and set(found["missing"].values()) == {"the limit of 0 s was reached"}


def test_results_are_saved_after_every_phase(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def killed(bench: Any) -> Any:
        raise KeyboardInterrupt

    one_step(monkeypatch, rates=fine("copy"), operator=killed)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--quick", "--output", str(tmp_path)])
    found = known(tmp_path)
    assert list(found["rows"]) == ["copy"] and found["missing"]["product"] == "the run ended before it"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_full_run_wants_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main([])
    assert stopped.value.code == 2 and "no CUDA device" in capsys.readouterr().err


# --- children --------------------------------------------------------------------------------------------------------


def child(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_children_said_survives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_phases, "GRACE", 0.0)
    said = "print('noise'); print('{\"a\": 1}', flush=True); "
    assert gpu_phases._finish(child(said), 60) == ([{"a": 1}], "")
    assert gpu_phases._finish(child(said + "raise SystemExit('no room')"), 60) == ([{"a": 1}], "no room")
    slow = child(said + "import time; time.sleep(300)")
    assert slow.stdout is not None
    assert gpu_phases._finish(slow, 5) == ([{"a": 1}], "its time was up")
    assert slow.returncode is not None


def test_a_wrong_result_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "exact", lambda *args: gpu_checks.hyena(*args[:4], None, method="blocked"))
    with pytest.raises(IncorrectError, match="operator, T 40, output"):
        gpu_checks.run(gpu_checks.checks(quick=True)["operator"])


# --- the peer --------------------------------------------------------------------------------------------------------


def test_the_peer_is_measured_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    lines = list(gpu_peer.measure(QUICK))
    assert [line["name"] for line in lines] == ["prefill 48", "prefill 96", "decode 1 48", "decode 3 24"]
    assert all(len(line["seconds"]) >= 2 and "error" not in line for line in lines)
    assert [line["name"] for line in gpu_peer.measure(QUICK, rehearse=True)] == ["decode 1 48", "decode 3 24"]

    monkeypatch.setattr(gpu_phases, "_start", lambda *args: None)
    monkeypatch.setattr(
        gpu_phases, "_finish", lambda *args: ([*lines[:3], {"name": "decode 3 24", "error": "OOM"}], "")
    )
    bench = gpu_phases.Bench(QUICK, quick=True, deadline=0.0)
    gpu_phases.prefill(bench, length=48)
    gpu_phases.decode(bench, batch=1, context=48)
    rows = gpu_phases.peer(bench)
    assert set(rows) == {name for name, claim in claims(QUICK).items() if claim.phase == "peer"}
    assert rows["prefill 96 peer"] == "our side was not measured in this run"
    assert rows["decode 3 24 peer"] == "the peer: OOM"
    row = rows["prefill 48 peer"]
    assert not isinstance(row, str) and row.ratio is not None and "one pass" in row.note
    assert row.ours.median == pytest.approx(bench.prefills[48].tokens_per_second)
    assert "not measured" in gpu_page.lines(bench.claims, {"prefill 48 peer": row})[-1]


@torch.inference_mode()
def test_the_peers_static_steps_and_chunks_are_its_one_pass() -> None:
    pytest.importorskip("transformers")
    from benchmarks.mistral import Mistral

    peer = Mistral(QUICK.config)
    for p in peer.model.parameters():
        p.normal_(std=0.2)
    ids = torch.randint(QUICK.config.vocab_size, (1, 20))
    whole = peer.prefill(ids)
    torch.testing.assert_close(peer.prefill(ids, chunk=7), whole)
    cache = peer.static_cache(1, 40)
    peer.model(ids, past_key_values=cache, use_cache=True)
    step = gpu_peer.static_steps(peer, 1, 20, room=0, compiled=False, cache=cache)
    token, written = whole.argmax(-1, keepdim=True), ids
    for _ in range(5):
        written = torch.cat([written, token], dim=1)
        token = step(token)
        assert torch.equal(token, peer.prefill(written).argmax(-1, keepdim=True))
