"""The kernels as operators of torch: autograd, torch.compile, torch's own checks, and what is kept for the backward."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from device import DEVICE
from hyaena.errors import InputError, UnsupportedError
from hyaena.ops import ExplicitFilter, HyenaState, ModalFilter, RealModalFilter, hyena
from hyaena.ops.triton import unsupported_reason
from hyaena.ops.triton.hyena import launch
from hyaena.ops.triton.hyena.register import explicit_operator, hyena_operator

FUSED, BLOCKED = {"backend": "triton"}, {"method": "blocked"}


def arguments(length: int = 4, channels: int = 3) -> list[Tensor]:
    poles = torch.polar(torch.rand(channels, 2) * 0.9, torch.rand(channels, 2) * 3)
    residues = torch.randn(channels, 2, dtype=torch.complex64)
    short, long = torch.randn(2, 3 * channels, 2), torch.randn(2, channels, 2, dtype=torch.complex64)
    z, weight, bias = torch.randn(2, length, 3 * channels), torch.randn(3 * channels, 3), torch.randn(3 * channels)
    return [t.to(DEVICE) for t in (z, weight, bias, poles, residues, torch.randn(channels), short, long)]


def loss(method: dict[str, str], z, weight, bias, poles, residues, skip, short, long, reset=None) -> Tensor:
    state = HyenaState(short, long)
    y, state = hyena(z, weight, bias, ModalFilter(poles, residues, skip), state, reset=reset, **method)
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


@pytest.mark.parametrize("steps", [[0], [3], [1, 2]])
def test_autograd_of_packed_documents(steps: list[int]) -> None:
    inputs = arguments(5)
    reset = torch.zeros(2, 5, dtype=torch.bool, device=DEVICE)
    reset[0, steps] = True
    function = partial(loss, reset=reset)
    agree(gradients(FUSED, inputs, function), gradients(BLOCKED, inputs, function))


def test_one_step_that_begins_a_document() -> None:
    inputs = arguments(1)
    function = partial(loss, reset=torch.tensor([[True], [False]], device=DEVICE))
    agree(gradients(FUSED, inputs, function), gradients(BLOCKED, inputs, function))


def test_compiles_to_one_graph() -> None:
    inputs = arguments()
    function = partial(loss, reset=torch.tensor([[False, False, True, False]] * 2, device=DEVICE))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    agree(gradients(FUSED, inputs, compiled), gradients(BLOCKED, inputs, function))


def pairs(inputs: list[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(t).contiguous() if t.is_complex() else t for t in inputs]


def test_torch_accepts_the_operators() -> None:
    inputs = [t.requires_grad_() for t in pairs(arguments(length=2))]
    torch.library.opcheck(hyena_operator, (*inputs, None, None))


def test_torch_accepts_what_may_be_left_out() -> None:
    z, weight, _, poles, residues, *_ = pairs(arguments())
    mask = torch.tensor([[False, True, True, True]] * 2, device=DEVICE)
    given = (z, weight, None, poles, residues, None, None, None, mask, mask)
    torch.library.opcheck(hyena_operator, given, test_utils=("test_schema", "test_faketensor"))


def test_nothing_but_the_inputs_is_kept_for_the_backward() -> None:
    inputs = [t.requires_grad_() for t in arguments(length=40)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        z, weight, bias, poles, residues, skip, short, long = inputs
        hyena(z, weight, bias, ModalFilter(poles, residues, skip), HyenaState(short, long), backend="triton")
    known = {t.untyped_storage().data_ptr() for t in inputs}
    assert kept and all(t.untyped_storage().data_ptr() in known for t in kept)


def test_gradients_of_frozen_filters_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    kernels = launch.backward

    def backward(*args: Any, parameters: bool) -> launch.Gradients:
        given.append(parameters)
        return kernels(*args, parameters=parameters)

    monkeypatch.setattr(launch, "backward", backward)
    inputs = arguments(length=5)
    leaves = [inputs[i].requires_grad_() for i in (0, 6, 7)]  # z and both states
    agree(torch.autograd.grad(loss(FUSED, *inputs), leaves), torch.autograd.grad(loss(BLOCKED, *inputs), leaves))
    one = inputs[5].requires_grad_()
    agree(torch.autograd.grad(loss(FUSED, *inputs), (one,)), torch.autograd.grad(loss(BLOCKED, *inputs), (one,)))
    assert given == [False, True]


@pytest.mark.parametrize("what", ["empty", "short", "long", "mask", "reset"])
def test_shapes_that_do_not_fit(what: str) -> None:
    z, weight, bias, poles, residues, skip, short, long = arguments()
    mask = reset = None
    if what == "empty":
        z = z[:, :0]
    elif what == "short":
        short = short[:1]
    elif what == "long":
        long = long[:, :1]
    elif what == "mask":
        mask = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    else:
        reset = torch.ones(1, 4, dtype=torch.bool, device=DEVICE)
    with pytest.raises(InputError):
        filter = ModalFilter(poles, residues, skip)
        hyena(z, weight, bias, filter, HyenaState(short, long), mask=mask, reset=reset, backend="triton")


def of_taps(taps: Tensor, other: Tensor, skip: Tensor) -> ExplicitFilter:
    return ExplicitFilter(taps, skip)


def other_kinds(length: int) -> dict[str, tuple[Any, list[Tensor]]]:
    """How a filter of each other kind is made of two tensors and a skip, and all inputs: z … states."""
    out: dict[str, tuple[Any, list[Tensor]]] = {}
    for name, make, channels, size, other, state in (
        ("few taps", of_taps, 6, (3, 7), (1,), (2, 6, 6)),
        ("taps", of_taps, 16, (2, 12), (1,), (2, 16, 11)),
        ("real modes", RealModalFilter, 3, (3, 4), (3, 4), (2, 3, 4)),
        ("an odd number of real modes", RealModalFilter, 3, (3, 3), (3, 3), (2, 3, 3)),
    ):
        numbers = torch.randn(size) / size[1] if make is of_taps else -torch.rand(size)
        z, weight, bias = torch.randn(2, length, 3 * channels), torch.randn(3 * channels, 3), torch.randn(3 * channels)
        inputs = [z, weight, bias, numbers, torch.randn(other), torch.randn(channels)]
        inputs += [torch.randn(2, 3 * channels, 2), torch.randn(state)]
        out[name] = (make, [t.to(DEVICE) for t in inputs])
    return out


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("kind", other_kinds(1))
@pytest.mark.parametrize("compiled", [False, True])
def test_autograd_of_other_kinds(kind: str, length: int, compiled: bool) -> None:
    make, inputs = other_kinds(length)[kind]
    reset = torch.zeros(2, length, dtype=torch.bool, device=DEVICE)
    reset[0, length // 2] = True

    def loss(options: dict[str, str], z, weight, bias, numbers, other, skip, short, long) -> Tensor:
        filter = make(numbers, other, skip)
        y, state = hyena(z, weight, bias, filter, HyenaState(short, long), reset=reset, **options)
        return y.sin().sum() + state.short.sin().sum() + state.long.sin().sum() + 0 * other.sum()

    fused = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    agree(gradients(FUSED, inputs, fused), gradients({"backend": "plain"}, inputs, loss))


def test_torch_accepts_the_operators_of_taps() -> None:
    _, inputs = other_kinds(2)["few taps"]
    z, weight, bias, taps, _, skip, short, long = (t.requires_grad_() for t in inputs)
    torch.library.opcheck(explicit_operator, (z, weight, bias, taps, skip, short, long, None, None))


class OtherFilter:
    """A filter of a kind that the kernels have never met."""


def test_filters_that_the_kernels_do_not_take_have_a_reason() -> None:
    z, weight, _, poles, residues, skip, _, _ = arguments()
    assert unsupported_reason(z, weight, ModalFilter(poles, residues, skip), None, None) is None
    for foreign, message in (
        (OtherFilter(), "filters of modes and of taps, not a OtherFilter"),
        (ModalFilter(poles.real, residues.real), "complex64 poles"),
        (RealModalFilter(poles.real.double(), residues.real), "float32 poles"),
        (ExplicitFilter(torch.ones(3, 300)), "1 to 128 taps, not 300"),
        (ExplicitFilter(torch.ones(3, 9)), "groups of at least 8, not 1"),
        (ExplicitFilter(torch.ones(3, 4, dtype=torch.float64)), "not torch.float64"),
        (ModalFilter(poles[:1], residues[:1]), "not 1 filters for 3 channels"),
        (ModalFilter(poles.to(torch.complex128), residues.to(torch.complex128)), "complex64"),
    ):
        assert message in str(unsupported_reason(z, weight, foreign, None, None))
    with pytest.raises(UnsupportedError, match="complex64"):
        hyena(z, weight, None, ModalFilter(poles.to(torch.complex128), residues), backend="triton")
