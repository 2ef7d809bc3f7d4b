"""Narrow weights: their numbers, their products and gradients, and the rounding that makes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from hyaena import ops
from hyaena.errors import InputError
from hyaena.ops import narrow
from hyaena.ops.narrow import Narrow, pack, unpack
from hyaena.quant import round_weight
from hyaena.schemes import SCHEMES, scheme_of

ALL = pytest.mark.parametrize("name", SCHEMES)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def defined(layer: Narrow) -> Tensor:
    """The weight by its definition, number by number."""
    outputs, inputs = layer.shape
    weight = torch.zeros(outputs, inputs, dtype=torch.float64)
    group = inputs // layer.scale.shape[1]
    for e in range(outputs):
        for d in range(inputs):
            if layer.bits == 8:
                q = float(layer.codes[e, d])
            else:
                byte = int(layer.codes[e, d // 32 * 16 + d % 16])
                q = byte >> 4 if d % 32 >= 16 else byte & 15
            lowest = 0.0 if layer.minimum is None else float(layer.minimum[e, d // group])
            zero = 8 if layer.bits == 4 and layer.minimum is None else 0
            weight[e, d] = float(layer.scale[e, d // group]) * (q - zero) + lowest
    return weight


@ALL
def test_widening_is_its_definition(name: str) -> None:
    layer = round_weight(numbers(3, 256), SCHEMES[name])
    torch.testing.assert_close(ops.widen(layer, torch.float64), defined(layer), rtol=1e-6, atol=1e-6)
    assert layer.shape == (3, 256)


def test_packing_loses_nothing() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 4)
    assert torch.equal(unpack(pack(codes)), codes) and pack(codes).shape == (2, 32)


@ALL
def test_bytes_are_those_that_the_scheme_says(name: str) -> None:
    layer = round_weight(numbers(5, 384), SCHEMES[name])
    stored = sum(t.nbytes for t in layer if t is not None)
    assert stored == SCHEMES[name].nbytes(5, 384)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_widened_weight(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = round_weight(numbers(7, 128), SCHEMES[name])._replace(bias=numbers(7))
    x = numbers(2, 35, 128).to(dtype)
    expected = torch.nn.functional.linear(x, ops.widen(layer, dtype)) + layer.bias.to(dtype)  # type: ignore[union-attr]
    assert torch.equal(ops.linear(x, layer), expected)
    monkeypatch.setattr(narrow, "TILE", {"cpu": 2 * 128})
    torch.testing.assert_close(ops.linear(x, layer), expected)
    torch.testing.assert_close(ops.linear(x, layer, residual=expected), 2 * expected)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_kernel_widens_to_the_same_numbers(name: str, dtype: torch.dtype) -> None:
    compiled = pytest.importorskip("hyaena.ops.cpu.widen")
    layer = round_weight(numbers(301, 384), SCHEMES[name])
    for rows in (slice(None), slice(3, 200), slice(0, 0)):
        found = compiled.widen(layer, dtype, rows)
        if SCHEMES[name].floating:
            assert found is None
        else:
            error = 1e-6 if dtype == torch.float32 else 0.0
            torch.testing.assert_close(found, ops.widen(layer, dtype, rows), rtol=error, atol=0.0)


@pytest.mark.parametrize("name", ["int8", "q8_0", "int4"])
def test_a_kernel_keeps_what_is_not_finite(name: str) -> None:
    compiled = pytest.importorskip("hyaena.ops.cpu.widen")
    layer = round_weight(numbers(4, 64), SCHEMES[name])
    layer.scale[0], layer.scale[1] = torch.inf, -torch.inf
    layer.scale[2].view(torch.int16).fill_(-1)  # a NaN all of whose bits are set
    torch.testing.assert_close(
        compiled.widen(layer, torch.bfloat16, slice(None)), ops.widen(layer, torch.bfloat16), equal_nan=True
    )


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128,), (0, 128), (1, 128), (2, 3, 128)])
def test_few_rows_are_the_product_of_many(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Compiled kernels round x to 16 bits of its block, and the result once."""
    layer = round_weight(numbers(7, 128), SCHEMES[name])._replace(bias=numbers(7))
    x = numbers(*shape).to(dtype)
    exact = x.double() @ ops.widen(layer, torch.float64).T + layer.bias.double()  # type: ignore[union-attr]
    error = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(ops.linear(x, layer).double(), exact, rtol=error, atol=error * 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [4, 40])
def test_wrong_inputs_are_refused(dtype: torch.dtype, rows: int) -> None:
    layer = round_weight(numbers(48, 64), SCHEMES["int8"])
    for width in (32, 65, 128):
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            ops.linear(numbers(rows, width).to(dtype), layer)
    away = layer._replace(codes=layer.codes.to("meta"), scale=layer.scale.to("meta"))
    ops.linear(numbers(rows, 64).to(dtype), away)  # what torch makes of two devices, and no crash


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [4, 40])
def test_who_follows_what_torch_computes_misses_no_kernel(dtype: torch.dtype, rows: int) -> None:
    layer = round_weight(numbers(48, 64), SCHEMES["int8"])
    x, other = numbers(rows, 64).to(dtype), numbers(rows, 64).to(dtype)
    weight = ops.widen(layer, dtype)

    def product(x: Tensor) -> Tensor:
        return ops.linear(x, layer)

    want = torch.nn.functional.linear(other, weight)
    torch.testing.assert_close(torch.vmap(product)(other.view(2, -1, 64)).view_as(want), want)
    _, tangent = torch.func.jvp(product, (x,), (other,))
    torch.testing.assert_close(tangent, want)
    torch.testing.assert_close(make_fx(product)(x)(other), want)
    torch.testing.assert_close(torch.jit.trace(product, (x,), check_trace=False)(other), want)


@ALL
def test_gradients_pass_through_the_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = round_weight(numbers(7, 128), SCHEMES[name])
    x, other = (numbers(2, 5, 128).requires_grad_() for _ in range(2))
    monkeypatch.setattr(narrow, "TILE", {"cpu": 3 * 128})
    upstream = numbers(2, 5, 7)
    ops.linear(x, layer).backward(upstream)
    torch.nn.functional.linear(other, ops.widen(layer, torch.float32)).backward(upstream)
    torch.testing.assert_close(x.grad, other.grad)


def test_a_gradient_of_many_tiles_is_rounded_as_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 a sum that is rounded at each of 96 tiles has four times the error."""
    monkeypatch.setattr(narrow, "TILE", {"cpu": 2 * 128})
    layer, x = round_weight(numbers(192, 128), SCHEMES["int8"]), numbers(40, 128).bfloat16().requires_grad_()
    dy = numbers(40, 192).bfloat16()
    weight = ops.widen(layer, torch.float64)
    (dx,) = torch.autograd.grad(ops.narrow_linear(x, layer), x, dy)
    want, one = dy.double() @ weight, dy @ weight.bfloat16()
    assert torch.dist(dx.double(), want) < 1.8 * torch.dist(one.double(), want)


def test_autocast_multiplies_in_its_dtype() -> None:
    layer, x = round_weight(numbers(4, 64), SCHEMES["int4"]), numbers(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.linear(x, layer)
    assert torch.equal(y, ops.linear(x.bfloat16(), layer))


@ALL
def test_representable_weights_are_kept(name: str) -> None:
    scheme, inputs = SCHEMES[name], 256
    low, high = (-127, 127) if scheme.bits == 8 else (0, 15)
    q = torch.randint(low, high + 1, (4, inputs), generator=torch.Generator().manual_seed(0)).float()
    if scheme.floating:
        low, high = -448, 448
        q = q.to(torch.float8_e4m3fn).float()
    groups = q.unflatten(1, (scheme.groups(inputs), -1))
    groups[..., 0], groups[..., 1] = low, high
    weight = (groups - (8 if name == "q4_0" else 0)).mul(0.125).flatten(1) + (0.5 if scheme.minima else 0)
    assert torch.equal(ops.widen(round_weight(weight, scheme), torch.float32), weight)


@ALL
def test_the_search_beats_the_whole_range(name: str) -> None:
    """Rounding to nearest within the range of each group is the first candidate: none may be worse."""
    scheme, weight = SCHEMES[name], numbers(16, 512)
    groups = weight.unflatten(1, (scheme.groups(512), -1))
    if scheme.minima:
        least = groups.amin(-1, keepdim=True).half().float()
        scale = ((groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15).half().float()
        plain = ((groups - least) / scale).round().clamp(0, 15) * scale + least
    elif scheme.floating:
        scale = groups.abs().amax(-1, keepdim=True) / 448
        plain = (groups / scale).to(torch.float8_e4m3fn).float() * scale
    else:
        reach = 127 if scheme.bits == 8 else 7
        scale = groups.abs().amax(-1, keepdim=True) / reach
        scale = scale if name == "int8" else scale.half().float()
        plain = (groups / scale).round().clamp(-reach - (scheme.bits == 4), reach) * scale
    found = ops.widen(round_weight(weight, scheme), torch.float32)
    before, after = (plain.flatten(1) - weight).square().mean(), (found - weight).square().mean()
    assert after <= before * (0.97 if scheme.bits == 4 else 1.0)


@ALL
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_rounding_finds_what_the_plain_one_finds(
    name: str, weighed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for candidates whose errors differ by the rounding of their sums: those are as good."""
    pytest.importorskip("numba")
    weight, moments = (numbers(70, 384) ** 3).to(dtype), numbers(384).square() if weighed else None
    weight[1] = 0  # no scale is determined
    weight[2] = 0.75
    scheme = SCHEMES[name]
    compiled = round_weight(weight, scheme, moments)
    monkeypatch.setattr("hyaena.ops.cpu.unsupported_reason", lambda _: "none here")
    plain = round_weight(weight, scheme, moments)
    assert [t is None or (t.dtype, t.shape) for t in compiled] == [t is None or (t.dtype, t.shape) for t in plain]
    assert (compiled.codes != plain.codes).float().mean() < 0.01
    h = 1.0 if moments is None else moments
    errors = [((ops.widen(w, torch.float32) - weight.float()).square() * h).sum(1) for w in (compiled, plain)]
    torch.testing.assert_close(*errors, rtol=0.02, atol=1e-6)
    torch.testing.assert_close(*(error.sum() for error in errors), rtol=1e-3, atol=0)


def test_compiled_rounding_does_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = pytest.importorskip("hyaena.quant.compiled")
    monkeypatch.setattr(compiled, "BLOCK", 512)
    before = torch.get_num_threads()
    try:
        found = [(torch.set_num_threads(n), round_weight(numbers(61, 128), SCHEMES["int4"]))[1] for n in (1, 3)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].codes, found[1].codes) and torch.equal(found[0].scale, found[1].scale)


def test_moments_move_the_error_to_inputs_that_matter_little() -> None:
    weight, moments = numbers(32, 64), torch.ones(64)
    moments[::2] = 100.0
    plain, aware = (ops.widen(round_weight(weight, SCHEMES["int4"], m), torch.float32) for m in (None, moments))
    errors = [((w - weight).square() * moments).sum() for w in (plain, aware)]
    assert errors[1] < 0.9 * errors[0]


def test_groups_of_zeros_and_of_one_number_are_exact() -> None:
    weight = torch.zeros(2, 64)
    weight[1, :32] = 0.75
    for name in ("int8", "int4", "q8_0", "q4_0"):
        found = ops.widen(round_weight(weight, SCHEMES[name]), torch.float32)
        torch.testing.assert_close(found, weight, rtol=1e-3, atol=0)
        assert torch.equal(found[0], weight[0])


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(InputError, match="float16 scales of q8_0: choose int8"):
        round_weight(torch.full((1, 32), 1e30), SCHEMES["q8_0"])
    with pytest.raises(InputError, match=r"layers.0.x has 96 inputs, .* groups of 128 .*choose int4$"):
        SCHEMES["int4-128"].check_columns("layers.0.x", 96)
    with pytest.raises(InputError, match=r"choose int8$"):
        SCHEMES["q4_0"].check_columns("layers.0.x", 20)
    with pytest.raises(InputError, match="'int3' are unknown: choose one of int8, int4"):
        scheme_of("int3")
