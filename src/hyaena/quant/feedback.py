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

import torch
from torch import Tensor

from hyaena.errors import InputError
from hyaena.ops.narrow import Narrow, pack
from hyaena.quant.rounding import code_dtype, nearest
from hyaena.schemes import Scheme

DAMPING = 0.01
"""Added to each square, in means of them: inputs that the text does not tell apart are not played off."""

SEEN = 1e-30
"""The least mean square of inputs that were seen: float32 rounds much smaller products too coarsely to be factored."""

STEP = 64
"""Columns between products with all errors so far."""


@torch.no_grad()
def feed_back(weight: Tensor, rounded: Narrow, scheme: Scheme, moments: Tensor) -> Narrow:
    """A narrow weight with the scales and minima of another, whose numbers make the error of the output small.

    Args:
        weight: [E,D], of any floating dtype.
        rounded: the weight, rounded to nearest.
        scheme: of it.
        moments: E[x·xᵀ] float32 [N,B,B] in blocks of B columns, see ``calibrate.collect_moments``; those of different
            blocks count as 0.

    Raises:
        InputError: moments that no inputs have: not positive semidefinite, or not finite.
    """
    codes = torch.empty(weight.shape, dtype=code_dtype(scheme), device=weight.device)
    group = weight.shape[1] // rounded.scale.shape[1]
    moments = moments.to(weight.device, torch.float32)
    for block, h in enumerate(moments):
        order = h.diagonal().argsort(stable=True)
        columns = order + block * len(h)
        w = weight[:, columns].float().t().contiguous()
        s = rounded.scale[:, columns // group].float().t().contiguous()
        m = torch.zeros_like(s) if rounded.minimum is None else rounded.minimum[:, columns // group].float().t()
        q = _chosen(w, s, m.contiguous(), _factor(h[order][:, order]), scheme, rounded.zero)
        codes[:, columns] = q.t().to(codes.dtype)
    return rounded._replace(codes=pack(codes) if scheme.bits == 4 else codes)


def _factor(h: Tensor) -> Tensor:
    """R[d,i]/R[d,d] of second moments [B,B]."""
    mean = h.diagonal().mean()
    damping = torch.where(mean > SEEN, DAMPING * mean, 1.0)
    factor, failed = torch.linalg.cholesky_ex(h + damping * torch.eye(len(h), device=h.device), upper=True)
    if bool(failed) or not bool(factor.isfinite().all()):
        raise InputError("moments are not those of any inputs: take them from quant.collect_moments of this model")
    return factor / factor.diagonal().unsqueeze(1)


def _chosen(w: Tensor, scale: Tensor, minimum: Tensor, factor: Tensor, scheme: Scheme, zero: int) -> Tensor:
    """q float32 [B,E] of w, scales and minima [B,E]."""
    q, error = torch.empty_like(w), torch.zeros_like(w)
    for stop in range(len(w), 0, -STEP):
        start = max(0, stop - STEP)
        target = w[start:stop] + factor[start:stop, stop:] @ error[stop:]
        for d in reversed(range(start, stop)):
            wanted = target[d - start] + factor[d, d + 1 : stop] @ error[d + 1 : stop]
            q[d] = nearest(wanted, scale[d], minimum[d], scheme)
            error[d] = w[d] - ((q[d] - zero) * scale[d] + minimum[d])
    return q
