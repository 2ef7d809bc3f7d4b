"""The long convolution: one function, many ways to evaluate it, one contract.

    long_conv(a ++ b, f)  ==  long_conv(a, f) -> s, then long_conv(b, f, s)        for every method and every split

``METHODS`` says what each way can do; the tests are driven by it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hyaena.errors import InputError, UnsupportedError
from hyaena.ops.long_conv.blocked import long_conv_blocked
from hyaena.ops.long_conv.fft import long_conv_fft
from hyaena.ops.long_conv.filters import ModalFilter, decay_lengths, taps
from hyaena.ops.long_conv.recurrence import long_conv_recurrence
from hyaena.ops.long_conv.reference import long_conv_reference

__all__ = ["METHODS", "Method", "ModalFilter", "decay_lengths", "long_conv", "resolve_method", "taps"]


@dataclass(frozen=True)
class Method:
    """What one way of evaluating the long convolution can do.

    Attributes:
        evaluate: ``(x, filter, state, reset) -> (y, state)`` with every argument given.
        reset: it can forget its state inside a sequence (packed documents).
        gradients: autograd passes through it at a sensible cost.
        cost: per channel.
        memory: per channel, beyond input and output.
        summary: one line for people.
    """

    evaluate: Callable[[Tensor, ModalFilter, Tensor, Tensor | None], tuple[Tensor, Tensor]]
    reset: bool
    gradients: bool
    cost: str
    memory: str
    summary: str


def _reference(x: Tensor, filter: ModalFilter, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    return long_conv_reference(x, filter.poles, filter.residues, filter.skip, state, reset)


def _fft(x: Tensor, filter: ModalFilter, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    return long_conv_fft(x, filter, state)


METHODS: dict[str, Method] = {
    "reference": Method(_reference, True, True, "O(T·N)", "O(T·N)", "float64 step loop, the oracle of the tests"),
    "recurrence": Method(long_conv_recurrence, True, True, "O(T·N)", "O(N)", "step loop; decoding"),
    "fft": Method(_fft, False, True, "O(T log T)", "O(T)", "zero-padded real FFT"),
    "blocked": Method(long_conv_blocked, True, True, "O(T·C)", "O(T)", "Toeplitz products in chunks, a scan between"),
}

SHORT = 16
"""Below this many steps the step loop is cheaper than building a chunk's matrices."""


def resolve_method(method: str, length: int) -> str:
    """The method that ``auto`` stands for at this length; any other name is checked and returned."""
    if method == "auto":
        return "recurrence" if length < SHORT else "blocked"
    if method not in METHODS:
        raise UnsupportedError(f"unknown long_conv method {method!r}: choose auto, {', '.join(METHODS)}")
    return method


def long_conv(
    x: Tensor,
    filter: ModalFilter,
    state: Tensor | None = None,
    *,
    method: str = "auto",
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve x with a long filter, from a state, to a state.

    Equation: ``s[t] = p·s[t-1] + x[t]``, ``y[t] = Re Σ_n R_n s_n[t] + skip·x[t]``, which is
    ``y = h * x`` with ``h[t] = skip·δ[t] + Re Σ_n R_n p_n^t`` when the state begins at zero.

    Args:
        x: real [B,T,D], T >= 1, any floating dtype. Arithmetic runs in the precision of the filter's poles
            (float32 for models), under autocast too.
        filter: the filter; poles and residues complex [D,N], skip real [D] or None.
        state: complex [B,D,N] after the steps that came before x; None for zero.
        method: a key of ``METHODS``, or ``"auto"``.
        reset: bool [B,T]; True forgets everything before that step (the boundary of a packed document).

    Returns:
        y [B,T,D] in the dtype of x, and the state after x, complex [B,D,N].

    Raises:
        InputError: shapes that do not fit.
        UnsupportedError: an unknown method, or one that cannot reset.

    Source: Massaroli et al. 2023, "Laughing Hyena Distillery" (modal filters, recurrent and convolutional modes).
    """
    if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != filter.poles.shape[0]:
        raise InputError(
            f"long_conv takes x of shape [B, T>=1, D={filter.poles.shape[0]}], and was given {tuple(x.shape)}"
        )
    poles = filter.poles
    if state is None:
        state = torch.zeros(x.shape[0], *poles.shape, dtype=poles.dtype, device=x.device)
    elif state.shape != (x.shape[0], *poles.shape):
        raise InputError(f"long_conv's state must be {(x.shape[0], *poles.shape)}, and is {tuple(state.shape)}")
    name = resolve_method(method, x.shape[1])
    chosen = METHODS[name]
    if reset is not None and not chosen.reset:
        raise UnsupportedError(f"long_conv method {name!r} cannot reset inside a sequence: use blocked")
    with torch.autocast(x.device.type, enabled=False):
        y, state = chosen.evaluate(x.to(poles.real.dtype), filter, state, reset)
    return y.to(x.dtype), state.to(poles.dtype).contiguous()  # steps that follow run over it again and again
