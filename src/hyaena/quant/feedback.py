"""Rounding with feedback: what a number loses is made up for by those that are rounded after it.

With the second moments of a layer's inputs, the mean squared error of an output whose weights w became v is

    E[(Σ_d (v[d] - w[d])·x[d])²] = ‖R·(v - w)‖²,   E[x·xᵀ] = Rᵀ·R,   R upper triangular

Row d of R meets column d and those after it. So from the last column to the first, each row of the sum is made as small
as the numbers that are already chosen permit:

    v[d] nearest to w[d] + Σ_{i>d} R[d,i]/R[d,d]·(w[i] - v[i])

Columns of large inputs are the last ones, and chosen first. Source: Frantar et al. 2022, GPTQ, as Babai's nearest plane
(Chen et al. 2025, The Geometry of LLM Quantization).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hyaena.errors import InputError
from hyaena.ops import cpu
from hyaena.ops.narrow import Narrow, pack
from hyaena.quant.rounding import code_dtype, inverted, limits_of, to_codes
from hyaena.schemes import Scheme

DAMPING = 0.01
"""Added to each square, in means of them: inputs that the text does not tell apart are not played off."""

SEEN = 1e-30
"""The least mean square of inputs that were seen: float32 rounds much smaller products too coarsely to be factored."""

STEP = 64
"""Columns between products with all errors so far."""

ROWS = {"cpu": 1 << 11, "cuda": 1 << 14}
"""Rows that are rounded at a time; memory is that of five blocks of so many rows. A GPU takes as long for few."""


@torch.no_grad()
def feed_back(weight: Tensor, rounded: Narrow, scheme: Scheme, moments: Tensor) -> Narrow:
    """A narrow weight with the scales and minima of another, whose numbers make the error of the output small.

    Args:
        weight: [E,D], of any floating dtype.
        rounded: the weight, rounded to nearest.
        scheme: of it.
        moments: E[x·xᵀ] float32 [N,B,B] in blocks of B columns, D <= N·B < D + N, see ``calibrate.collect_moments`` and
            ``moments.expected_moments``; those of different blocks count as 0.

    Raises:
        InputError: moments that no inputs have: not positive semidefinite, or not finite.
    """
    codes = torch.empty(weight.shape, dtype=code_dtype(scheme), device=weight.device)
    inputs, step = weight.shape[1], ROWS["cuda" if weight.is_cuda else "cpu"]
    group = inputs // rounded.scale.shape[1]
    for first, h in zip(range(0, inputs, moments.shape[1]), moments, strict=True):
        columns = slice(first, min(first + len(h), inputs))
        h = h[: columns.stop - first, : columns.stop - first].to(weight.device, torch.float32)
        order = h.diagonal().argsort(stable=True)
        groups, factor = (order + first) // group, _factor(h[order][:, order])
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            w = _columns(weight[rows, columns], order)
            scale = _columns(rounded.scale[rows], groups)
            minimum = torch.zeros_like(scale) if rounded.minimum is None else _columns(rounded.minimum[rows], groups)
            q = torch.empty_like(w)
            q[order] = _chosen(w, scale, minimum, factor, scheme)
            codes[rows, columns] = q.t().to(codes.dtype)
    return rounded._replace(codes=pack(codes) if scheme.bits == 4 else codes)


def _columns(t: Tensor, places: Tensor) -> Tensor:
    """float32 [B,E] of columns of t [E,...]: rows are copied faster than columns are gathered."""
    return t.float().t().contiguous()[places]


def _factor(h: Tensor) -> Tensor:
    """R[d,i]/R[d,d] of second moments [B,B]."""
    mean = h.diagonal().mean()
    damping = torch.where(mean > SEEN, DAMPING * mean, 1.0)
    damped = h + damping * torch.eye(len(h), dtype=h.dtype, device=h.device)
    factor, failed = torch.linalg.cholesky_ex(damped, upper=True)
    if bool(failed) or not bool(factor.isfinite().all()):
        raise InputError("moments are not those of any inputs: take them from quant.collect_moments of this model")
    return (factor / factor.diagonal().unsqueeze(1)).contiguous()


def _chosen(w: Tensor, scale: Tensor, minimum: Tensor, factor: Tensor, scheme: Scheme) -> Tensor:
    """q float32 [B,E] of w, scales and minima [B,E]."""
    choose = _choose_columns(w.device, scheme)
    inverse, shift = inverted(scale, minimum, scheme)
    wanted = w.mul_(inverse).add_(shift)
    q, error = torch.empty_like(w), torch.zeros_like(w)
    for stop in range(len(w), 0, -STEP):
        step = slice(max(0, stop - STEP), stop)
        later = factor[step, stop:] @ error[stop:]
        choose(wanted[step], inverse[step], scale[step], later, factor[step, step], q[step], error[step])
    return q


def _choose_columns(device: torch.device, scheme: Scheme) -> Callable[..., None]:
    """``choose_columns`` for the scheme: compiled where that is possible."""
    if device.type == "cpu" and cpu.unsupported_reason(torch.float32) is None and not scheme.floating:
        from hyaena.quant import compiled_feedback  # numba takes a second to import

        return functools.partial(compiled_feedback.choose_columns, limits=limits_of(scheme)[:2])
    return functools.partial(choose_columns, scheme=scheme)


def choose_columns(
    wanted: Tensor,
    inverse: Tensor,
    scale: Tensor,
    later: Tensor,
    factor: Tensor,
    q: Tensor,
    error: Tensor,
    *,
    scheme: Scheme,
) -> None:
    """Choose q of S columns of all rows, the last column first, and write them and their errors.

    Args:
        wanted: w/s - m/s + zero, float32 [S,E].
        inverse, scale: 1/s and s.
        later: what the columns behind these have lost, as far as it is made up for here, [S,E].
        factor: of these columns, [S,S].
        q, error: [S,E], written.
        scheme: of the numbers.
    """
    for d in reversed(range(len(wanted))):
        made_up = torch.addmv(later[d], error[d + 1 :].t(), factor[d, d + 1 :])
        q[d] = to_codes(made_up.mul_(inverse[d]).add_(wanted[d]), scheme)
        torch.mul(wanted[d] - q[d], scale[d], out=error[d])
