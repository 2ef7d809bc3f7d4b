"""The registry, the runner, the table and the page. Nothing here looks at a clock."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.cpu import SUITE, predictions
from benchmarks.cpu.models import STRIPED
from benchmarks.registry import (
    Benchmark,
    IncorrectError,
    MissingError,
    Row,
    Session,
    Step,
    Suite,
    Summary,
    Target,
    pairwise,
    require_equal,
    spanning,
)

from benchmarks import registry, report, run
from hyaena.sizes import ModelSizes

MACHINE = {"device": "an abacus", "torch": "2"}
OCCASION = {"date": "2001-01-01", "command": "make bench", "commit": "abc", "threads": "2", "load before": "0.00"}


def row(ratio: float | None = 2.5, target: Target | None = None) -> Row:
    summary = None if ratio is None else Summary.of([ratio - 0.5, ratio, ratio + 0.5])
    return Row(
        what="a thing",
        unit="s",
        ours=Summary.of([1.0]),
        baseline_name="the other",
        baseline=Summary.of([2.5]),
        ratio=summary,
        target=target,
    )


# --- the registry


@pytest.mark.parametrize("name", ["cpu", "evo2", "gpu", "scoring", "serve"])
def test_names_are_unique_and_what_they_name_exists(name: str) -> None:
    if name not in ("cpu", "evo2"):
        pytest.importorskip("triton", reason="triton is made for Linux only")
    suite: Suite = registry.load(f"{name}:SUITE")
    assert suite.name == name and len({b.name for b in suite.benchmarks}) == len(suite.benchmarks)
    assert all(callable(b.load()) for b in suite.benchmarks)
    assert isinstance(registry.load(suite.session)(quick=True, deadline=1.0), Session)
    most = {"cpu": 52, "evo2": 15, "gpu": 20, "scoring": 10, "serve": 11}[name]
    assert sum(b.minutes for b in suite.benchmarks) <= most


def test_select_keeps_the_order_of_the_suite() -> None:
    first, second, *rest = (b.name for b in SUITE.benchmarks)
    assert [b.name for b in SUITE.select([second, first])] == [first, second]
    assert [b.name for b in SUITE.select([], [first])] == [second, *rest]
    assert SUITE.select() == list(SUITE.benchmarks)


@pytest.mark.parametrize(
    ("only", "skip", "message"),
    [
        (["long_cnv"], [], "did you mean long_conv"),
        (["speed"], [], "choose from startup"),
        ([], ["speed"], "unknown benchmark 'speed'"),
        (["prefill"], ["prefill"], "skip fewer"),
    ],
)
def test_select_refuses(only: list[str], skip: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SUITE.select(only, skip)


def test_ratios() -> None:
    # of the medians it would be 1; side by side, the middle round says 3
    assert pairwise([1.0, 6.0, 9.0], [1.0, 2.0, 1.0]) == Summary(1.0, 3.0, 9.0, 3)
    ours, other = Summary.of([2.0, 4.0, 5.0]), Summary.of([1.0, 2.0, 8.0, 9.0])
    assert spanning(ours, other) == Summary(2 / 9, 0.8, 5.0, 3)


def test_results_that_differ_or_are_not_numbers_stop_a_benchmark() -> None:
    one = torch.tensor([1.0, 100.0])
    require_equal("same", one, one + 1e-4, 1e-5)
    for other in (one + 0.1, one * torch.nan):
        with pytest.raises(IncorrectError, match="sums"):
            require_equal("sums", other, one, 1e-5)


@pytest.mark.parametrize(
    ("ratio", "target", "met"),
    [
        (2.5, Target(">=", 2.5), True),
        (2.5, Target(">", 2.5), False),
        (2.5, Target(">=", 2.6), False),
        (2.5, Target("<=", 2.4), False),
        (None, Target("<=", 1.0), True),  # without a ratio our own side counts
        (None, Target("<=", 0.9), False),
        (2.5, None, None),
    ],
)
def test_targets(ratio: float | None, target: Target | None, met: bool | None) -> None:
    assert row(ratio, target).met is met


# --- the page


def part(name: str, rows: list[Row], errors: list[str] | None = None, **machine: str) -> report.Part:
    return report.part(name, {**MACHINE, **machine}, OCCASION, 1.0, rows, errors or [])


def test_rows_survive_the_json() -> None:
    rows = [row(2.5, Target(">=", 2)), row(None)]
    stored = json.loads(json.dumps(part("startup", rows)))
    assert report.rows_of(stored) == rows
    assert [line["met"] for line in stored["rows"]] == [True, None]


def test_a_fresh_part_replaces_its_own_device_only(tmp_path: Path) -> None:
    def write(fresh: report.Part) -> str:
        return report.write(tmp_path, SUITE, [fresh]).read_text(encoding="utf-8")

    write(part("startup", [row(2.5, Target(">=", 2))]))
    page = write(part("prefill", [row(2.5, Target(">=", 3))]))
    assert "| ≥ 2 | yes |" in page and "| ≥ 3 | NO |" in page and page.count("## an abacus\n") == 1
    page = write(part("prefill", [row(2.5, Target(">=", 4))], device="another abacus"))
    assert "| ≥ 3 | NO |" in page and "| ≥ 4 | NO |" in page and "## another abacus\n" in page
    page = write(part("prefill", [row(2.5, Target(">=", 1))], torch="3"))  # a new version, for one of two benchmarks
    assert "| ≥ 3 |" not in page and "| ≥ 2 |" in page and page.count("## an abacus\n") == 2
    page = write(part("prefill", [], ["it broke"], torch="4"))
    assert "`prefill` is not complete: at commit abc: it broke" in page and "| ≥ 1 |" in page
    assert "`cub_memory` has not been measured" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.json", "cpu.md"]


def test_pages_in_the_repository_are_those_of_their_json() -> None:
    """Whoever changes the page's form writes the pages again: ``--merge results/cpu.json``."""
    pytest.importorskip("triton", reason="triton is made for Linux only")
    for name in ("cpu", "evo2", "gpu", "scoring"):
        known = report.read(report.RESULTS / f"{name}.json")
        assert known and report.page(registry.load(f"{name}:SUITE"), known) == (
            (report.RESULTS / f"{name}.md").read_text(encoding="utf-8")
        )


def test_the_text_table_aligns_and_names_the_ratio() -> None:
    lines = report.table([row(2.5, Target(">=", 2)), row(None, Target("<=", 1))]).splitlines()
    assert len(lines) == 3
    assert "2.50 [2.00 … 3.00]" in lines[1] and lines[1].endswith("yes")
    assert len({line.index(mark) for line, mark in zip(lines, ("met", "yes", "yes"), strict=True)}) == 1


def test_predictions_follow_from_the_configuration() -> None:
    assert ModelSizes(STRIPED).parameters == 128_912_640
    transformer = predictions.as_transformer(STRIPED)
    ratio = predictions.prefill_multiplications(transformer, 8192) / predictions.prefill_multiplications(STRIPED, 8192)
    assert ratio == pytest.approx(1.27, abs=0.01)
    assert predictions.decode_bytes(transformer, 8192, concatenates=False).cache == 2 * 75_497_472


# --- a run


def suite(*functions: Any, required: bool = False) -> Suite:
    """A suite of made-up benchmarks, named a, b, …"""
    made = tuple(
        Made(name, "", f"benchmark {name}", 1, required=required and name == "a") for name in "abc"[: len(functions)]
    )
    for benchmark, function in zip(made, functions, strict=True):
        benchmark.functions[benchmark.name] = function
    return replace(SUITE, benchmarks=made, appendix="", threads=None)


class Made(Benchmark):
    functions: dict[str, Any] = {}  # noqa: RUF012

    def load(self) -> Any:
        return self.functions[self.name]


def fine(session: Session) -> list[Row]:
    return [row(2.5, Target(">=", 100))]


def broken(session: Session) -> list[Row]:
    raise RuntimeError("it\nbroke")


def wrong(session: Session) -> list[Row]:
    raise IncorrectError("the sides disagree")


def known(folder: Path) -> dict[str, report.Part]:
    return {p["name"]: p for p in report.read(folder / "cpu.json")}


def test_listing_needs_no_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(SUITE, ["--list", "--skip", "cub_memory"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [b.name for b in SUITE.benchmarks if b.name != "cub_memory"]


def test_an_unknown_name_is_a_mistake_in_the_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(SUITE, ["--only", "prefil"])
    assert stopped.value.code == 2 and "did you mean prefill?" in capsys.readouterr().err


def test_a_benchmark_that_fails_takes_no_other_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(suite(broken, fine), ["--quick", "--output", str(tmp_path), "--json", "--commit", "xyz"]) == 1
    assert [p["errors"] for p in json.loads(capsys.readouterr().out)] == [["RuntimeError: it broke"], []]
    found = known(tmp_path)
    assert found["a"]["errors"] == ["RuntimeError: it broke"] and len(found["b"]["rows"]) == 1
    assert found["b"]["occasion"]["commit"] == "xyz"


def test_what_has_nothing_to_compare_with_is_skipped_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(session: Session) -> list[Row]:
        raise MissingError("abacus not installed")

    def half(session: Session) -> Iterator[Step]:
        yield Step("first", lambda: lacking(session))

    run.main(suite(fine), ["--quick", "--output", str(tmp_path)])
    before = known(tmp_path)
    for benchmark in (lacking, half):
        capsys.readouterr()
        assert run.main(suite(benchmark, fine), ["--quick", "--output", str(tmp_path / "again")]) == 0
        assert capsys.readouterr().err.count("skipped: abacus not installed\n") == 1
        assert list(known(tmp_path / "again")) == ["b"]
    assert run.main(suite(lacking), ["--quick", "--output", str(tmp_path)]) == 0
    assert known(tmp_path) == before


def test_a_step_that_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    def steps(session: Session) -> Iterator[Step]:
        def half() -> Iterator[Row]:
            yield row(1.0)
            raise RuntimeError("half")

        yield Step("first", half)
        yield Step("second", lambda: [row(2.0)])

    assert run.main(suite(steps), ["--quick", "--output", str(tmp_path)]) == 1
    assert known(tmp_path)["a"]["errors"] == ["first: RuntimeError: half"]
    assert [r.ratio and r.ratio.median for r in report.rows_of(known(tmp_path)["a"])] == [1.0, 2.0]


def test_nothing_is_timed_when_something_required_is_wrong(tmp_path: Path) -> None:
    assert run.main(suite(wrong, fine, required=True), ["--quick", "--output", str(tmp_path)]) == 1
    assert known(tmp_path)["b"]["errors"] == ["`a` found something wrong, so that times would mean nothing"]
    assert run.main(suite(broken, fine, required=True), ["--quick", "--output", str(tmp_path)]) == 1
    assert known(tmp_path)["b"]["rows"]  # that it could not be found out does not stop the others


def test_ratios_never_fail_the_run_and_results_can_be_merged(tmp_path: Path) -> None:
    assert run.main(suite(fine), ["--quick", "--output", str(tmp_path / "run")]) == 0
    arguments = ["--merge", str(tmp_path / "run" / "cpu.json"), "--output", str(tmp_path / "pages")]
    assert run.main(suite(fine), arguments) == 0
    assert "| NO |" in (tmp_path / "pages" / "cpu.md").read_text(encoding="utf-8")
    assert known(tmp_path / "pages") == known(tmp_path / "run")


def test_nothing_begins_after_the_limit(tmp_path: Path) -> None:
    assert run.main(suite(fine), ["--quick", "--limit", "0", "--output", str(tmp_path)]) == 1
    assert known(tmp_path)["a"]["errors"] == ["no time was left"]


def test_results_are_written_after_every_row(tmp_path: Path) -> None:
    def killed(session: Session) -> Iterator[Row]:
        yield row()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.main(suite(killed), ["--quick", "--output", str(tmp_path)])
    assert len(known(tmp_path)["a"]["rows"]) == 1


# --- the CPU's benchmarks


def test_the_long_convolutions_agree() -> None:
    from benchmarks.cpu.long_conv import blocked_against_fft

    (line,) = blocked_against_fft(Session(quick=True))
    assert line.ratio is not None and line.ratio.count == 3


def test_a_mixed_batch_is_compared_with_its_parts_and_its_passes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.cpu import memory

    growths = {"10,10,10,1500": 90, "10,10,10": 20, "1500": 40}

    def probe(option: str, lengths: str, *rest: object, allocator: object) -> dict[str, int]:
        return {"growth": growths[lengths] * 10**6, "read": 30 + 513}

    monkeypatch.setattr(memory, "probe", probe)
    peak, passes = memory.mixed_batch(Session(quick=True))
    assert peak.ratio is not None and peak.ratio.median == 1.5 and peak.target == Target("<=", 1.2) and not peak.met
    assert passes.ours.median == 2 and passes.target == Target("<=", 1) and not passes.met


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux only")
def test_a_probe_measures_a_batch_in_a_process_of_its_own() -> None:
    from benchmarks.cpu.memory import probe

    found = probe("--prompts", "10,600", 2, 1)
    assert found["growth"] > 0 and found["read"] in (10, 10 + 512, 10 + 600)


def test_packed_scores_are_compared_with_single_ones() -> None:
    from benchmarks.cpu.scoring import unequal

    short, long = [row for step in unequal(Session(quick=True)) for row in step.run()]
    assert short.target == Target(">=", 3) and long.target is None
    assert short.ratio is not None and "largest difference" in short.note


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux only")
def test_the_memory_of_an_embedding_is_measured_in_a_process_of_its_own() -> None:
    from benchmarks.cpu.scoring import long_embedding

    (line,) = long_embedding(Session(quick=True))
    assert line.met and line.ours.median > 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
def test_llama_cpp_computes_what_transformers_does_before_it_is_timed(precision: str) -> None:
    for package in ("llama_cpp", "gguf", "transformers"):
        pytest.importorskip(package)
    from benchmarks.cpu import llama

    session = Session(quick=True)
    rows, steps = (
        [row for step in getattr(llama, f"{what}_{precision}")(session) for row in step.run()]
        for what in ("prefill", "decode")
    )
    assert len(rows) == (6 if precision.startswith("int") else 3) and all(row.ratio is not None for row in rows)
    assert [row.target for row in steps] == [Target(">=", 0.9 if precision == "int4" else 1.0), Target(">=", 1.3)]


def test_a_llama_cpp_that_crashes_is_a_line(tmp_path: Path) -> None:
    from benchmarks.llama import require_survival

    fake = tmp_path / "llama_cpp.py"
    fake.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
        with pytest.raises(MissingError, match=r"ended by SIGSEGV as it read a prompt by m-Q8_0.gguf; .* AMX"):
            require_survival(Path("m-Q8_0.gguf"), 1)


def test_evo2_is_measured_against_its_matrices() -> None:
    from benchmarks.evo2.cpu import decode, prefill

    rows = [*prefill(Session(quick=True)), *decode(Session(quick=True))]
    names = [row.ratio_name for row in rows]
    assert names[:2] == ["bound / ours", "ours / bound"] and names[2:] in ([], ["ours / calls"])  # with numba
    assert all(row.ratio is not None and 0 < row.ratio.median < 1.5 for row in rows[:2])
