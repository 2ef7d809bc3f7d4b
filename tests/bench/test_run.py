"""What is measured, and how it is told. Nothing here depends on how long anything takes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hyaena.bench import measure, memory, plot, rates, report, run
from hyaena.bench.rates import Rates, Samples, Sizes
from hyaena.bench.run import Plan, Result, random_model
from hyaena.config import ModelConfig
from hyaena.errors import CapacityError, InputError, NonFiniteError, UnsupportedError
from hyaena.model import StripedHyena

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
    prefills = [
        measure.Prefill(length=n, chunk=16, seconds=Samples((2.0, 1.0, 4.0)), flops=4000, peak_memory=None)
        for n in (30, 60)
    ]
    decodes = [
        measure.Decode(batch=b, context=c, decoding="static", seconds=Samples((0.5,)), bytes=400 * b, first_step=3.0)
        for b in (1, 2)
        for c in (20, 40)
    ]
    return Result(
        config=CONFIG,
        dtype=torch.float32,
        device=CPU,
        rates=Rates(Samples((1000.0, 900.0, 1100.0)), Samples((4000.0,))),
        prefills=tuple(prefills),
        decodes=tuple(decodes),
    )


def test_a_plan_is_measured_in_full() -> None:
    result = bench()
    assert [(p.length, p.chunk) for p in result.prefills] == [(30, 16), (60, 16)]
    assert [(d.batch, d.context) for d in result.decodes] == [(1, 20), (1, 40), (3, 20), (3, 40)]
    assert all(len(p.seconds.values) >= 2 and p.peak_memory is None for p in result.prefills)
    assert all(x.of_floor(result.rates) > 0 for x in (*result.prefills, *result.decodes))
    assert len(result.rates.bandwidth.values) == len(result.rates.flops.values) == 3


def test_parts_of_the_floor() -> None:
    result = made_up()
    prefill, decode = result.prefills[0], result.decodes[-1]
    assert prefill.of_floor(result.rates) == pytest.approx(0.5)  # one second of products in two
    assert prefill.tokens_per_second == 15
    assert decode.of_floor(result.rates) == pytest.approx(1.6)  # 0.8 s of bytes in half a second
    assert decode.tokens_per_second == 4


def test_a_prefill_reads_in_chunks_and_keeps_the_last_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CONFIG, CPU, torch.float32)
    passes: list[tuple[int, int]] = []
    forward = StripedHyena.forward

    def watched(self: StripedHyena, ids: Any, **options: Any) -> Any:
        passes.append((ids.shape[1], options["logits_to_keep"]))
        return forward(self, ids, **options)

    monkeypatch.setattr(StripedHyena, "forward", watched)
    measure.measure_prefill(model, 40, chunk=16, repeats=2)
    assert passes == [(16, 1), (16, 1), (8, 1)] * 3


@pytest.mark.parametrize("decoding", ["eager", "static"])
def test_steps_begin_at_the_context_and_fit(decoding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CONFIG, CPU, torch.float32)
    made = []
    filled = measure.filled_cache
    monkeypatch.setattr(measure, "filled_cache", lambda *a, **k: made.append(filled(*a, **k)) or made[0])
    found = measure.measure_decode(model, 3, 20, decoding=decoding, steps=2, rounds=4)
    assert found.decoding == decoding and len(found.seconds.values) == 4
    assert made[0].max_length == 20 + 1 + 2 * 5
    if decoding == "eager":
        assert made[0].length == made[0].max_length


def test_a_filled_cache_is_one_that_was_read_into() -> None:
    model = random_model(CONFIG, CPU, torch.bfloat16)
    cache = measure.filled_cache(model, 2, 20, room=5)
    with torch.inference_mode():
        logits = model(torch.ones(2, 3, dtype=torch.int64), cache=cache)
    assert bool(logits.isfinite().all()) and cache.length == 23
    assert all(
        bool(t.real.any())
        for layer in cache.layers
        for t in (vars(layer).values() if hasattr(layer, "keys") else layer)
    )


def test_random_models_are_made_in_their_dtype_and_keep_their_filters() -> None:
    model = random_model(CONFIG, CPU, torch.bfloat16)
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
    assert lines[0].startswith("small, ") and "copies 1e-06 GB/s ±10.0%" in lines[2]
    prefill = next(line for line in lines if line.lstrip().startswith("30 "))
    assert prefill.split() == ["30", "2.000", "s", "±75.0%", "15", "50%", "–"]
    decode = next(line for line in lines if line.lstrip().startswith("2 × 40"))
    assert decode.split()[3:] == ["500.00", "ms", "±0.0%", "4.0", "160%", "3.00", "s"]


def test_json_holds_every_sample() -> None:
    known = json.loads(json.dumps(report.as_dict(made_up())))
    assert known["prefill"][0]["seconds"] == {"median": 2.0, "samples": [2.0, 1.0, 4.0]}
    assert known["prefill"][0]["floor_seconds"] == 1.0 and known["decode"][0]["of_floor"] == pytest.approx(0.8)
    assert ModelConfig.from_dict(known["model"]["config"]) == CONFIG
    assert {"device", "torch", "python", "hyaena", "threads"} <= set(known["machine"])


@pytest.mark.parametrize("empty", ["", "prefills", "decodes"])
def test_the_picture(tmp_path: Path, empty: str) -> None:
    result = dataclasses.replace(made_up(), **({empty: ()} if empty else {}))
    plot.draw(result, tmp_path / "b.png")
    content = (tmp_path / "b.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]
