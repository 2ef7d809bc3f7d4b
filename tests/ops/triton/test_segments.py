"""The kernels of many modes in registers, against the plain operator in float64."""

from typing import Any

import pytest
import torch
from tests.ops.triton.test_kernels import TOLERANCE, close, exact, make

from hyaena.ops.triton.hyena.segments_launch import backward_in_registers, forward_in_registers

ROUNDED = 2 * TOLERANCE[torch.bfloat16]  # factors are bfloat16 too
PROBLEMS: dict[str, dict[str, Any]] = {
    "whole tiles": dict(length=512, batch=1),
    "a step more": dict(length=257, modes=3, batch=1),
    "rows": dict(length=270),
    "a part of a tile, one tap": dict(length=300, taps=1, batch=1),
    "five taps": dict(length=260, taps=5, modes=8, batch=1),
    "nine modes": dict(length=256, modes=9, batch=1),
    "real": dict(length=270, modes=8, real=True, batch=1),
    "padded": dict(length=300, padded=True),
    "bare": dict(length=300, bare=True, batch=1),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_forward(name: str) -> None:
    problem = make(**({"channels": 16, "dtype": torch.bfloat16} | PROBLEMS[name]))
    _, y, short, long = exact(problem)
    got = forward_in_registers(problem)
    close(got[0], y, ROUNDED)
    close(got[1], short, TOLERANCE[torch.bfloat16])
    close(got[2], long, 1e-4)


@pytest.mark.parametrize("name", ["rows", "a part of a tile, one tap", "five taps", "real"])
def test_gradients(name: str) -> None:
    problem = make(**({"channels": 16, "dtype": torch.bfloat16} | PROBLEMS[name]))
    problem = problem._replace(short=None, long=None)
    wide, y, window, _ = exact(problem)
    dy, dwindow = torch.randn_like(y).to(problem.z.dtype), torch.randn_like(window).to(problem.z.dtype)
    leaves = [t for t in wide[:6] if t is not None]
    expected = iter(torch.autograd.grad((y * dy).sum() + (window * dwindow).sum(), leaves))
    got = backward_in_registers(dy, dwindow, problem)
    for i, (leaf, gradient) in enumerate(zip(wide[:6], got, strict=False)):
        if leaf is not None:  # those of poles, residues and skip need neither g nor dw, which are rounded
            close(gradient, next(expected), 2 * ROUNDED if i < 3 else 2e-4)
    if problem.real:
        frozen = backward_in_registers(dy, dwindow, problem, parameters=False)
        assert torch.equal(frozen[0], got[0])
        assert all(t.numel() == 0 for t in frozen[1:6])
