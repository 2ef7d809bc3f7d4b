"""A weight matrix -> the nearest narrow one: round to nearest, with scales that are searched for.

For every group of numbers w the scale s (and the minimum m) are those of some candidates with the smallest error

    Σ_d h[d]·(s·(q[d] - zero) + m - w[d])²,   q = clamp(round((w - m)/s + zero))

with h = 1, or the second moments of the layer's inputs: what an error in column d does to the output is in proportion
to the size of input d (the diagonal of the Hessian of the layer's squared error; LeCun et al. 1990; Frantar et al.
2022, GPTQ). Candidates are the range of the group made narrower and wider in steps; then, from the best one, the least
squares fit of s and m to the numbers q that it gives, a few times. Scales are rounded to the dtype that they are stored
in before q is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hyaena.errors import InputError
from hyaena.ops import cpu
from hyaena.ops.fp8 import E4M3, FP8_LARGEST
from hyaena.ops.narrow import Narrow, pack
from hyaena.schemes import Scheme

SHARES = {8: tuple(1 + step / 400 for step in range(-8, 9)), 4: (1.0, 0.8, 0.85, 0.9, 0.95, 1.05)}
"""By bits: shares of a group's range that are tried. In 8 bits none is better by itself, but the error of each is
another. Of e4m3 numbers the whole range alone: they lie densest near 0.
"""

FITS = 3
"""Least squares fits after that."""

_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Numbers that are rounded at a time: on a processor as many as its cache holds."""


@torch.no_grad()
def round_weight(weight: Tensor, scheme: Scheme, moments: Tensor | None = None) -> Narrow:
    """The narrow weight nearest to a weight [E,D], on its device.

    Args:
        weight: of any floating dtype, finite.
        scheme: its groups divide D.
        moments: h, float32 [D], none negative; all 1 unless given.

    Raises:
        InputError: a number is too large for a scale of the scheme; or moments of other inputs.
    """
    if moments is not None and moments.shape != weight.shape[1:]:
        raise InputError(f"moments {list(moments.shape)} are not those of {weight.shape[1]} inputs: give one for each")
    groups = scheme.groups(weight.shape[1])
    dtype = torch.float32 if scheme.scale_bytes == 4 else torch.float16
    h = None if moments is None else _importance(moments.to(weight.device, torch.float32))
    if weight.device.type == "cpu" and cpu.unsupported_reason(weight.dtype) is None and not scheme.floating:
        from hyaena.quant.compiled import round_all  # numba takes a second to import

        search = SHARES[scheme.bits], FITS
        codes, scale, minimum = round_all(weight, h, groups, dtype, limits_of(scheme), search, minima=scheme.minima)
    else:
        codes, scale, minimum = _round_tiles(weight, scheme, dtype, h)
    if not bool(scale.isfinite().all() and minimum.isfinite().all()):
        raise InputError(f"a weight is too large for the float16 scales of {scheme.name}: choose int8")
    return Narrow(pack(codes) if scheme.bits == 4 else codes, scale, minimum if scheme.minima else None)


def code_dtype(scheme: Scheme) -> torch.dtype:
    """Of the stored numbers."""
    return E4M3 if scheme.floating else torch.int8 if scheme.bits == 8 else torch.uint8


def _round_tiles(weight: Tensor, scheme: Scheme, dtype: torch.dtype, h: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [E,D], a byte each, scales and minima [E,G] of a weight [E,D], some rows at a time."""
    outputs, inputs = weight.shape
    groups = scheme.groups(inputs)
    if h is not None:
        h = h.unflatten(0, (groups, -1)).t().unsqueeze(1)
    parts = []
    step = max(1, _NUMBERS["cuda" if weight.is_cuda else "cpu"] // inputs)
    for start in range(0, outputs, step):
        tile = weight[start : start + step].float().unflatten(-1, (groups, -1))
        q, scale, minimum = _round_groups(tile.permute(2, 0, 1).contiguous(), scheme, dtype, h)
        parts.append((q.to(code_dtype(scheme)).permute(1, 2, 0), scale, minimum))
    codes, scale, minimum = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes.flatten(-2), scale, minimum


def _importance(moments: Tensor) -> Tensor:
    """h [D] of second moments [D]; an input that was never seen counts a little."""
    mean = moments.mean()
    return moments + torch.where(mean > 0, 1e-3 * mean, 1.0)


def _round_groups(w: Tensor, scheme: Scheme, dtype: torch.dtype, h: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers q float32 [group,E,G], scales and minima [E,G], of w [group,E,G]."""
    zero = limits_of(scheme)[2]
    best: list[Tensor] = []

    def attempt(scale: Tensor, minimum: Tensor) -> None:
        scale, minimum = scale.to(dtype), minimum.to(dtype)
        s, m = scale.float(), minimum.float()
        q = nearest(w, s, m, scheme)
        error = (q * s).add_(m - zero * s).sub_(w).square_()
        error = (error if h is None else error.mul_(h)).sum(0)
        found = [q, scale, minimum, error]
        if best:
            found = [torch.where(error < best[3], new, old) for new, old in zip(found, best, strict=True)]
        best[:] = found

    for scale, minimum in _ranges(w, scheme):
        attempt(scale, minimum)
    for _ in range(FITS):
        attempt(*_fit(w, best[0] - zero, h, minima=scheme.minima))
    return best[0], best[1], best[2]


def nearest(w: Tensor, scale: Tensor, minimum: Tensor, scheme: Scheme) -> Tensor:
    """q, float32, of w for scales and minima, which broadcast; that of 0 where the scale is 0."""
    inverse, shift = inverted(scale, minimum, scheme)
    return to_codes((w * inverse).add_(shift), scheme)


def inverted(scale: Tensor, minimum: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """a and b of ``q = a·w + b`` before it is rounded."""
    inverse = torch.where(scale != 0, 1 / scale, 0.0)
    return inverse, limits_of(scheme)[2] - minimum * inverse


def to_codes(q: Tensor, scheme: Scheme) -> Tensor:
    """q to the nearest number that there is, in place where they are integers."""
    q = q.clamp_(*limits_of(scheme)[:2])
    return q.to(E4M3).float() if scheme.floating else q.round_()


def limits_of(scheme: Scheme) -> tuple[int, int, int]:
    """The least and the largest q, and the q of weight 0 where there is no minimum."""
    if scheme.floating:
        return -int(FP8_LARGEST), int(FP8_LARGEST), 0
    if scheme.bits == 8:
        return -127, 127, 0
    return 0, 15, 0 if scheme.minima else 8


def _ranges(w: Tensor, scheme: Scheme) -> Iterator[tuple[Tensor, Tensor]]:
    """The scales and minima [E,G] of shares of the range of each group."""
    high, zero = limits_of(scheme)[1:]
    least, most = torch.aminmax(w, dim=0)
    none = torch.zeros_like(most)
    for share in (1.0,) if scheme.floating else SHARES[scheme.bits]:
        if scheme.minima:
            scale = (most - least) * (share / high)
            yield scale, (most + least) / 2 - scale * (high / 2)
        elif scheme.bits == 8:
            yield torch.maximum(most, -least) * (share / high), none
        else:  # q reaches further below zero than above it: the larger end may lie on either side
            end = torch.where(most > -least, most, least)
            yield end * (share / -zero), none
            yield end * (share / (high - zero)), none


def _fit(w: Tensor, q: Tensor, h: Tensor | None, *, minima: bool) -> tuple[Tensor, Tensor]:
    """The s and m [E,G] with the least ``Σ h·(s·q + m - w)²``; 0 where they are not determined."""
    hq = q if h is None else h * q
    sum_qq, sum_qw = (hq * q).sum(0), (hq * w).sum(0)
    if not minima:
        return torch.where(sum_qq > 0, sum_qw / sum_qq, 0.0), torch.zeros_like(sum_qq)
    total = len(w) if h is None else h.sum(0)
    sum_q, sum_w = hq.sum(0), (w if h is None else h * w).sum(0)
    determinant = total * sum_qq - sum_q * sum_q
    scale = torch.where(determinant > 0, (total * sum_qw - sum_q * sum_w) / determinant, 0.0)
    return scale, (sum_w - scale * sum_q) / total
