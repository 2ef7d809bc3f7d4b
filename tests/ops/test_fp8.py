"""FP8 products: rounding to e4m3, the accumulator of Hopper's tensor cores bit for bit, and what follows from them."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from device import DEVICE
from hyaena import ops
from hyaena.errors import InputError, UnsupportedError
from hyaena.ops import fp8

ONE = torch.ones((), device=DEVICE)
ON_HOPPER = fp8.is_hopper(torch.device(DEVICE))


@pytest.fixture
def measured(golden: Path) -> dict[str, Tensor]:
    """A product of an H200; see tests/golden/README.md."""
    return {name: t.to(DEVICE) for name, t in load_file(golden / "evo2-tiny/fp8/hopper_gemm.safetensors").items()}


def numbers(*shape: int, spread: float = 0.0) -> Tensor:
    """Random e4m3 numbers; with a spread, their magnitudes are uniform over so many powers of two."""
    x = torch.randn(*shape) * torch.exp2(spread * (torch.rand(*shape) - 0.5))
    return fp8.quantize_fp8(x, torch.ones(())).to(DEVICE)


def accumulate_slowly(x: Tensor, w: Tensor, *, split: bool = False) -> float:
    """The sum of one row x [K] and one column w [K], term by term in Python's exact integers.

    The smallest exponent of a factor is -6: below it e4m3 numbers are subnormal. Numbers are counted in units of 2^-40,
    below every bit that occurs.
    """

    def exponent(v: float) -> int:
        return math.frexp(v)[1] - 1

    def cut(v: int, bits: int) -> int:  # toward zero, to a multiple of 2^bits units
        return (abs(v) >> bits << bits if bits > 0 else abs(v)) * (1 if v > 0 else -1)

    total, sums = 0, 0
    x_, w_ = x.float().tolist(), w.float().tolist()
    for block, start in enumerate(range(0, len(x_), 32)):
        pairs = list(zip(x_[start : start + 32], w_[start : start + 32], strict=True))
        largest = [max(exponent(a), -6) + max(exponent(b), -6) for a, b in pairs if a and b]
        largest += [sums and exponent(sums) - 40] if sums else []
        e = max(largest, default=0)
        terms = [cut(int(a * b * 2**40), e - 13 + 40) for a, b in pairs]
        sums = sum(terms) + cut(sums, e - 13 + 40)
        sums = cut(sums, abs(sums).bit_length() - 14)
        if split and block % 4 == 3:
            total, sums = total + sums, 0
    return (total + sums) / 2**40


def test_the_fast_accumulator_is_that_of_the_gpu(measured: dict[str, Tensor]) -> None:
    got = fp8.accumulate(measured["x"], measured["w"])
    assert got.dtype == torch.float32 and torch.equal(got, measured["acc_fast"])
    exact = measured["x"].double() @ measured["w"].double().t()
    assert bool((measured["acc_fast"] != exact.float()).all())  # so this test sees the accumulator


def test_the_split_accumulator_is_that_of_the_gpu(measured: dict[str, Tensor]) -> None:
    assert torch.equal(fp8.accumulate(measured["x"], measured["w"], split=True), measured["acc_split"])


def test_the_product_in_bfloat16_is_that_of_the_gpu(measured: dict[str, Tensor]) -> None:
    x, quantized = measured["x"].float(), fp8.Quantized(measured["w"], ONE, ONE)
    rows = torch.nn.functional.pad(x, (0, 0, 0, 8)).to(fp8.E4M3)
    assert torch.equal(fp8.fp8_product(rows, quantized, torch.bfloat16)[:8], measured["out_fast"])
    y = ops.fp8_linear(x.bfloat16(), measured["w"].bfloat16(), ONE, ONE, "exact")
    assert torch.equal(y, measured["out_fast"])


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("spread", [0.0, 6.0, 16.0])
@pytest.mark.parametrize("inputs", [1, 31, 32, 48, 200])
def test_the_accumulator_equals_its_definition(inputs: int, spread: float, split: bool) -> None:
    x, w = numbers(3, inputs, spread=spread), numbers(5, inputs, spread=spread)
    x.view(torch.uint8)[0, ::3] = 0
    want = [[accumulate_slowly(a, b, split=split) for b in w.cpu()] for a in x.cpu()]
    assert torch.equal(fp8.accumulate(x, w, split=split).double().cpu(), torch.tensor(want, dtype=torch.float64))


def test_sums_near_the_largest_are_exact() -> None:
    x = torch.full((2, 64), 448.0, device=DEVICE).to(fp8.E4M3)
    w = (x.float() * torch.tensor([[1.0], [-1.0]], device=DEVICE)).to(fp8.E4M3)
    assert fp8.accumulate(x, w)[0].tolist() == [64 * 448.0**2, -64 * 448.0**2]


def test_tiles_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = numbers(9, 64), numbers(50, 64)
    whole = fp8.accumulate(x, w)
    monkeypatch.setattr(fp8, "_TILE", dict.fromkeys(fp8._TILE, 1024))
    assert torch.equal(fp8.accumulate(x, w), whole)
    assert torch.equal(fp8.accumulate(x, w.t().contiguous().t()), whole)  # laid out as the module keeps it


def test_nan_reaches_its_row_and_its_column_only() -> None:
    x, w = numbers(3, 32), numbers(4, 32)
    x.view(torch.uint8)[1, 5] = 0x7F
    w.view(torch.uint8)[2, 6] = 0xFF
    nan = fp8.accumulate(x, w).isnan()
    assert nan[1].all() and nan[:, 2].all() and nan.sum() == 4 + 3 - 1


def nearest(x: float) -> float:
    """The e4m3 number nearest to x, of two the one with an even last bit, by looking at all of them."""
    finite = [v for v in torch.arange(127, dtype=torch.uint8).view(fp8.E4M3).float().tolist()]
    best = min(range(len(finite)), key=lambda i: (abs(finite[i] - abs(x)), i % 2))
    return math.copysign(finite[best], x)


def test_rounding_is_to_nearest_even_and_saturates() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(fp8.E4M3).float()
    middles = (codes[1:] + codes[:-1]) / 2
    values = torch.cat([codes, middles, middles.nextafter(codes[1:]), middles.nextafter(codes[:-1]), torch.randn(200)])
    values = torch.cat([values, -values, torch.tensor([448.0, 464.0, 480.0, 1e9, math.inf, -math.inf, 2.0**-10])])
    got = fp8.quantize_fp8(values.to(DEVICE), ONE).float().cpu()
    assert got.tolist() == [nearest(min(max(v, -448), 448)) for v in values.tolist()]
    assert fp8.quantize_fp8(torch.tensor([math.nan], device=DEVICE), ONE).isnan().all()


def test_scales_are_applied_in_float32_and_undone() -> None:
    x, w = torch.randn(5, 64, device=DEVICE), torch.randn(32, 64, device=DEVICE) * 0.01
    s_x, s_w = torch.tensor(37.7, device=DEVICE), torch.tensor(9001.3, device=DEVICE)
    y = ops.fp8_linear(x, w, s_x, s_w, "exact")
    xq, wq = (x * s_x).to(fp8.E4M3), (w * s_w).to(fp8.E4M3)
    acc = fp8.accumulate(xq, wq)
    torch.testing.assert_close(y, acc / (s_x * s_w), rtol=3e-7, atol=0)
    # Rounding to 3 fraction bits is off by at most 2^-4 of each factor, and by a third of that as a root mean square.
    error = (y - x @ w.t()).norm() / (x @ w.t()).norm()
    assert 0.01 < error < 2**-4


def test_rows_and_shapes_are_independent() -> None:
    """A row is computed as it is alone: decoding equals prefill bit for bit, in any batch."""
    x, w = torch.randn(2, 21, 64, device=DEVICE).bfloat16(), torch.randn(48, 64, device=DEVICE).bfloat16()
    y = ops.fp8_linear(x, w, ONE, ONE, "exact")
    assert y.shape == (2, 21, 48) and y.dtype == torch.bfloat16
    assert torch.equal(ops.fp8_linear(x[1, 7], w, ONE, ONE, "exact"), y[1, 7])
    assert ops.fp8_linear(x[:0], w, ONE, ONE, "exact").shape == (0, 21, 48)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    x, w = torch.randn(3, 32, device=DEVICE).bfloat16().to(dtype), torch.randn(16, 32, device=DEVICE).bfloat16()
    y = ops.fp8_linear(x, w.to(dtype), ONE, ONE, "exact")
    wide = ops.fp8_linear(x.float(), w.float(), ONE, ONE, "exact")
    assert y.dtype == dtype and torch.equal(y, wide.to(dtype))


def test_gradients_are_those_of_the_plain_product() -> None:
    x = torch.randn(2, 3, 32, device=DEVICE, requires_grad=True)
    w = torch.randn(16, 32, device=DEVICE, requires_grad=True)
    y = ops.fp8_linear(x, w, ONE, ONE, "exact")
    with torch.no_grad():
        assert torch.equal(y, ops.fp8_linear(x, w, ONE, ONE, "exact"))  # training and inference compute the same
    dy = torch.randn_like(y)
    want = torch.autograd.grad(torch.nn.functional.linear(x, w), [x, w], dy)
    for got, expected in zip(torch.autograd.grad(y, [x, w], dy), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_autocast_gives_its_dtype_and_changes_no_bit() -> None:
    x, w = torch.randn(4, 32, device=DEVICE), torch.randn(16, 32, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = ops.fp8_linear(x, w, ONE, ONE, "exact")
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ops.fp8_linear(x.bfloat16(), w, ONE, ONE, "exact"))


@pytest.mark.skipif(ON_HOPPER, reason="auto is the FP8 product there")
def test_auto_is_the_plain_product_elsewhere_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    fp8._log_plain.cache_clear()
    x, w = torch.randn(4, 32, device=DEVICE), torch.randn(16, 32, device=DEVICE)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert torch.equal(ops.fp8_linear(x, w, ONE, ONE), torch.nn.functional.linear(x, w))
    (line,) = [record.getMessage() for record in caplog.records if record.name == fp8.logger.name]
    assert "40B" in line and "7B" in line and "fp8='exact'" in line and "\n" not in line


def test_off_is_the_plain_product_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    x, w = torch.randn(4, 32, device=DEVICE), torch.randn(15, 32, device=DEVICE)
    with caplog.at_level(logging.INFO):
        assert torch.equal(ops.fp8_linear(x, w, ONE, ONE, "off"), torch.nn.functional.linear(x, w))
    assert not caplog.records


def test_bad_arguments_are_refused_in_one_line() -> None:
    x, w = torch.randn(4, 32, device=DEVICE), torch.randn(15, 32, device=DEVICE)
    with pytest.raises(InputError, match="fp8 is 'fast': choose one of auto, exact, off"):
        ops.fp8_linear(x, w, ONE, ONE, "fast")
    with pytest.raises(UnsupportedError, match="multiples of 16, not 32 to 15: use fp8='off'"):
        ops.fp8_linear(x, w, ONE, ONE, "exact")
    with pytest.raises(UnsupportedError, match="cannot run on 'meta'"):
        ops.fp8_linear(x.to("meta"), w.to("meta"), ONE, ONE, "exact")


@pytest.mark.skipif(DEVICE != "cuda", reason="the interpreter rounds to e4m3 otherwise than the GPU")
def test_the_kernel_rounds_as_plain_torch_does() -> None:
    from hyaena.ops.triton import pointwise

    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    for x in (bits, torch.randn(1 << 16), torch.randn(1 << 16).half()):
        x, scale = x.to(DEVICE).view(-1, 64), torch.tensor(3.7, device=DEVICE)
        got = pointwise.quantize_fp8(x, scale, len(x) + 16)
        want = fp8.quantize_fp8(x, scale)
        same = (got[: len(x)].view(torch.uint8) == want.view(torch.uint8)) | (got[: len(x)].isnan() & want.isnan())
        assert same.all() and not got[len(x) :].view(torch.uint8).any()


@pytest.mark.parametrize("rows", [1, 7, 16, 130])
def test_rows_are_rounded_by_their_own_scales(rows: int) -> None:
    """And their product with weights rounded by rows is that of the rounded numbers."""
    x = (torch.randn(rows, 64) * torch.logspace(-3, 3, rows)[:, None]).to(DEVICE, torch.bfloat16)
    w = torch.randn(48, 64, device=DEVICE) * torch.logspace(-2, 2, 48, device=DEVICE)[:, None]
    x[0, :32] = 0
    (xq, s), (wq, t) = fp8.quantize_rows(x), fp8.quantize_rows(w)
    assert torch.equal(xq.float().abs().amax(1), torch.full((rows,), 448.0, device=DEVICE))
    assert ((xq.double() * s - x.double()).norm(dim=1) < 0.04 * x.double().norm(dim=1)).all()
    got = fp8.rowwise_product(x.view(1, rows, 64), wq, t)[0].double()
    want = (xq.double() * s) @ (wq.double() * t).T
    assert got.shape == (rows, 48) and ((got - want).norm(dim=1) < 0.004 * want.norm(dim=1)).all()
    assert not fp8.quantize_rows(torch.zeros(1, 16))[0].float().any()


@pytest.mark.skipif(DEVICE != "cuda", reason="the interpreter rounds to e4m3 otherwise than the GPU")
def test_the_kernel_rounds_rows_as_plain_torch_does() -> None:
    from hyaena.ops.triton import pointwise

    x = (torch.randn(33, 4096) * torch.logspace(-9, 9, 33)[:, None]).to(DEVICE, torch.bfloat16)
    x[3] = 0
    (got, s), (want, t) = pointwise.quantize_rows(x), fp8.quantize_rows(x)
    torch.testing.assert_close(s, t, rtol=1e-6, atol=0)
    assert (got.float() != want.float()).float().mean() < 1e-3  # scales differ by a rounding
