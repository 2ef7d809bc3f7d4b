"""The FP8 layer: what it computes, keeps and refuses. What a product is, is tested in tests/ops/test_fp8.py."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch
from torch import Tensor, nn

from device import DEVICE
from hyaena import ops
from hyaena.adapters import LoRALinear, Update
from hyaena.errors import InputError, UnsupportedError
from hyaena.fp8 import FP8Linear, set_fp8
from hyaena.layers import record
from hyaena.ops.fp8 import is_hopper, quantize_fp8, quantize_weight


def layer(inputs: int = 32, outputs: int = 48, *, mode: str = "exact") -> FP8Linear:
    made = FP8Linear(inputs, outputs).to(DEVICE)
    with torch.no_grad():
        made.init_weights()
    made.mode = mode
    return made


def product(x: Tensor, of: FP8Linear) -> Tensor:
    """What a layer should compute, from its weight as it is now."""
    return ops.fp8_linear(x, of.weight, of.scales[0], of.scales[1], "exact")


@torch.no_grad()
def test_modes() -> None:
    of, x = layer(), torch.randn(2, 5, 32, device=DEVICE)
    plain = nn.functional.linear(x, of.weight)
    assert torch.equal(of(x), product(x, of)) and not torch.equal(of(x), plain)
    set_fp8(of, "off")
    assert torch.equal(of(x), plain) and of.is_plain()
    set_fp8(of, "auto")
    assert torch.equal(of(x), product(x, of) if is_hopper(of.weight.device) else plain)
    # Fresh scales suit fresh weights and normalised inputs: e4m3 has 3 fraction bits.
    assert (product(x, of) - plain).norm() / plain.norm() < 0.05


@pytest.mark.parametrize("cast", ["bfloat16", "half", "to", "type"])
def test_casts_leave_the_scales_alone(cast: str) -> None:
    of = layer()
    scales = of.scales.clone()
    {"to": lambda: of.to(torch.bfloat16), "type": lambda: of.type(torch.float16)}.get(cast, getattr(of, cast))()
    assert of.weight.dtype.itemsize == 2 and of.scales.dtype == torch.float32 and torch.equal(of.scales, scales)
    of.double()
    assert of.scales.dtype == torch.float64
    assert list(of.state_dict()) == ["weight", "scales"] and [name for name, _ in of.named_parameters()] == ["weight"]


@torch.no_grad()
def test_a_changed_weight_or_scale_is_noticed() -> None:
    of, x = layer(), torch.randn(3, 32, device=DEVICE)
    of(x)
    of.weight.mul_(-1)
    assert torch.equal(of(x), product(x, of))
    of.weight = nn.Parameter(torch.randn_like(of.weight))
    assert torch.equal(of(x), product(x, of))
    of.weight.data = torch.randn_like(of.weight)
    assert torch.equal(of(x), product(x, of))
    of.scales[1] *= 0.37
    assert torch.equal(of(x), product(x, of))
    of.bfloat16()
    assert torch.equal(of(x.bfloat16()), product(x.bfloat16(), of))
    with torch.inference_mode():
        of.weight = nn.Parameter(torch.randn_like(of.weight))  # changes of such a tensor cannot be seen
        assert torch.equal(of(x.bfloat16()), product(x.bfloat16(), of))
        of.weight.mul_(2)
        assert torch.equal(of(x.bfloat16()), product(x.bfloat16(), of))


@torch.no_grad()
def test_the_rounded_weight_is_made_once_and_shared_by_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    of, x, made = layer(), torch.randn(3, 32, device=DEVICE), []
    round_weight = quantize_weight
    monkeypatch.setattr("hyaena.fp8.quantize_weight", lambda *args: made.append(1) or round_weight(*args))
    twin = copy.deepcopy(of, {id(of.weight): of.weight, id(of.scales): of.scales})  # as with_adapter copies
    for _ in range(2):
        of(x)
    view = copy.deepcopy(of, {id(of.weight): of.weight, id(of.scales): of.scales})
    view(x)
    assert len(made) == 1
    of.weight.add_(1)
    assert torch.equal(view(x), product(x, of)) and torch.equal(twin(x), product(x, of)) and len(made) == 3
    loaded = pickle.loads(pickle.dumps(of))
    assert torch.equal(loaded(x), of(x)) and len(pickle.dumps(of)) < 3 * of.weight.nbytes


def test_training_goes_through_the_fp8_product() -> None:
    of = layer()
    x = torch.randn(2, 3, 32, device=DEVICE, requires_grad=True)
    y = of(x)
    assert torch.equal(y, product(x, of))
    y.sum().backward()
    torch.testing.assert_close(x.grad, of.weight.sum(0).expand_as(x))
    torch.testing.assert_close(of.weight.grad, x.sum((0, 1)).expand_as(of.weight))
    assert of.scales.grad is None
    torch.optim.SGD([of.weight], 0.1).step()
    assert torch.equal(of(x), product(x, of))


def test_lora_adds_to_the_fp8_product() -> None:
    of = layer()
    of.requires_grad_(False)
    lora = LoRALinear(of, Update(torch.randn(4, 32, device=DEVICE), torch.randn(48, 4, device=DEVICE), 0.5))
    x = torch.randn(3, 32, device=DEVICE, requires_grad=True)
    y = lora(x)
    update = 0.5 * x @ lora.lora_A.t() @ lora.lora_B.t()
    torch.testing.assert_close(y, product(x, of) + update)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (of.weight + 0.5 * lora.lora_B @ lora.lora_A).sum(0).expand_as(x))
    assert lora.lora_A.grad is not None and of.weight.grad is None


@torch.no_grad()
def test_a_weight_that_outgrows_its_scale_gets_a_smaller_one() -> None:
    of = layer()
    scales = of.scales.clone()
    of.weight.mul_(0.5)
    of.fit_scale()
    assert torch.equal(of.scales, scales)
    of.weight.mul_(6)
    of.fit_scale()
    torch.testing.assert_close(of.scales, scales / torch.tensor([1.0, 3.0], device=DEVICE))
    assert quantize_fp8(of.weight, of.scales[1]).float().abs().max() == 448


def test_kernels_read_the_weight_only_where_the_product_is_plain() -> None:
    of = layer()
    assert record(of) is of
    set_fp8(of, "off")
    assert record(of) == ops.Dense(of.weight)
    of.register_forward_hook(lambda *_: None)
    assert record(of) is of


def test_what_cannot_be_computed_is_refused_and_changes_nothing() -> None:
    both = nn.ModuleList([layer(), layer(32, 40)])
    with pytest.raises(UnsupportedError, match="multiples of 16, not 32 to 40"):
        set_fp8(both, "exact")
    set_fp8(both, "off")
    with pytest.raises(InputError, match="choose one of auto, exact, off"):
        set_fp8(both, "yes")
    with pytest.raises(UnsupportedError, match="multiples of 16"):
        set_fp8(both, "exact")
    assert both[0].mode == both[1].mode == "off"
    with pytest.raises(InputError, match="the configuration of this one has none"):
        set_fp8(nn.Linear(4, 4), "exact")
    set_fp8(nn.Linear(4, 4), "auto")
    set_fp8(nn.Linear(4, 4), "off")
    with pytest.raises(UnsupportedError, match="cannot run on 'meta'"):
        set_fp8(FP8Linear(16, 16).to("meta"), "exact")


def test_a_saved_layer_is_loaded_with_its_scales() -> None:
    of, file = layer(), io.BytesIO()
    torch.save(of.state_dict(), file)
    file.seek(0)
    with torch.device("meta"):
        other = FP8Linear(32, 48)
    other.load_state_dict(torch.load(file), assign=True)
    x = torch.randn(3, 32, device=DEVICE)
    set_fp8(other, "exact")
    assert torch.equal(other(x), of(x))


@pytest.mark.skipif(DEVICE != "cuda" or not is_hopper(torch.device(DEVICE)), reason="needs a Hopper GPU")
class TestOnHopper:
    """What the tensor cores compute is the emulation, bit for bit."""

    @pytest.mark.parametrize("width", [1920, 4096])
    @pytest.mark.parametrize("rows", [1, 15, 16, 100])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_products(self, width: int, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        of = layer(width, 3 * width, mode="auto").to(dtype).requires_grad_(False)
        x = torch.randn(rows, width, device=DEVICE).to(dtype)
        y = of(x)
        for name in ("hyaena.fp8.is_hopper", "hyaena.ops.fp8.is_hopper"):
            monkeypatch.setattr(name, lambda _: False)
        assert torch.equal(y[-4:], product(x[-4:], of))

    def test_a_captured_step(self) -> None:
        of = layer(1920, 5760, mode="auto").bfloat16().requires_grad_(False)
        x = torch.randn(2, 1920, device=DEVICE).bfloat16()
        for warm in (True, False):
            if warm:
                of(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = of(x)
            x.normal_()
            graph.replay()
            assert torch.equal(y, of(x))
            of = copy.deepcopy(of)
            of.weight.data = of.weight.data.clone()  # not seen before, so rounded inside the graph

    def test_no_warning_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            layer(mode="auto")(torch.randn(1, 32, device=DEVICE))
        assert not [r for r in caplog.records if r.levelno > logging.INFO]
