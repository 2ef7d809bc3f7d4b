"""The kernels for explicit taps against the plain operator in float64: outputs, states, all gradients."""

import pytest
import torch
from torch import Tensor

from device import DEVICE
from hyaena.ops import ExplicitFilter, HyenaState, hyena
from hyaena.ops.triton import FEW_TAPS
from hyaena.ops.triton.hyena import toeplitz_launch
from hyaena.ops.triton.hyena.explicit_launch import (
    Operands,
    Tiling,
    Walk,
    backward_direct,
    backward_products,
    forward_direct,
    forward_products,
)

# As in test_kernels; the factors of products are rounded to bfloat16 as well, as those of the plain operator are.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2 ** (-8 if DEVICE == "cuda" else -7)}
GRADIENT = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2 if DEVICE == "cuda" else 3e-2}

SMALL = Tiling(chunk=16, runs=2, length=1, steps=4)
SHORT = Walk(words=4, run=16, group=4)
WALK = Walk(words=64, run=16, group=4)


def make(
    length: int,
    groups: int = 3,
    width: int = 2,
    count: int = 7,
    taps: int = 3,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    padded: bool = False,
    bare: bool = False,
    documents: bool = False,
    taps_dtype: torch.dtype = torch.float32,
) -> Operands:
    """A random problem; ``bare`` leaves out all that may be None."""
    channels = groups * width
    mask = torch.arange(length) >= torch.randint(0, length, (batch, 1)) if padded else None
    reset = None
    if documents:
        reset = torch.rand(batch, length) < 0.1
        reset[0, -1] = True
    problem = Operands(
        torch.randn(batch, length, 3 * channels).to(dtype),
        torch.randn(3 * channels, taps),
        torch.randn(3 * channels),
        torch.randn(groups, count).to(taps_dtype),
        torch.randn(channels),
        torch.randn(batch, 3 * channels, taps - 1).to(dtype),
        torch.randn(batch, channels, count - 1),
        mask,
        reset,
    )
    if bare:
        problem = problem._replace(bias=None, skip=None, short=None, long=None)
    return Operands(*(None if t is None else t.to(DEVICE) for t in problem))


def exact(problem: Operands) -> tuple[list[Tensor | None], Tensor, Tensor, Tensor]:
    """Leaves in float64 (all but mask and reset), and what the plain operator makes of them."""
    wide = [None if t is None else t.double().requires_grad_() for t in problem[:7]]
    z, weight, bias, taps, skip, short, long = wide
    assert z is not None and weight is not None and taps is not None
    if short is None:
        short = z.new_zeros(z.shape[0], z.shape[2], weight.shape[1] - 1)
    if long is None:
        long = z.new_zeros(z.shape[0], z.shape[2] // 3, taps.shape[1] - 1)
    filter = ExplicitFilter(taps, skip)
    y, state = hyena(
        z, weight, bias, filter, HyenaState(short, long), mask=problem.mask, reset=problem.reset, method="direct"
    )
    return wide, y, state.short, state.long


def close(value: Tensor, expected: Tensor, tolerance: float) -> None:
    expected = expected.detach()
    assert value.shape == expected.shape
    assert torch.isfinite(value).all()
    if expected.numel():
        error = (value - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
        assert float(error) < tolerance


def check_forward(problem: Operands, tiling: Tiling | Walk) -> None:
    got = forward_products(problem, tiling) if isinstance(tiling, Tiling) else forward_direct(problem, tiling)
    _, *expected = exact(problem)
    for value, want in zip(got, expected, strict=True):
        close(value, want, TOLERANCE[value.dtype])


def check_backward(problem: Operands, tiling: Tiling | Walk, *, frozen: bool = False) -> None:
    """``frozen``: the gradients of the filters are not wanted."""
    leaves, *outputs = exact(problem)
    slopes = [torch.randn_like(t).to(problem.z.dtype).to(t.dtype) for t in outputs]  # what the kernels are given
    loss = sum((t * slope).sum() for t, slope in zip(outputs, slopes, strict=True))
    given = [t for t in leaves if t is not None]
    expected = dict(zip(map(id, given), torch.autograd.grad(loss, given), strict=True))
    dy, dshort, dlong = slopes[0].to(problem.z.dtype), slopes[1].to(problem.z.dtype), slopes[2].float()
    if isinstance(tiling, Tiling):
        got = backward_products(dy, dshort, dlong, problem, tiling, WALK, parameters=not frozen)
    else:
        got = backward_direct(dy, dshort, dlong, problem, tiling, parameters=not frozen)
    for place, (leaf, value) in enumerate(zip(leaves, got, strict=True)):
        if frozen and 1 <= place <= 4:
            assert value.numel() == 0
        elif leaf is not None:
            close(value, expected[id(leaf)], GRADIENT[problem.z.dtype])


PROBLEMS = {
    "one step": dict(length=1),
    "shorter than the windows": dict(length=2, count=20, taps=4),
    "several runs": dict(length=35),
    "a multiple of the chunk": dict(length=32),
    "long taps": dict(length=20, count=33),
    "longer taps": dict(length=20, count=50),
    "one tap": dict(length=10, count=1, taps=1),
    "eight short taps": dict(length=20, taps=8),
    "padded": dict(length=20, padded=True, batch=2),
    "bare": dict(length=20, bare=True),
    "documents": dict(length=35, count=20, documents=True),
    "documents and padding": dict(length=20, padded=True, documents=True),
    "wide groups": dict(length=10, groups=2, width=17),
    "whole groups": dict(length=10, groups=2, width=16),
    "bfloat16": dict(length=35, count=20, dtype=torch.bfloat16),
    "bfloat16 taps": dict(length=20, dtype=torch.bfloat16, taps_dtype=torch.bfloat16),
    "float16": dict(length=20, dtype=torch.float16),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_forward(name: str) -> None:
    check_forward(make(**PROBLEMS[name]), SMALL)


@pytest.mark.parametrize("name", PROBLEMS)
def test_backward(name: str) -> None:
    check_backward(make(**PROBLEMS[name]), SMALL)


FEW_TAPS = {name: size for name, size in PROBLEMS.items() if size.get("count", 7) <= FEW_TAPS} | {
    "odd": dict(length=19, groups=1, width=3, padded=True, dtype=torch.bfloat16),  # a word holds one channel
    "eight taps": dict(length=20, count=8, taps=2),
    "documents of few taps": dict(length=35, documents=True, padded=True),
    "shorter than the windows of few taps": dict(length=2, taps=4),
}
BACK = ("one step", "several runs", "one tap", "bare", "bfloat16 taps", "odd", *list(FEW_TAPS)[-3:])


@pytest.mark.parametrize("name", FEW_TAPS)
def test_forward_of_few_taps(name: str) -> None:
    check_forward(make(**FEW_TAPS[name]), SHORT)


@pytest.mark.parametrize("tiling", [SMALL, SHORT], ids=["products", "walk"])
def test_backward_of_frozen_filters(tiling: Tiling | Walk) -> None:
    check_backward(make(**PROBLEMS["several runs"]), tiling, frozen=True)


@pytest.mark.parametrize("name", BACK)
def test_backward_of_few_taps(name: str) -> None:
    check_backward(make(**FEW_TAPS[name]), SHORT)


IN_REGISTERS = toeplitz_launch.Tiling(warps=2, blocks=2, run=32)

OF_REGISTERS = {
    "one block": dict(length=16, count=16),
    "shorter than a block": dict(length=9, count=9),
    "several runs": dict(length=50, groups=2, count=20),
    "long taps": dict(length=50, groups=1, count=50),
    "wide groups": dict(length=20, groups=1, width=48, count=18),
    "two short taps": dict(length=40, count=17, taps=2),
    "five short taps": dict(length=40, count=18, taps=5),
    "padded": dict(length=40, count=20, padded=True, batch=2),
    "bare": dict(length=50, count=20, bare=True),
}


def in_registers(**size) -> Operands:
    problem = make(**({"groups": 2, "width": 16, "dtype": torch.bfloat16, "taps_dtype": torch.bfloat16} | size))
    assert toeplitz_launch.takes_registers(problem)
    return problem


@pytest.mark.parametrize("name", OF_REGISTERS)
def test_forward_in_registers(name: str) -> None:
    problem = in_registers(**OF_REGISTERS[name])
    _, *expected = exact(problem)
    got = toeplitz_launch.forward_in_registers(problem, IN_REGISTERS)
    for value, want in zip(got, expected, strict=True):
        close(value, want, TOLERANCE[value.dtype])


@pytest.mark.parametrize(
    "size",
    [dict(length=40, count=20, padded=True), dict(length=33, count=17, taps=5, bare=True)],
    ids=["padded", "bare, five short taps"],
)
def test_backward_in_registers(size: dict) -> None:
    problem = in_registers(groups=1, batch=1, **size)
    leaves, y, window, _ = exact(problem)
    dy, dwindow = (torch.randn_like(t).to(problem.z.dtype) for t in (y, window))
    given = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad((y * dy).sum() + (window * dwindow).sum(), given)
    expected = dict(zip(map(id, given), gradients, strict=True))
    tiling = toeplitz_launch.Tiling(warps=1, run=32)
    got = toeplitz_launch.backward_in_registers(dy, dwindow, problem, tiling, tiling)
    for leaf, value in zip(leaves, got, strict=True):
        if leaf is not None:
            close(value, expected[id(leaf)], GRADIENT[problem.z.dtype])


def test_backward_in_registers_of_frozen_filters() -> None:
    problem = in_registers(groups=1, batch=1, length=16, count=16)
    dy = torch.randn_like(problem.z[..., :16])
    tiling = toeplitz_launch.Tiling(warps=1, run=32)
    got = toeplitz_launch.backward_in_registers(dy, None, problem, tiling, tiling)
    frozen = toeplitz_launch.backward_in_registers(dy, None, problem, tiling, parameters=False)
    for name, value, other in zip(problem._fields, got, frozen, strict=False):
        if name in ("weight", "bias", "taps", "skip"):
            assert other.numel() == 0
        else:
            close(other, value, GRADIENT[problem.z.dtype])


@pytest.mark.parametrize(
    "change",
    [
        dict(documents=True),
        dict(taps_dtype=torch.float32),
        dict(dtype=torch.float32),
        dict(width=8),
        dict(taps=6),
        dict(length=19),
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_problems_take_products_of_chunks(change: dict) -> None:
    size = dict(length=20, count=20, width=16, dtype=torch.bfloat16, taps_dtype=torch.bfloat16)
    assert not toeplitz_launch.takes_registers(make(**(size | change)))
