"""The gradients of modes by products, against the plain operator in float64."""

import pytest
import torch
from tests.ops.triton.test_kernels import TOLERANCE, close, exact, make

from device import DEVICE
from hyaena.ops.triton.hyena import launch, modal_backward_launch
from hyaena.ops.triton.hyena.modal_backward_launch import Tiling, backward_products

# Several tiles and chunks from few steps.
SMALL = Tiling(chunk=16, chunks=16, channels=4)
NARROW = 3 * TOLERANCE[torch.bfloat16]  # g, dw and the result are rounded
PROBLEMS = {
    "one step": dict(length=1),
    "within a chunk": dict(length=9, modes=3),
    "whole chunks": dict(length=32, taps=2),
    "within a later tile": dict(length=300, batch=1),
    "five taps, a block of channels more": dict(length=20, taps=5, channels=6),
    "sixteen modes": dict(length=40, modes=16),
    "real": dict(length=300, modes=2, real=True, batch=1),
    "sixteen pairs of real modes": dict(length=40, modes=16, real=True),
    "padded": dict(length=70, padded=True),
    "bare": dict(length=70, bare=True),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients(name: str) -> None:
    problem = make(**({"channels": 2, "modes": 3, "dtype": torch.bfloat16} | PROBLEMS[name]))
    wide, y, window, _ = exact(problem)
    dy, dwindow = torch.randn_like(y).to(problem.z.dtype), torch.randn_like(window).to(problem.z.dtype)
    leaves = [t for t in wide if t is not None]
    expected = iter(torch.autograd.grad((y * dy).sum() + (window * dwindow).sum(), leaves))
    got = backward_products(dy, dwindow, problem, SMALL)
    for value, leaf, name in zip(got, wide, problem._fields, strict=False):
        if leaf is not None:
            close(value, next(expected), 1e-4 if name in ("poles", "residues", "skip", "long") else NARROW)


def test_frozen_filters() -> None:
    problem = make(40, 2, dtype=torch.bfloat16)
    dy = torch.randn(2, 40, 2, dtype=torch.bfloat16, device=DEVICE)
    whole = backward_products(dy, None, problem, SMALL)
    frozen = backward_products(dy, None, problem, SMALL, parameters=False)
    for i in (0, 6, 7):
        close(frozen[i], whole[i], NARROW)
    assert all(t.numel() == 0 for t in frozen[1:6])


@pytest.mark.parametrize("change", ["documents", "few modes", "short", "float32", "a gradient of the state"])
def test_other_problems_take_the_recurrence(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(
        8 if change == "short" else modal_backward_launch.SHORTEST,
        modes=4 if change == "few modes" else 8,
        dtype=torch.float32 if change == "float32" else torch.bfloat16,
        documents=change == "documents",
    )
    dlong = torch.zeros(2, 5, 8, 2) if change == "a gradient of the state" else None
    monkeypatch.setattr(launch, "backward", lambda *args, **options: "recurrence")
    assert modal_backward_launch.backward(problem.z, None, dlong, problem) == "recurrence"
