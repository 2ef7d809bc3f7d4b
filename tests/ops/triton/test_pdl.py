"""Kernels that start before their predecessors end keep to the rules of ``ops.triton.pdl``."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder

from device import DEVICE
from hyaena.config import ModelConfig
from hyaena.decoding import StaticCache, decoder
from hyaena.model import StripedHyena
from hyaena.ops import StepContext
from hyaena.ops import triton as kernels
from hyaena.ops.backend import PLAIN
from hyaena.ops.triton import pdl
from hyaena.ops.triton.decode import gemv
from hyaena.ops.triton.decode.operators import FusedDecodeOperators

CONFIG = ModelConfig(
    vocab_size=48,
    hidden_size=64,
    layer_types=("hyena", "attention"),
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    state_size=2,
    attention_qkv_bias=True,
)


class Watch:
    """What every program of every kernel does, in order: each is a list of words."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: StripedHyena) -> None:
        self.programs: list[list[str]] = []
        self.weights = [(p.data_ptr(), p.data_ptr() + p.nbytes) for p in model.parameters()]
        builder = interpreter_builder

        def begin(*index: int) -> None:
            self.programs.append([])
            InterpreterBuilder.set_grid_idx(builder, *index)

        def load(pointers, mask, *rest):
            self.note("read weights" if self.all_weights(pointers.data[mask.data]) else "read")
            return InterpreterBuilder.create_masked_load(builder, pointers, mask, *rest)

        def store(*args):
            self.note("write")
            return InterpreterBuilder.create_masked_store(builder, *args)

        monkeypatch.setattr(builder, "set_grid_idx", begin)
        monkeypatch.setattr(builder, "create_masked_load", load)
        monkeypatch.setattr(builder, "create_masked_store", store)
        monkeypatch.setattr(pdl.cuda, "gdc_wait", lambda: self.note("wait"))
        monkeypatch.setattr(pdl.cuda, "gdc_launch_dependents", lambda: self.note("release"))

    def note(self, what: str) -> None:
        self.programs[-1].append(what)

    def all_weights(self, addresses: np.ndarray) -> bool:
        inside = np.zeros(addresses.shape, dtype=bool)
        for low, high in self.weights:
            inside |= (addresses >= low) & (addresses < high)
        return bool(inside.all())


@pytest.mark.skipif(DEVICE == "cuda", reason="watches Triton's interpreter")
@pytest.mark.parametrize("rows", [1, 2])
def test_every_program_of_a_step_waits_before_it_touches_what_others_do(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    torch.manual_seed(0)
    model = StripedHyena(CONFIG).eval()
    tile = gemv.Tile(16, 32, 1, 2)
    tiles = {("linear", n, k): tile for n, k in ((192, 64), (128, 64), (64, 64), (64, 96), (48, 64))}
    tiles["gate", 96, 64] = tile
    with torch.inference_mode():
        cache = model.make_cache(rows, max_length=70)
        model(torch.randint(48, (rows, 66)), cache=cache)
        static = StaticCache(model, rows)
        static.add(cache)
        operators = FusedDecodeOperators(tiles, overlap=True)
        operators.backend = PLAIN  # the norm kernel of several rows is launched without the attribute: rule 4
        context = StepContext(operators, static.device_lengths, static.device_limits, static.rotary)
        ids = torch.ones(rows, dtype=torch.int64)
        watch = Watch(monkeypatch, model)
        operators.argmax(model.step(ids, static.states, context), ids)
    for program in watch.programs:
        assert program.count("wait") == 1
        at = program.index("wait")
        assert set(program[:at]) <= {"read weights"}, program
        assert program.count("release") <= 1
    ahead = sum("read weights" in program[: program.index("wait")] for program in watch.programs)
    assert ahead > len(watch.programs) / 3 or rows > 1  # the products, and the step of the filters


@pytest.mark.parametrize(("capability", "can"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((12, 0), True)])
def test_kernels_overlap_from_hopper_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], can: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    assert kernels.can_overlap(torch.device("cuda")) is can
    assert not kernels.can_overlap(torch.device("cpu"))
    model = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, config=CONFIG)
    operators = decoder.choose_operators(model)  # type: ignore[arg-type]
    assert isinstance(operators, FusedDecodeOperators)
    assert operators.overlap is can
    monkeypatch.setattr(torch.version, "hip", "6.0")  # AMD's 9.4 is not Hopper
    assert not kernels.can_overlap(torch.device("cuda"))
