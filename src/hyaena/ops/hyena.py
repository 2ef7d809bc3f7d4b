"""The Hyena operator: everything between the two projections of a Hyena block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from hyaena.errors import InputError, UnsupportedError
from hyaena.ops.backend import Backend, use_fused_hyena, wants_gradients
from hyaena.ops.long_conv import (
    METHODS,
    Filter,
    Method,
    ModalFilter,
    Stop,
    check_channels,
    long_conv,
    long_conv_states,
    long_conv_with_states,
)
from hyaena.ops.long_conv.explicit import window_at
from hyaena.ops.short_conv import short_conv
from hyaena.ops.state import RowTensors


def capabilities(method: str) -> Method:
    """Return the capabilities of a method; for ``"auto"``, those of an exact one.

    Raises:
        UnsupportedError: an unknown method.
    """
    if method != "auto" and method not in METHODS:
        raise UnsupportedError(f"unknown method {method!r}: choose auto, {', '.join(METHODS)}")
    return METHODS["blocked" if method == "auto" else method]


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


LONGEST_PACKED = 32_768
"""Tokens of a row that one thread walks through; the kernel of prefills divides longer ones."""


class RowTables(NamedTuple):
    """Which tokens of a packed pass are whose, int32 on the device.

    Attributes:
        begins, counts: [R], the first place of each row, and its tokens.
        stop_begins: [R+1], where the stops of each row begin and end.
        stops: [S], numbers of tokens after which the state of a row is copied, rising in each row.
    """

    begins: Tensor
    counts: Tensor
    stop_begins: Tensor
    stops: Tensor


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
    backend: Backend | str = "auto",
) -> tuple[Tensor, HyenaState]:
    """Gate, convolve, gate.

    Equation: ``[x2 | x1 | v] = short_conv(z)``, ``y = long_conv(x1·v)·x2``, products elementwise.

    Args:
        z: [B,T,3D], the biased input projection, as three blocks.
        short_weight: [3D,K].
        short_bias: [3D] or None.
        long_filter: filters of any kind, for D channels; see ``long_conv``.
        state: the state that the steps before z left; None for nothing.
        mask: bool [B,T], False where a step is padding: it contributes exactly nothing to any state or output.
            It is applied after both biases, the projection's and the short filter's.
        reset: bool [B,T], True where a packed document begins.
        method: how plain torch evaluates the long convolution, a method of the filter; ``"auto"`` leaves it open.
        backend: ``"auto"``, ``"triton"`` (the fused kernel) or ``"plain"``, or what ``resolve_backend`` returned. The
            kernel runs with ``method="auto"`` only.

    Returns:
        y [B,T,D] and the state after z.

    Raises:
        InputError: shapes that do not fit, or ``backend="triton"`` together with a method.
        UnsupportedError: a method that the kind of filter does not have, or arguments that the kernels do not take
            where they were chosen by name.

    Source: Poli et al. 2023, "Hyena Hierarchy"; Together 2023, "StripedHyena".
    """
    if z.ndim != 3 or z.shape[1] == 0 or z.shape[-1] % 3:
        raise InputError(f"hyena takes z of shape [B, T>=1, 3D], and was given {tuple(z.shape)}")
    check_channels(long_filter, z.shape[-1] // 3)
    short, long = (None, None) if state is None else state
    if use_fused_hyena(backend, method, z, short_weight, long_filter, long, reset):
        from hyaena.ops.triton.hyena.register import fused_hyena

        y, short, long = fused_hyena(z, short_weight, short_bias, long_filter, short, long, mask, reset)
        return y, HyenaState(short, long)
    if mask is not None:
        z = z * mask.unsqueeze(-1)
    u, short = short_conv(z, short_weight, short_bias, short, reset=reset)
    if mask is not None:
        u = u * mask.unsqueeze(-1)
    x2, x1, v = u.chunk(3, dim=-1)
    y, long = long_conv(x1 * v, long_filter, long, method=method, reset=reset)
    return y * x2, HyenaState(short, long)


def hyena_states(
    z: Tensor,
    short_weight: Tensor,
    short_bias: Tensor | None,
    long_filter: Filter,
    state: HyenaState | None,
    stops: Sequence[Stop],
    *,
    mask: Tensor | None = None,
    method: str = "auto",
    backend: Backend | str = "auto",
) -> tuple[Tensor, HyenaState, list[HyenaState]]:
    """``hyena``, and the states that the first steps of z leave.

    Args:
        z, short_weight, short_bias, long_filter, state, mask, method, backend: see ``hyena``.
        stops: see ``long_conv_states``.

    Returns:
        y [B,T,D] and the state after z, as of ``hyena``, and the state after each stop.
    """
    check_channels(long_filter, z.shape[-1] // 3)
    short, long = (None, None) if state is None else state
    fused = use_fused_hyena(backend, method, z, short_weight, long_filter, long, None)
    shown = z if mask is None else z * mask.unsqueeze(-1)
    u, after = short_conv(shown, short_weight, short_bias, short)
    if mask is not None:
        u = u * mask.unsqueeze(-1)
    x2, x1, v = u.chunk(3, dim=-1)
    if fused:
        y, last = hyena(z, short_weight, short_bias, long_filter, state, mask=mask, method=method, backend=backend)
        longs = long_conv_states(x1 * v, long_filter, long, stops)
    else:
        y, newest, longs = long_conv_with_states(x1 * v, long_filter, long, stops, method=method)
        y, last = y * x2, HyenaState(after, newest)
    window = after.shape[-1]
    before = torch.zeros_like(after) if short is None else short
    past = torch.cat([before, shown.transpose(1, 2).to(after.dtype)], dim=-1)  # [B,3D,K-1+T]
    return (
        y,
        last,
        [HyenaState(window_at(past, n, window).contiguous(), one) for n, one in zip(stops, longs, strict=True)],
    )


def packs_in_one_kernel(
    z: Tensor, short_weight: Tensor, long_filter: Filter, state: HyenaState | None, longest: int, backend: Backend
) -> bool:
    """Whether ``hyena_packed`` evaluates a pass: in inference, over complex modes, if its longest row is not too long.

    Args:
        z, short_weight, long_filter, state: see ``hyena``.
        longest: tokens of the longest row.
        backend: of the pass.
    """
    return (
        state is not None
        and isinstance(long_filter, ModalFilter)
        and longest <= LONGEST_PACKED
        and state.short.dtype == z.dtype
        and not wants_gradients(z, short_weight)
        and use_fused_hyena(backend, "auto", z, short_weight, long_filter, state.long, None)
    )


def hyena_packed(
    z: Tensor,
    short_weight: Tensor,
    short_bias: Tensor | None,
    long_filter: Filter,
    state: HyenaState,
    rows: RowTables,
    stops: int,
) -> tuple[Tensor, HyenaState, HyenaState | None]:
    """``hyena`` of several rows in one pass without padding, in one kernel; see ``packs_in_one_kernel``.

    Args:
        z: [1,T,3D], the tokens of R rows, one row after another.
        short_weight, short_bias, long_filter: see ``hyena``.
        state: of R rows.
        rows: which tokens are whose.
        stops: how many stops they name.

    Returns:
        y [1,T,D], the state of R rows after their tokens, and the states at the stops, or None without any.
    """
    from hyaena.ops.triton.decode.packed_hyena import packed_hyena

    after = HyenaState(*(t.clone(memory_format=torch.contiguous_format) for t in state.tensors()))
    copies = after.blank(stops) if stops else None
    y = packed_hyena(z[0].contiguous(), short_weight, short_bias, cast("ModalFilter", long_filter), after, rows, copies)
    return y.unsqueeze(0), after, copies
