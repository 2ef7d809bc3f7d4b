"""Norm, gate and rotation as kernels equal their plain twins in float64; and a model made of them its plain self."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from device import DEVICE
from hyaena.config import ModelConfig
from hyaena.model import StripedHyena
from hyaena.ops import gate, rms_norm, rotary_table, rotate
from hyaena.ops.backend import VARIABLE
from hyaena.ops.triton import pointwise

# Arithmetic is float32, some roundings of 2^-24, and the result is rounded once to its own dtype: by 2^-11 of it in
# float16, by 2^-8 in bfloat16, and there by twice that under the interpreter, which cuts off instead of rounding.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-11 + 1e-6, torch.bfloat16: 2 ** (-8 if DEVICE == "cuda" else -7)}
DTYPES = list(TOLERANCE)


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """``want`` is float64; a difference is relative, or for what nearly vanishes absolute."""
    assert got.dtype == dtype and got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=1e-6)  # NaN is not close


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 33), (1, 63, 64), (2, 1, 4096), (1, 2, 1000)])
def test_rms_norm(dtype: torch.dtype, inside: bool, shape: tuple[int, ...]) -> None:
    x, weight = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)
    eps = 0.1  # large enough to tell the conventions apart
    got = pointwise.rms_norm(x, weight, eps, eps_inside_root=inside)
    close(got, rms_norm(x.double(), weight.double(), eps, eps_inside_root=inside), dtype)


def test_rms_norm_of_rows_that_do_not_lie_together_or_are_zero() -> None:
    x = randn(2, 9, 8, dtype=torch.float32)
    x[1, 8] = 0
    weight = randn(8, dtype=torch.float32)
    last = x[:, -1:]
    for inside in (True, False):
        got = pointwise.rms_norm(last, weight, 1e-6, eps_inside_root=inside)
        close(got, rms_norm(last.double(), weight.double(), 1e-6, eps_inside_root=inside), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NaN in the interpreter
def test_rms_norm_does_not_overflow(dtype: torch.dtype, inside: bool) -> None:
    x = torch.stack([3e38 * torch.rand(33), 1e-2 * torch.randn(33), 2e19 * torch.rand(33)]).to(DEVICE, dtype)
    weight = randn(33, dtype=dtype)
    got = pointwise.rms_norm(x, weight, 1e-6, eps_inside_root=inside)
    close(got, rms_norm(x.double(), weight.double(), 1e-6, eps_inside_root=inside), dtype)
    assert torch.equal(got[1:2], pointwise.rms_norm(x[1:2], weight, 1e-6, eps_inside_root=inside))
    for bad in (torch.inf, torch.nan):
        x[0, 3] = bad
        got = pointwise.rms_norm(x, weight, 1e-6, eps_inside_root=inside)
        assert got[0].isnan().all() and got[1:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "identity"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 33), (1, 1, 4100)])
def test_gate(dtype: torch.dtype, activation: str, shape: tuple[int, ...]) -> None:
    a, b = 3 * randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    before = a.clone()
    close(pointwise.gate(a, b, activation), gate(a.double(), b.double(), activation), dtype)
    assert torch.equal(a, before)


@pytest.mark.parametrize("activation", ["silu", "gelu", "identity"])
def test_gate_of_large_numbers(activation: str) -> None:
    a = torch.tensor([-1e4, -88.0, 0.0, 88.0, 1e4], device=DEVICE)
    close(pointwise.gate(a, torch.ones_like(a), activation), gate(a.double(), torch.ones(5).to(a), activation), a.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width", "length"), [(1, 2, 63), (5, 6, 3), (40, 8, 3), (3, 96, 1)])
@pytest.mark.parametrize("rows", [False, True])
def test_rotate(dtype: torch.dtype, heads: int, width: int, length: int, rows: bool) -> None:
    # as the model has it: some of the heads of a projection [B,T,(heads+2)·width], seen as [B,heads,T,width]
    x = randn(2, length, (heads + 2) * width, dtype=dtype).unflatten(-1, (-1, width)).transpose(1, 2)[:, :heads]
    positions = torch.arange(length, device=DEVICE) + 7
    if rows:
        positions = torch.stack([positions, positions * 3])
    table = rotary_table(positions, width, 100.0)
    got = pointwise.rotate(x, table)
    close(got, rotate(x.double(), table), dtype)
    assert got.transpose(1, 2).is_contiguous()


def test_rotate_of_other_strides() -> None:
    x = randn(2, 3, 8, 5, dtype=torch.float32)
    table = rotary_table(torch.arange(5, device=DEVICE), 8, 100.0)
    for other in (x.mT, x.mT.contiguous()):
        close(pointwise.rotate(other, table), rotate(other.double(), table), torch.float32)


def test_no_rows() -> None:
    x = torch.empty(0, 3, 8, device=DEVICE)
    assert pointwise.rms_norm(x, x.new_ones(8), 1e-6).shape == pointwise.gate(x, x, "silu").shape == x.shape
    assert pointwise.rotate(x[:, :, None], rotary_table(torch.arange(1, device=DEVICE), 8, 1e4)).shape == (0, 3, 1, 8)


CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=24,
    layer_types=("hyena", "attention", "hyena", "attention"),
    intermediate_size=40,
    num_attention_heads=3,
    num_key_value_heads=1,
    state_size=2,
    attention_qkv_bias=True,
    attention_out_bias=True,
)
VARIANTS = {
    "sh": {},
    "evo": {"norm_eps_inside_root": False, "norm_eps": 1e-2, "activation": "gelu"},
}


def make(variant: str) -> StripedHyena:
    torch.manual_seed(3)
    model = StripedHyena(dataclasses.replace(CONFIG, **VARIANTS[variant]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "long_filter" not in name:
                p.normal_(std=0.3)
    return model.to(DEVICE)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("variant", "padded", "method"),
    [("sh", True, "auto"), ("sh", False, "blocked"), ("evo", True, "blocked"), ("evo", False, "blocked")],
)
def test_a_model_of_kernels_equals_its_plain_self(monkeypatch, variant: str, padded: bool, method: str) -> None:
    """In chunks, with and without padding, against the plain model in float64; ``auto`` is the fused operator too."""
    model = make(variant)
    ids = torch.randint(50, (2, 11), device=DEVICE)
    mask = torch.arange(11, device=DEVICE) >= torch.tensor([[0], [3 if padded else 0]], device=DEVICE)
    called = set()
    for name in ("rms_norm", "gate", "rotate"):
        kernel = getattr(pointwise, name)
        monkeypatch.setattr(pointwise, name, lambda *a, n=name, f=kernel, **k: (called.add(n), f(*a, **k))[1])
    with torch.inference_mode():
        cache = model.make_cache(2, max_length=11)
        parts = [model(ids[:, :5], cache=cache, mask=mask[:, :5], method=method)]
        parts.append(model(ids[:, 5:10], cache=cache, method=method))
        parts.append(model(ids[:, 10:], cache=cache, logits_to_keep=1, method=method))
        got = torch.cat(parts, dim=1)
        monkeypatch.setenv(VARIABLE, "plain")
        expected = model.double()(ids, mask=mask)
    assert called == {"rms_norm", "gate", "rotate"}
    for row in range(2):
        first = 3 if padded and row else 0
        error = (got[row, first:] - expected[row, first:]).abs().max() / expected[row, first:].abs().max()
        # four layers of float32, each a few sums of tens of terms: some tens of roundings of 2^-24
        assert float(error) < 1e-5


@pytest.mark.usefixtures("kernels")
def test_gradients_and_compilation_take_the_plain_functions(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("a kernel ran")

    x = torch.randn(2, 3, 8, device=DEVICE)
    weight = torch.ones(8, device=DEVICE, requires_grad=True)
    table = rotary_table(torch.arange(3, device=DEVICE), 8, 1e4)

    def together(x: Tensor) -> Tensor:
        y = rms_norm(x, weight, 1e-6)
        return rotate(gate(y, y, "silu")[:, None], table)

    with torch.no_grad():
        expected = together(x)
    for name in ("rms_norm", "gate", "rotate"):
        monkeypatch.setattr(pointwise, name, refuse)
    torch.testing.assert_close(together(x), expected)
    assert torch.autograd.grad(together(x).sum(), weight)[0].abs().sum() > 0
    with torch.no_grad():
        compiled = torch.compile(together, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        with pytest.raises(AssertionError, match="a kernel ran"):
            together(x)
