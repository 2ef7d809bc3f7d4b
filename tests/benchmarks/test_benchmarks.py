"""The registry, the table and the page. Nothing here looks at a clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks.measure import Side, pairwise, require_equal, take_turns
from benchmarks.models import STRIPED
from benchmarks.registry import BENCHMARKS, Bar, Benchmark, IncorrectError, Row, Spread, select

from benchmarks import predictions, report, run
from hyaena.sizes import ModelSizes

MACHINE = {"processor": "an abacus", "torch": "2"}
OCCASION = {"date": "today", "command": "make bench", "commit": "abc", "threads": "2", "load before": "0.00"}


def row(ratio: float | None = 2.5, bar: Bar | None = None) -> Row:
    spread = None if ratio is None else Spread.of([ratio - 0.5, ratio, ratio + 0.5])
    return Row(
        what="a thing", unit="s", ours=Spread.of([1.0]), peer_name="peer", peer=Spread.of([2.5]), ratio=spread, bar=bar
    )


def test_names_are_unique_and_their_functions_exist() -> None:
    assert len({b.name for b in BENCHMARKS}) == len(BENCHMARKS)
    assert all(callable(b.load()) for b in BENCHMARKS)


def test_a_full_run_is_meant_to_take_twenty_minutes_at_most() -> None:
    assert sum(b.minutes for b in BENCHMARKS) <= 20


def test_select_keeps_the_order_of_the_registry() -> None:
    first, second, *rest = (b.name for b in BENCHMARKS)
    assert [b.name for b in select([second, first])] == [first, second]
    assert [b.name for b in select([], [first])] == [second, *rest]
    assert select([]) == list(BENCHMARKS)


@pytest.mark.parametrize(
    ("names", "skip", "message"),
    [
        (["long_cnv"], [], "did you mean long_conv"),
        ([], ["zzz"], "choose from startup"),
        (["startup"], ["startup"], "skip fewer"),
    ],
)
def test_select_refuses(names: list[str], skip: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(names, skip)


def test_sides_take_turns_and_prepare_off_the_clock() -> None:
    calls: list[str] = []
    ticks = iter(range(100))

    def clock() -> float:
        calls.append("tick")
        return float(next(ticks))

    a = Side(lambda: calls.append("a"), prepare=lambda: calls.append("prepare"))
    seconds = take_turns({"a": a, "b": Side(lambda: calls.append("b"))}, 2, clock)
    assert calls == ["prepare", "tick", "a", "tick", "tick", "b", "tick"] * 2
    assert seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_ratios_are_pairwise() -> None:
    # of the medians it would be 1; side by side, the middle round says 3
    assert pairwise([1.0, 6.0, 9.0], [1.0, 2.0, 1.0]) == Spread(1.0, 3.0, 9.0, 3)


def test_results_that_differ_or_are_not_numbers_stop_a_benchmark() -> None:
    one = torch.tensor([1.0, 100.0])
    require_equal("same", one, one + 1e-4, 1e-5)
    for other in (one + 0.1, one * torch.nan):
        with pytest.raises(IncorrectError, match="sums"):
            require_equal("sums", other, one, 1e-5)


@pytest.mark.parametrize(
    ("ratio", "bar", "met"),
    [
        (2.5, Bar(">=", 2.5), True),
        (2.5, Bar(">=", 2.6), False),
        (2.5, Bar("<=", 2.4), False),
        (None, Bar("<=", 1.0), True),  # without a ratio our own side counts
        (None, Bar("<=", 0.9), False),
        (2.5, None, None),
    ],
)
def test_bars(ratio: float | None, bar: Bar | None, met: bool | None) -> None:
    assert row(ratio, bar).met is met


def test_rows_survive_the_json() -> None:
    rows = [row(2.5, Bar(">=", 2)), row(None)]
    part = json.loads(json.dumps(report.entry(OCCASION, 1.0, rows, "")))
    assert report.rows_of(part) == rows
    assert [line["met"] for line in part["rows"]] == [True, None]


def test_the_page_keeps_other_benchmarks_of_the_same_machine_only(tmp_path: Path) -> None:
    def write(machine: dict[str, str], name: str, rows: list[Row], error: str = "") -> str:
        entry = report.entry(OCCASION, 1.0, rows, error)
        return report.write(tmp_path, machine, {name: entry}, "none").read_text(encoding="utf-8")

    write(MACHINE, "startup", [row(2.5, Bar(">=", 2))])
    page = write(MACHINE, "prefill", [row(2.5, Bar(">=", 3))])
    assert "| ≥ 2 | yes |" in page and "| ≥ 3 | NO |" in page
    page = write(MACHINE, "prefill", [], "it broke")
    assert "`prefill` did not finish: it broke" in page and "| NO |" not in page
    page = write({**MACHINE, "torch": "3"}, "prefill", [row()])
    assert "`startup` has not been run here" in page and "yes" not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.json", "cpu.md"]


def test_the_text_table_aligns_and_names_the_ratio() -> None:
    lines = report.text_table([row(2.5, Bar(">=", 2)), row(None, Bar("<=", 1))]).splitlines()
    assert len(lines) == 3
    assert "2.50 [2.00 … 3.00]" in lines[1] and lines[1].endswith("yes")
    assert len({line.index(mark) for line, mark in zip(lines, ("met", "yes", "yes"), strict=True)}) == 1


def test_predictions_follow_from_the_configuration() -> None:
    assert ModelSizes(STRIPED).parameters == 128_912_640
    peer = predictions.as_transformer(STRIPED)
    ratio = predictions.prefill_multiplications(peer, 8192) / predictions.prefill_multiplications(STRIPED, 8192)
    assert ratio == pytest.approx(1.27, abs=0.01)
    assert predictions.decode_bytes(peer, 8192, concatenates=False).cache == 2 * 75_497_472


def test_listing_needs_no_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list", "--skip", "cub_memory"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [b.name for b in BENCHMARKS][:-1]


def test_an_unknown_name_is_a_mistake_in_the_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(["prefil"])
    assert stopped.value.code == 2 and "did you mean prefill?" in capsys.readouterr().err


def test_a_benchmark_that_fails_is_told_and_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(quick: bool) -> list[Row]:
        raise IncorrectError("the sides\ndisagree")

    monkeypatch.setattr(Benchmark, "load", lambda self: broken)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert run.main(["startup", "long_conv", "--quick", "--json"]) == 1
    out = json.loads(capsys.readouterr().out)
    assert out["benchmarks"]["startup"]["error"] == "IncorrectError: the sides disagree"
    assert "long_conv" in out["benchmarks"]


def test_ratios_never_fail_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Benchmark, "load", lambda self: lambda quick: [row(2.5, Bar(">=", 100))])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert run.main(["startup", "--quick", "--output", str(tmp_path)]) == 0
    assert "| NO |" in (tmp_path / "cpu.md").read_text(encoding="utf-8")


def test_the_long_convolutions_agree() -> None:
    from benchmarks.long_conv import blocked_against_fft

    (line,) = blocked_against_fft(quick=True)
    assert line.ratio is not None and line.ratio.count == 3
