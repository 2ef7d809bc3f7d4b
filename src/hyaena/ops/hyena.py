"""The Hyena operator: everything between the two projections of a Hyena block."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hyaena.errors import InputError
from hyaena.ops.long_conv import ModalFilter, long_conv
from hyaena.ops.short_conv import short_conv


class HyenaState(NamedTuple):
    """What a Hyena block remembers of the inputs of its two filters.

    Attributes:
        fir: [B,3D,K-1], the last inputs of the short filter, oldest first.
        iir: complex [B,D,N], the state of every mode of the long filter; or, when that is evaluated truncated to W
            taps, the window of its last inputs, real [B,D,W-1], oldest first.
    """

    fir: Tensor
    iir: Tensor


def hyena(
    z: Tensor,
    short_weight: Tensor,
    short_bias: Tensor | None,
    long_filter: ModalFilter,
    state: HyenaState | None = None,
    *,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    method: str = "auto",
) -> tuple[Tensor, HyenaState]:
    """Gate, convolve, gate.

    Equation: ``[x2 | x1 | v] = short_conv(z)``, ``y = long_conv(x1·v)·x2``, products elementwise.

    Args:
        z: [B,T,3D], the biased input projection, as three blocks.
        short_weight: [3D,K].
        short_bias: [3D] or None.
        long_filter: D channels of modes.
        state: what came before z; None for nothing.
        mask: bool [B,T], False where a step is padding: it contributes exactly nothing to any state or output.
            It is applied after both biases, the projection's and the short filter's.
        reset: bool [B,T], True where a packed document begins.
        method: how the long convolution is evaluated.

    Returns:
        y [B,T,D] and the state after z.

    Source: Poli et al. 2023, "Hyena Hierarchy"; Together 2023, "StripedHyena".
    """
    channels = long_filter.poles.shape[0]
    if z.shape[-1] != 3 * channels:
        raise InputError(f"hyena takes z of shape [B, T, 3D={3 * channels}], and was given {tuple(z.shape)}")
    if mask is not None:
        z = z * mask.unsqueeze(-1)
    fir, iir = (None, None) if state is None else state
    u, fir = short_conv(z, short_weight, short_bias, fir, reset=reset)
    if mask is not None:
        u = u * mask.unsqueeze(-1)
    x2, x1, v = u.chunk(3, dim=-1)
    y, iir = long_conv(x1 * v, long_filter, iir, method=method, reset=reset)
    return y * x2, HyenaState(fir, iir)
