"""The Hyena operator: everything between the two projections of a Hyena block."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hyaena.errors import InputError, UnsupportedError
from hyaena.ops import triton
from hyaena.ops.backend import use_triton
from hyaena.ops.long_conv import METHODS, Filter, Method, check_channels, long_conv
from hyaena.ops.short_conv import short_conv
from hyaena.ops.state import RowTensors

FUSED_METHODS: dict[str, Method] = {
    "triton": Method(
        summary="fused GPU kernel, one pass over memory",
        reset=True,
        cost="O(T·N)",
        memory="O(N·T/C)",
    ),
}
"""Methods that evaluate the whole operator in one piece, beside those of ``long_conv`` in ``METHODS``."""


def capabilities(method: str) -> Method:
    """What a method of ``hyena`` can do; ``"auto"`` stands for any exact one.

    Raises:
        UnsupportedError: an unknown method.
    """
    known = METHODS | FUSED_METHODS
    if method != "auto" and method not in known:
        raise UnsupportedError(f"unknown method {method!r}: choose auto, {', '.join(known)}")
    return FUSED_METHODS.get(method) or METHODS["blocked" if method == "auto" else method]


class _Fields(NamedTuple):
    short: Tensor
    long: Tensor


class HyenaState(RowTensors, _Fields):
    """What a Hyena block remembers of the inputs of its two filters.

    Attributes:
        short: [B,3D,K-1], the last inputs of the short filter, oldest first.
        long: [B,D,…], the state of the long filter, of its kind's shape and dtype; see ``long_conv``.
    """

    __slots__ = ()


def hyena(
    z: Tensor,
    short_weight: Tensor,
    short_bias: Tensor | None,
    long_filter: Filter,
    state: HyenaState | None = None,
    *,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    method: str = "auto",
    backend="auto",
) -> tuple[Tensor, HyenaState]:
    """Gate, convolve, gate.

    Equation: ``[x2 | x1 | v] = short_conv(z)``, ``y = long_conv(x1·v)·x2``, products elementwise.

    Args:
        z: [B,T,3D], the biased input projection, as three blocks.
        short_weight: [3D,K].
        short_bias: [3D] or None.
        long_filter: filters of any kind, for D channels; see ``long_conv``.
        state: what came before z; None for nothing.
        mask: bool [B,T], False where a step is padding: it contributes exactly nothing to any state or output.
            It is applied after both biases, the projection's and the short filter's.
        reset: bool [B,T], True where a packed document begins.
        method: a key of ``METHODS``, how the long convolution is evaluated; ``"triton"``, the fused kernel; or
            ``"auto"``, the fused kernel where it can run and the best of ``METHODS`` elsewhere (see ``ops.backend``).

    Returns:
        y [B,T,D] and the state after z.

    Raises:
        InputError: shapes that do not fit.
        UnsupportedError: an unknown method, or one that cannot do what was asked here.

    Source: Poli et al. 2023, "Hyena Hierarchy"; Together 2023, "StripedHyena".
    """
    if z.ndim != 3 or z.shape[-1] % 3:
        raise InputError(f"hyena takes z of shape [B, T, 3D], and was given {tuple(z.shape)}")
    check_channels(long_filter, z.shape[-1] // 3)
    fir, iir = (None, None) if state is None else state
    capabilities(method)
    if use_triton(method, lambda: triton.unsupported_reason(z, short_weight, long_filter, iir, reset), z.device):
        from hyaena.ops.triton.hyena.register import fused_hyena

        y, fir, iir = fused_hyena(z, short_weight, short_bias, long_filter, fir, iir, mask, reset)
        return y, HyenaState(fir, iir)
    if mask is not None:
        z = z * mask.unsqueeze(-1)
    u, fir = short_conv(z, short_weight, short_bias, fir, reset=reset)
    if mask is not None:
        u = u * mask.unsqueeze(-1)
    x2, x1, v = u.chunk(3, dim=-1)
    y, iir = long_conv(x1 * v, long_filter, iir, method=method, reset=reset)
    return y * x2, HyenaState(fir, iir)
