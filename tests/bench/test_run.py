"""What is measured, and how it is reported. Nothing here depends on how long anything takes."""

from __future__ import annotations

import dataclasses
import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch

from hyaena.bench import measure, memory, plot, rates, report, run
from hyaena.bench.clock import Samples
from hyaena.bench.measure import Figure, in_turns
from hyaena.bench.rates import Rate, Sizes
from hyaena.bench.run import Plan, Result, random_model
from hyaena.config import ModelConfig
from hyaena.errors import CapacityError, InputError, NonFiniteError, UnsupportedError
from hyaena.model import StripedHyena
from hyaena.tensor_files import memory as large_pages

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    layer_types=("hyena", "attention", "hyena"),
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    state_size=2,
    max_length=200,
    name="small",
)
PLAN = Plan(lengths=(30, 60), contexts=(20, 40), batches=(1, 3), chunk=16, steps=2)


@pytest.fixture(autouse=True)
def _small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rates.SIZES, "cpu", Sizes(10_000, 32, 3))


def bench(config: ModelConfig = CONFIG, plan: Plan = PLAN, dtype: torch.dtype = torch.float32) -> Result:
    return run.run(config, lambda: random_model(config, CPU, dtype), plan, device=CPU, dtype=dtype)


def made_up() -> Result:
    """A device of 1,000 bytes and 4,000 operations a second, and what it might do."""
    three = Samples((2.0, 1.9, 2.3))
    prefills = [
        measure.Prefill(
            length=n,
            chunk=16,
            seconds=three,
            rates=Samples((4000.0,) * 3),
            kernel="product",
            work=4000,
            peak_memory=None,
        )
        for n in (30, 60)
    ]
    decodes = [
        measure.Decode(
            batch=b,
            context=c,
            decoding="static",
            seconds=Samples((0.5, 0.5)),
            rates=Samples((1000.0, 1000.0)),
            kernel="copy of 1 kiB",
            work=200 * b,
            first_step=3.0,
        )
        for b in (1, 2)
        for c in (20, 40)
    ]
    return Result(
        config=CONFIG, dtype=torch.float32, cache_dtype=torch.float32, device=CPU, prefills=prefills, decodes=decodes
    )


def test_a_plan_is_measured_in_full() -> None:
    result = bench()
    assert [(p.length, p.chunk) for p in result.prefills] == [(30, 16), (60, 16)]
    assert [(d.batch, d.context) for d in result.decodes] == [(1, 20), (1, 40), (3, 20), (3, 40)]
    assert all(p.seconds.count >= 2 and p.peak_memory is None for p in result.prefills)
    assert all(x.seconds.count == x.rates.count and x.shares.min > 0 for x in (*result.prefills, *result.decodes))
    assert result.prefills[0].kernel == "float32 product of 32×32 matrices"


def test_a_failure_keeps_what_was_measured_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(run, "measure_decode", broken)
    seen: list[list[int]] = []
    with pytest.raises(RuntimeError):
        run.run(
            CONFIG,
            lambda: random_model(CONFIG, CPU, torch.float32),
            PLAN,
            device=CPU,
            dtype=torch.float32,
            found=lambda result: seen.append([p.length for p in result.prefills]),
        )
    assert seen == [[30], [30, 60]]


def test_shares_of_the_bound() -> None:
    prefill, decode = made_up().prefills[0], made_up().decodes[-1]
    assert prefill.mfu == pytest.approx(0.5)  # one second of products in two
    assert prefill.tokens_per_second == 15
    assert decode.mbu == pytest.approx(0.8)  # 0.4 s of bytes in half a second
    assert decode.tokens_per_second == 4


# --- a busy machine


def figure(seconds: list[float], rates: list[float], work: int = 100) -> Figure:
    return Figure(seconds=Samples.of(seconds), rates=Samples.of(rates), kernel="copy", work=work)


def test_a_slow_moment_that_meets_both_sides_does_not_count() -> None:
    """The device is four times slower during the second sample, and so is the work."""
    found = figure([2.0, 8.0, 2.0], [100.0, 25.0, 100.0])
    assert found.seconds.spread == 3 and found.shares.values == (0.5,) * 3 and found.share == 0.5 and not found.doubt


@pytest.mark.parametrize(
    ("seconds", "rates", "message"),
    [
        ([2.0, 8.0, 2.0, 9.0], [100.0] * 4, "busy: between 4 samples the share of the bound went from 11% to 50%"),
        ([0.5, 0.5], [100.0] * 2, "200% of the bound is more than a bound allows"),
    ],
)
def test_nonsense_is_not_a_share(seconds: list[float], rates: list[float], message: str) -> None:
    found = figure(seconds, rates)
    assert found.share is None and message in found.doubt
    result = made_up()
    result.decodes[0] = measure.Decode(**vars(found), batch=1, context=20, decoding="eager", first_step=1.0)
    page = report.render(result)
    line = next(line for line in page.splitlines() if line.lstrip().startswith("1 × 20"))
    assert line.split()[-3] == "?" and "%" not in line.split()[-3]
    assert f"no mbu for 1 × 20: {found.doubt}" in page
    known = report.as_dict(result)["decode"][0]
    assert known["mbu"] is None and known["doubt"] == found.doubt


def trials(seconds: list[float], **limits: Any) -> tuple[Figure, int]:
    """What ``in_turns`` makes of a device of 100 bytes a second, and how often it measured that."""
    measured: list[None] = []

    def rate() -> Rate:
        measured.append(None)
        return Rate(Samples((100.0,)), "copy")

    left = iter(seconds)
    return in_turns(100, lambda: next(left), rate, **limits), len(measured)


def test_a_steady_machine_is_measured_as_often_as_planned_and_a_busy_one_three_times_as_often() -> None:
    found, rates = trials([2.0] * 9, repeats=4, budget=1e9)
    assert found.seconds.count == 4 and rates == 5
    found, _ = trials([2.0, 8.0] * 9, repeats=4, budget=1e9)
    assert found.seconds.count == 12 and found.doubt
    found, _ = trials([2.0, 8.0, *[2.0] * 9], repeats=4, budget=1e9)  # a busy moment only
    assert found.seconds.count < 12 and found.share == 0.5


def test_the_budget_ends_a_measurement() -> None:
    assert trials([2.0] * 9, repeats=9, budget=1)[0].seconds.count == 2
    assert trials([2.0] * 9, repeats=9, budget=5)[0].seconds.count == 3
    assert trials([2.0, 8.0] * 9, repeats=9, budget=5)[0].seconds.count == 4  # 15 s where it varies


def test_the_bandwidth_is_that_of_the_faster_kernel_at_the_size_of_the_work() -> None:
    rates.SIZES["cpu"] = Sizes(4 * 2**20, 32, 3)
    small, large = (rates.measure_bandwidth(CPU, n) for n in (2 * 2**20, 2**40))
    assert small.kernel.endswith(" of 2 MiB") and large.kernel.endswith(" of 4 MiB")
    assert small.kernel.split()[0] in ("copy", "sum", "compiled") and small.median > 0


def test_a_prefill_reads_in_chunks_and_keeps_the_last_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CONFIG, CPU, torch.float32)
    passes: list[tuple[int, int]] = []
    forward = StripedHyena.forward

    def watched(self: StripedHyena, ids: Any, **options: Any) -> Any:
        passes.append((ids.shape[1], options["logits_to_keep"]))
        return forward(self, ids, **options)

    monkeypatch.setattr(StripedHyena, "forward", watched)
    monkeypatch.setattr(measure, "STEADY", float("inf"))  # as many samples as planned, whatever they take
    measure.measure_prefill(model, 40, chunk=16, repeats=2)
    assert passes == [(16, 1), (16, 1), (8, 1)] * 3


@pytest.mark.parametrize("decoding", ["eager", "static"])
def test_steps_begin_at_the_context_and_fit(decoding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CONFIG, CPU, torch.float32)
    made = []
    filled = measure.filled_cache

    def watched(*args: Any, **options: Any) -> Any:
        cache = filled(*args, **options)
        made.append((cache, cache.max_length))
        return cache

    monkeypatch.setattr(measure, "filled_cache", watched)
    monkeypatch.setattr(measure, "STEADY", float("inf"))  # as many rounds as planned, whatever they take
    found = measure.measure_decode(model, 3, 20, decoding=decoding, steps=2, rounds=4)
    assert found.decoding == decoding and found.seconds.count == 4
    ((cache, room),) = made
    assert room == 20 + 1 + 2 * 13  # three times as many fit, for a busy machine
    if decoding == "eager":
        assert cache.lengths == [20 + 1 + 2 * 5] * 3


def test_a_filled_cache_is_one_that_was_read_into() -> None:
    model = random_model(CONFIG, CPU, torch.bfloat16)
    cache = measure.filled_cache(model, 2, 20, room=5)
    with torch.inference_mode():
        logits = model(torch.ones(2, 3, dtype=torch.int64), cache=cache)
    assert bool(logits.isfinite().all()) and cache.lengths == [23, 23]
    assert all(bool(t.real.any()) for t in cache.tensors())


def test_random_models_are_made_in_their_dtype_and_keep_their_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages, "PAGE", mmap.PAGESIZE)
    model = random_model(CONFIG, CPU, torch.bfloat16)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # as weights that are loaded
        large = [p for p in model.parameters() if p.nbytes >= mmap.PAGESIZE]
        assert large and all(p.data_ptr() % mmap.PAGESIZE == 0 and p.requires_grad for p in large)
    dtypes = {name.rsplit(".", 1)[-1]: p.dtype for name, p in model.named_parameters()}
    assert dtypes["poles"] == dtypes["residues"] == torch.float32
    assert {dtype for name, dtype in dtypes.items() if name not in ("poles", "residues")} == {torch.bfloat16}
    assert not model.training and all(bool(p.isfinite().all()) for p in model.parameters())


def test_numbers_that_are_not_finite_stop_the_measurement() -> None:
    def broken() -> StripedHyena:
        model = random_model(CONFIG, CPU, torch.float32)
        torch.nn.init.constant_(model.norm.weight, torch.nan)
        return model

    for plan in (dataclasses.replace(PLAN, contexts=()), dataclasses.replace(PLAN, lengths=())):
        with pytest.raises(NonFiniteError):
            run.run(CONFIG, broken, plan, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lengths": (30, 201)}, InputError, "lengths go up to 201 and small to 200 tokens"),
        ({"contexts": (201,)}, InputError, "contexts go up to 201"),
        ({"method": "truncated"}, UnsupportedError, "choose an exact method"),
        ({"method": "ftt"}, UnsupportedError, "ftt"),
        ({"decoding": "cuda_graph"}, UnsupportedError, "captured on CUDA devices"),
    ],
)
def test_what_cannot_be_measured(change: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bench(plan=dataclasses.replace(PLAN, **change))


def test_too_little_memory_is_found_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 20 * 10**9)

    def make() -> StripedHyena:
        raise AssertionError("made")

    plan = dataclasses.replace(PLAN, lengths=(131_072,))
    with pytest.raises(CapacityError, match=r"7b needs about \d\d\.\d GB and cpu has 20\.0 GB free: .*--model cub"):
        run.run(run.SH_7B, make, plan, device=CPU, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="made"):  # 15.3 GB and little else
        run.run(run.SH_7B, make, PLAN, device=CPU, dtype=torch.bfloat16)


def test_the_room_of_a_prefill_covers_its_cache() -> None:
    """At 131,072 tokens the 7B's keys and values alone are 8.6 GB; activations are of one chunk."""
    needed = memory.prefill_bytes(run.SH_7B, 131_072, 2048, 2)
    assert 8.6e9 < needed < 9.6e9
    assert memory.decode_bytes(run.SH_7B, 64, 8192, 2) == pytest.approx(64 * 8192 * 65_536, rel=0.01)


def test_the_table() -> None:
    page = report.render(made_up())
    lines = page.splitlines()
    assert lines[0].startswith("small, ")
    prefill = next(line for line in lines if line.lstrip().startswith("30 "))
    assert prefill.split() == ["30", "2.000", "s", "±10.0%", "15", "4e-09", "TFLOP/s", "50%", "–"]
    decode = next(line for line in lines if line.lstrip().startswith("2 × 40"))
    assert decode.split()[3:] == ["500.00", "ms", "±0.0%", "4.0", "1e-06", "GB/s", "80%", "3.00", "s"]
    assert "mbu: memory-bandwidth utilisation, of the rate of a copy of 1 kiB, measured in turns" in lines


def test_json_holds_every_sample() -> None:
    known = json.loads(json.dumps(report.as_dict(made_up())))
    assert known["prefill"][0]["seconds"] == {"median": 2.0, "samples": [2.0, 1.9, 2.3]}
    assert known["prefill"][0]["bound_seconds"] == 1.0 and known["decode"][0]["mbu"] == pytest.approx(0.4)
    assert known["decode"][0]["kernel"] == "copy of 1 kiB" and known["decode"][0]["doubt"] is None
    assert ModelConfig.from_dict(known["model"]["config"]) == CONFIG
    assert {"device", "torch", "python", "hyaena", "cores"} <= set(known["machine"])


BEGINNINGS = {"png": b"\x89PNG", "svg": b"<?xml", "PDF": b"%PDF"}


@pytest.mark.parametrize("suffix", BEGINNINGS)
@pytest.mark.parametrize("empty", ["", "prefills", "decodes"])
def test_the_picture(tmp_path: Path, empty: str, suffix: str) -> None:
    result = dataclasses.replace(made_up(), **({empty: []} if empty else {}))
    plot.draw(result, tmp_path / f"b.{suffix}")
    content = (tmp_path / f"b.{suffix}").read_bytes()
    assert content.startswith(BEGINNINGS[suffix]) and len(content) > 5_000
    assert [path.name for path in tmp_path.iterdir()] == [f"b.{suffix}"]


def test_bounds_lie_above_their_points_and_doubtful_points_have_none() -> None:
    from matplotlib.figure import Figure as Picture

    axis = Picture().subplots()
    plot._draw(axis, "x", {"decoding": [plot.Point(1, 10.0, 0.8), plot.Point(2, 9.0, None)]})
    bound = next(line for line in axis.get_lines() if line.get_label() == "upper bound")
    assert bound.get_ydata()[0] == pytest.approx(12.5) and not bound.get_ydata()[1] > 0
    assert {text.get_text() for text in axis.texts} == {"80%", "?"}
