"""The kernels as operators of torch: autograd, torch.compile, torch's own checks, and what is kept for the backward."""

import pytest
import torch
from torch import Tensor

from device import DEVICE
from hyaena.errors import InputError
from hyaena.ops import HyenaState, ModalFilter, hyena
from hyaena.ops.triton.hyena.register import hyena_operator, hyena_step_operator

FUSED, BLOCKED = {"backend": "triton"}, {"method": "blocked"}


def arguments(length: int = 4, channels: int = 3) -> list[Tensor]:
    poles = torch.polar(torch.rand(channels, 2) * 0.9, torch.rand(channels, 2) * 3)
    residues = torch.randn(channels, 2, dtype=torch.complex64)
    fir, iir = torch.randn(2, 3 * channels, 2), torch.randn(2, channels, 2, dtype=torch.complex64)
    z, weight, bias = torch.randn(2, length, 3 * channels), torch.randn(3 * channels, 3), torch.randn(3 * channels)
    return [t.to(DEVICE) for t in (z, weight, bias, poles, residues, torch.randn(channels), fir, iir)]


def loss(method: dict[str, str], z, weight, bias, poles, residues, skip, fir, iir) -> Tensor:
    state = HyenaState(fir, iir)
    y, state = hyena(z, weight, bias, ModalFilter(poles, residues, skip), state, **method)
    return y.sin().sum() + state.short.sin().sum() + (state.long * (1 + 2j)).real.sin().sum()


def gradients(method: dict[str, str], inputs: list[Tensor], function=loss) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(method, *leaves), leaves)


def agree(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for value, want in zip(got, expected, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 4])
def test_autograd_equals_the_plain_operator(length: int) -> None:
    inputs = arguments(length)
    agree(gradients(FUSED, inputs), gradients(BLOCKED, inputs))


def test_compiles_to_one_graph() -> None:
    inputs = arguments()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    agree(gradients(FUSED, inputs, compiled), gradients(BLOCKED, inputs))


def pairs(inputs: list[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(t).contiguous() if t.is_complex() else t for t in inputs]


def test_torch_accepts_the_operators() -> None:
    inputs = [t.requires_grad_() for t in pairs(arguments(length=2))]
    torch.library.opcheck(hyena_operator, (*inputs, None))
    torch.library.opcheck(hyena_step_operator, tuple(t.detach() for t in pairs(arguments(length=1))))


def test_torch_accepts_what_may_be_left_out() -> None:
    z, weight, _, poles, residues, *_ = pairs(arguments())
    mask = torch.tensor([[False, True, True, True]] * 2, device=DEVICE)
    given = (z, weight, None, poles, residues, None, None, None, mask)
    torch.library.opcheck(hyena_operator, given, test_utils=("test_schema", "test_faketensor"))


def test_nothing_but_the_inputs_is_kept_for_the_backward() -> None:
    inputs = [t.requires_grad_() for t in arguments(length=40)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        z, weight, bias, poles, residues, skip, fir, iir = inputs
        hyena(z, weight, bias, ModalFilter(poles, residues, skip), HyenaState(fir, iir), backend="triton")
    known = {t.untyped_storage().data_ptr() for t in inputs}
    assert kept and all(t.untyped_storage().data_ptr() in known for t in kept)


def test_parameters_may_be_frozen() -> None:
    z, weight, bias, poles, residues, skip, _, _ = arguments()
    z.requires_grad_()
    y, _ = hyena(z, weight, bias, ModalFilter(poles, residues, skip), backend="triton")
    expected, _ = hyena(z, weight, bias, ModalFilter(poles, residues, skip), method="blocked")
    agree(torch.autograd.grad(y.sum(), z), torch.autograd.grad(expected.sum(), z))


@pytest.mark.parametrize("what", ["empty", "fir", "iir", "mask"])
def test_shapes_that_do_not_fit(what: str) -> None:
    z, weight, bias, poles, residues, skip, fir, iir = arguments()
    mask = None
    if what == "empty":
        z = z[:, :0]
    elif what == "fir":
        fir = fir[:1]
    elif what == "iir":
        iir = iir[:, :1]
    else:
        mask = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    with pytest.raises(InputError):
        filter = ModalFilter(poles, residues, skip)
        hyena(z, weight, bias, filter, HyenaState(fir, iir), mask=mask, backend="triton")
