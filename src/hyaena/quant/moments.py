"""Second moments of a layer's inputs: in which blocks they are kept, and what the weights themselves tell of them.

A weight that was trained is a sum of products of gradients and inputs, w ← w - η·g·xᵀ. So its rows lie in the
directions in which its inputs are large, and wᵀ·w is an estimate of the inputs' E[x·xᵀ] that needs no text. It is a
rough one, and is shrunk towards inputs that have nothing in common:

    E[x·xᵀ] ≈ (wᵀ·w/mean + 2·1)/3,   mean = that of the diagonal of wᵀ·w
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 2048
"""Inputs of a layer whose products with each other in a text are kept, at most: 8 GB for the 7B."""

ESTIMATED = 512
"""Inputs whose products are estimated from a weight alone, at most: time goes by this number, and a rough estimate is
worth little of it.
"""

ROWS = 2048
"""Rows of a weight that are float32 at a time."""

SHRINKAGE = 2 / 3
"""The share of inputs that have nothing in common."""


def blocks_of(inputs: int, most: int | None = None) -> tuple[int, int]:
    """Blocks N of B neighbouring inputs each, D <= N·B < D + N, B <= ``most`` or 2,048; what is beyond D are zeros."""
    count = -(-inputs // (most or BLOCK))
    return count, -(-inputs // count)


def in_blocks(x: Tensor, most: int | None = None) -> Tensor:
    """Rows [T,D] -> [N,T,B]."""
    count, size = blocks_of(x.shape[-1], most)
    x = torch.nn.functional.pad(x, (0, count * size - x.shape[-1]))
    return x.unflatten(-1, (count, size)).transpose(0, 1)


@torch.no_grad()
def expected_moments(weight: Tensor, most: int | None = None) -> Tensor:
    """What a finite weight [E,D] tells of its inputs, of mean square 1 in each of ``blocks_of``: float32 [N,B,B]."""
    lowest, highest = weight.aminmax()
    largest = torch.maximum(highest, -lowest).float().clamp(min=torch.finfo(torch.float32).tiny)
    count, size = blocks_of(weight.shape[1], most)
    products = torch.zeros(count, size, size, dtype=torch.float32, device=weight.device)
    for part in weight.split(ROWS):
        rows = in_blocks(part.float() / largest, most)  # no square overflows
        products.baddbmm_(rows.mT, rows)
    mean = products.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    known = torch.where(mean > 0, products / mean, 0.0)
    identity = torch.eye(size, dtype=torch.float32, device=weight.device)
    return torch.where(mean > 0, (1 - SHRINKAGE) * known + SHRINKAGE * identity, identity)
