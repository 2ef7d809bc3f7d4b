"""The arguments and the gradients of the operator with explicit taps."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of z, weight, bias, taps, skip, short and long."""


class Operands(NamedTuple):
    """The arguments of the operator with explicit taps.

    Attributes:
        z: [B,T,3D], bfloat16, float16 or float32.
        weight, bias: of the short filter, [3D,K] and [3D] or None.
        taps: of the long filter, [F,W], F divides D.
        skip: [D] or None.
        short, long: the states before z, [B,3D,K-1] and float32 [B,D,W-1]; None for zeros.
        mask: bool [B,T], False where a step is padding; None for no padding.
        reset: bool [B,T], True where a packed document begins; None for none.
    """

    z: Tensor
    weight: Tensor
    bias: Tensor | None
    taps: Tensor
    skip: Tensor | None
    short: Tensor | None
    long: Tensor | None
    mask: Tensor | None
    reset: Tensor | None

    def contiguous(self) -> Operands:
        """The same operands, each contiguous in memory."""
        return Operands(*(None if t is None else t.contiguous() for t in self))  # type: ignore[arg-type]


def rows_of(short: Tensor | None, z: Tensor) -> Tensor | None:
    """The state of the short filter as steps of z, [B,K-1,3D]."""
    return None if short is None else short.to(z.dtype).transpose(1, 2).contiguous()
