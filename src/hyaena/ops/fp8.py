"""Matrix products in FP8 as Hopper's tensor cores compute them: by themselves, or in plain torch bit for bit.

    xq = e4m3(x·s_x)        wq = e4m3(W·s_w)        y = (1/s_x · 1/s_w) · ACC(xq, wq)

e4m3 has 3 fraction bits and ends at ±448; the scales are fixed numbers that come with a model. The accumulator of the
tensor cores keeps 13 fraction bits, so ACC is no float32 sum, and a model that was trained over it may depend on it
(docs/numerics.md, "FP8").

Shapes: T rows, K inputs, N outputs.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyaena.errors import InputError, UnsupportedError
from hyaena.ops.backend import use_pointwise, wants_gradients

E4M3 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
"""The largest number of e4m3."""

FP8_MODES = ("auto", "exact", "off")

BLOCK = 32
"""Products that the tensor cores add in one step."""
ALIGNMENT = 16
"""The sizes of an FP8 product are multiples of this; rows are padded to one."""
_FRACTION = 13
"""Fraction bits of the accumulator."""
_TILE = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Products that are in memory at a time, 8 bytes each: on a CPU, as many as its cache holds."""
_SPLIT = 4
"""Blocks after which the split accumulator is added to a float32 total."""

_PLAIN_LINE = (
    "FP8 input projections are computed as plain products (%s): Evo 2 40B depends on the FP8 products of Hopper GPUs "
    "(reported loss 0.92 with them, 1.70 without), 1B a little (1.08, 1.24), 7B not at all; fp8='exact' computes them "
    "in every bit, slowly, and fp8='off' says that plain ones are meant"
)

logger = logging.getLogger(__name__)


class Quantized(NamedTuple):
    """What FP8 products need of a weight and of the scales.

    Attributes:
        weight: e4m3(W·s_w) [N,K].
        input_inverse, weight_inverse: 1/s_x and 1/s_w, float32 []; each begins its storage, as cuBLAS wants them.
    """

    weight: Tensor
    input_inverse: Tensor
    weight_inverse: Tensor


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    mode: str = "auto",
    *,
    quantized: Quantized | None = None,
) -> Tensor:
    """``(1/s_x · 1/s_w) · ACC(e4m3(x·s_x), e4m3(W·s_w))`` of x [...,K]: [...,N] in the dtype of x.

    Gradients are those of the plain product ``x·Wᵀ`` at the same point (a straight-through estimate): rounding is
    constant almost everywhere, and its own derivative of zero would train nothing.

    Args:
        x: activations.
        weight: W [N,K].
        input_scale, weight_scale: s_x and s_w, float32 [].
        mode: see :func:`fp8_road`.
        quantized: what :func:`quantize_weight` returned for this weight and these scales, where it is at hand.

    Raises:
        InputError: an unknown mode.
        UnsupportedError: sizes or a device that FP8 products do not have.

    Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning"; the accumulator was recovered from an H200.
    """
    if fp8_road(mode, x.device) == "plain":
        return torch.nn.functional.linear(x, weight)
    check_fp8_sizes(*weight.shape)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    with torch.autocast(x.device.type, enabled=False):
        if wants_gradients(x, weight):
            return _StraightThrough.apply(x, weight, input_scale, weight_scale, quantized)  # type: ignore[return-value]
        return _product(x, weight, input_scale, weight_scale, quantized)


def fp8_road(mode: str, device: torch.device) -> str:
    """How FP8 products are computed on a device: ``"hopper"``, ``"emulation"`` or ``"plain"``.

    Args:
        mode: ``"auto"``, by a Hopper GPU's tensor cores, and on other devices as plain products, which one logged line
            says; ``"exact"``, the same numbers on every device; ``"off"``, as plain products everywhere.

    Raises:
        InputError: an unknown mode.
        UnsupportedError: the mode is ``"exact"``, and the device has no e4m3 numbers.
    """
    if mode not in FP8_MODES:
        raise InputError(f"fp8 is {mode!r}: choose one of {', '.join(FP8_MODES)}")
    if mode == "off":
        return "plain"
    if is_hopper(device):
        return "hopper"
    if mode == "exact":
        if not _has_e4m3(device.type):
            raise UnsupportedError(f"fp8='exact' cannot run on {device.type!r}, which has no FP8 numbers: use a CPU")
        return "emulation"
    if not torch.compiler.is_compiling():
        _log_plain(device.type if device.type != "cuda" else torch.cuda.get_device_name(device))
    return "plain"


def is_hopper(device: torch.device) -> bool:
    """Whether a device is an NVIDIA GPU of compute capability 9, whose tensor cores these products are made for."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def check_fp8_sizes(outputs: int, inputs: int) -> None:
    """Refuse sizes that FP8 products do not have.

    Raises:
        UnsupportedError: one is no multiple of 16.
    """
    if outputs % ALIGNMENT or inputs % ALIGNMENT:
        raise UnsupportedError(
            f"FP8 products take sizes that are multiples of {ALIGNMENT}, not {inputs} to {outputs}: use fp8='off'"
        )


def quantize_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """``e4m3(clamp(x·scale, ±448))``, rounded to nearest, ties to even; the product is rounded to float32."""
    return (x.float() * scale).clamp_(-FP8_LARGEST, FP8_LARGEST).to(E4M3)


def quantize_weight(weight: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Quantized:
    """What products need of a weight [N,K] and of the scales."""
    return Quantized(quantize_fp8(weight.detach(), weight_scale), 1 / input_scale.float(), 1 / weight_scale.float())


def fp8_product(xq: Tensor, quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """``(1/s_x · 1/s_w) · ACC(xq, wq)`` of xq [T,K] and wq [N,K]: [T,N] in a dtype, on Hopper by its tensor cores.

    There T is a multiple of 16.
    """
    wq, a, b = quantized
    narrow = torch.float32 if dtype == torch.float64 else dtype
    if is_hopper(xq.device):
        y = torch._scaled_mm(xq, wq.t(), scale_a=a, scale_b=b, out_dtype=narrow, use_fast_accum=True)  # type: ignore[attr-defined]
    else:
        y = (accumulate(xq, wq) * (a * b)).to(narrow)
    return y.to(dtype)


def takes_rowwise(x: Tensor, outputs: int, inputs: int) -> bool:
    """Whether :func:`rowwise_product` multiplies x with a weight of these sizes: in bfloat16, on a GPU with FP8."""
    fits = x.is_cuda and x.dtype == torch.bfloat16 and outputs % ALIGNMENT == inputs % ALIGNMENT == 0
    return fits and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (8, 9)


def rowwise_product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """``s_x·s_w·ACC(xq, codes)`` with x [...,K] rounded to ``s_x·xq`` by rows: bfloat16 [...,N].

    Args:
        x: bfloat16.
        codes: e4m3 [N,K].
        scale: s_w, float32 [N,1].
    """
    rows = x.reshape(-1, x.shape[-1])
    if not len(rows):
        return x.new_empty(*x.shape[:-1], len(codes))
    if use_pointwise("auto", rows):
        from hyaena.ops.triton import pointwise

        xq, s = pointwise.quantize_rows(rows)
    else:
        xq, s = quantize_rows(rows)
    y = torch._scaled_mm(xq, codes.t(), scale_a=s, scale_b=scale.t(), out_dtype=x.dtype, use_fast_accum=True)  # type: ignore[attr-defined]
    return y.view(*x.shape[:-1], len(codes))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [T,K] as s·xq with the largest number at ±448: xq e4m3 [T,K], s float32 [T,1]."""
    scale = x.abs().amax(-1, keepdim=True).float() / FP8_LARGEST
    scale = torch.where(scale > 0, scale, 1.0)
    return quantize_fp8(x, 1 / scale), scale


def accumulate(xq: Tensor, wq: Tensor, *, split: bool = False) -> Tensor:
    """ACC: ``xq·wqᵀ`` in the accumulator of Hopper's tensor cores, bit for bit; float32 [T,N].

    Of each block of 32 products, in order, and of the sum so far::

        e = max(exponent(sum), max_k (exponent(xq_k) + exponent(wq_k)))
        sum = Σ_k trunc(xq_k·wq_k, 2^(e-13)) + trunc(sum, 2^(e-13));  sum = trunc(sum, 13 fraction bits)

    where trunc(a, q) drops what is below a multiple of q, toward zero. The exponent of a subnormal number is -6, as it
    is written; products that are zero have none. All of it is exact in float32: terms are below 2^15 units of 2^(e-13).
    It costs some five passes over T·K·N numbers, and memory that does not grow with the sizes.

    Args:
        xq: e4m3 [T,K].
        wq: e4m3 [N,K].
        split: the other accumulator of the tensor cores: after every 4 blocks the sum goes to a float32 total.
    """
    size = _TILE["cuda" if xq.device.type == "cuda" else "cpu"] // BLOCK
    rows = max(1, min(len(xq), math.isqrt(size) // 8))
    columns = max(1, size // rows)
    out = torch.empty(len(xq), len(wq), dtype=torch.float32, device=xq.device)
    numbers, powers = _tables(xq.device)

    def decoded(bits: Tensor) -> tuple[Tensor, Tensor]:
        index = bits.view(torch.uint8).contiguous().int().flatten()
        return numbers.index_select(0, index).view(bits.shape), powers.index_select(0, index).view(bits.shape)

    left = [decoded(part) for part in xq.split(rows)]
    for w, column in zip(wq.split(columns), out.split(columns, dim=1), strict=True):
        right = decoded(w.t())
        for x, tile in zip(left, column.split(rows), strict=True):
            tile.copy_(_tile(x, right, split))
    return out.masked_fill_(_with_nan(xq)[:, None] | _with_nan(wq), math.nan)


def _with_nan(q: Tensor) -> Tensor:
    """Which rows of e4m3 numbers [T,K] have a NaN in them; it has all bits but the sign."""
    return q.view(torch.uint8).bitwise_and(127).amax(1) == 127


def _tile(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], split: bool) -> Tensor:
    """``accumulate`` of finite x [T,K] and w [K,N], each with the powers of its exponents."""
    (x, x_powers), (w, w_powers) = left, right
    total = x.new_zeros(len(x), w.shape[1])
    sums = torch.zeros_like(total)
    products = x.new_empty(len(x), min(BLOCK, len(w)), w.shape[1])
    terms = torch.empty_like(products, dtype=torch.int32)
    for block, start in enumerate(range(0, len(w), BLOCK)):
        here, count = slice(start, start + BLOCK), min(BLOCK, len(w) - start)
        # The largest sum of exponents: 32 sixth powers add up to less than the next one.
        largest = _exponent(x_powers[:, here] @ w_powers[here]).div_(6, rounding_mode="floor")
        e = torch.maximum(largest, _exponent(sums))
        scale, unit = _power_of_two(_FRACTION - e), _power_of_two(e - _FRACTION)
        part = torch.mul(x[:, here, None], w[here], out=products[:, :count]).mul_(scale[:, None])
        part = terms[:, :count].copy_(part).sum(1, dtype=torch.int32)  # the conversion drops fractions, as trunc does
        sums = (part + sums.mul_(scale).int()).float().mul_(unit)
        sums.view(torch.int32).bitwise_and_(-1 << (23 - _FRACTION))
        if split and (block % _SPLIT == _SPLIT - 1 or start + BLOCK >= len(w)):
            total, sums = total + sums, torch.zeros_like(sums)
    return total if split else sums


def _exponent(x: Tensor) -> Tensor:
    """floor(log2 x) of x >= 0 and of -x, as int32; -127 of zero."""
    return (x.view(torch.int32) >> 23).bitwise_and_(255).sub_(127)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of every e4m3 number, by its bits: itself, and the 6th power of its exponent's power of two (0 of zero)."""
    numbers = torch.arange(256, dtype=torch.uint8, device="cpu").view(E4M3).float().nan_to_num()
    exponents = torch.where(numbers == 0, -127, 6 * _exponent(numbers).clamp(min=-6))
    return numbers.to(device), _power_of_two(exponents).to(device)


def _product(
    x: Tensor, weight: Tensor, input_scale: Tensor, weight_scale: Tensor, quantized: Quantized | None
) -> Tensor:
    rows = x.detach().reshape(-1, x.shape[-1])
    if not len(rows):
        return x.new_empty(*x.shape[:-1], len(weight))
    if quantized is None:
        quantized = quantize_weight(weight, input_scale, weight_scale)
    if not is_hopper(x.device):
        xq = quantize_fp8(rows, input_scale)
    elif use_pointwise("auto", rows):
        from hyaena.ops.triton import pointwise

        xq = pointwise.quantize_fp8(rows, input_scale.float(), len(rows) + -len(rows) % ALIGNMENT)
    else:
        xq = quantize_fp8(torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % ALIGNMENT)), input_scale)
    y = fp8_product(xq, quantized, x.dtype)[: len(rows)]
    return y.view(*x.shape[:-1], y.shape[-1])


class _StraightThrough(torch.autograd.Function):
    """The FP8 product, with the gradients of the plain one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *others: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, *others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None
        dw = dy.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return dx, None if dw is None else dw.to(weight.dtype), None, None, None


@functools.cache
def _has_e4m3(device_type: str) -> bool:
    try:
        return bool(torch.ones(1, device=device_type).to(E4M3).float().item() == 1)
    except (RuntimeError, NotImplementedError, TypeError):
        return False


@functools.cache
def _log_plain(device: str) -> None:
    """Say, once for a device, that products are plain where FP8 was trained. A warning: it may change every result."""
    logger.warning(_PLAIN_LINE, device)
