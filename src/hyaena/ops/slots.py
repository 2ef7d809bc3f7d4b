"""How a cache stores the key or the value of one token and one head: in a slot.

The dtype of the storage says what a slot is. In a floating-point dtype it is the head_dim numbers themselves. In int8
it is q, head_dim numbers in -127…127, and behind them the four bytes of a float32 scale:

    x ≈ scale·q,    scale = max|x|·(1/127),    q = round(x / scale)        |x - scale·q| <= scale / 2

One tensor holds both, so whatever moves slots (rows, pages, files) moves bytes and knows nothing of this.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hyaena.errors import InputError, shown
from hyaena.schemes import CACHE_DTYPES

LARGEST = 127
"""Of q: as many numbers below 0 as above."""
INVERSE = 1 / LARGEST
"""A factor, in float32: a division by 127 is rounded differently by torch on a CPU and on a GPU."""
SCALE_BYTES = 4


class Slots(Protocol):
    """How slots of one dtype are written and read. ``decode(encode(x), x)`` is x, rounded."""

    differentiable: bool
    """Whether autograd may see what is stored."""

    def check(self, head_dim: int) -> None:
        """Raise InputError where heads of so many channels cannot be stored."""
        ...

    def width(self, head_dim: int) -> int:
        """Numbers of a slot."""
        ...

    def head_dim(self, width: int) -> int:
        """Channels of a head that lie in a slot of so many numbers."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """Slots [...,width] of x [...,head_dim]."""
        ...

    def decode(self, stored: Tensor, like: Tensor) -> Tensor:
        """x [...,head_dim], in the dtype of ``like``, of slots [...,width]."""
        ...

    def rounded(self, x: Tensor) -> Tensor:
        """x as it is read back."""
        ...


class FloatSlots:
    """The numbers themselves, in a floating-point dtype."""

    differentiable = True

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def check(self, head_dim: int) -> None:
        pass

    def width(self, head_dim: int) -> int:
        return head_dim

    def head_dim(self, width: int) -> int:
        return width

    def encode(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def decode(self, stored: Tensor, like: Tensor) -> Tensor:
        return stored.to(like)

    def rounded(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).to(x.dtype)


class Int8Slots:
    """8 bits a number, and a scale for each slot. NaN and infinity leave no finite number in a slot."""

    differentiable = False

    def check(self, head_dim: int) -> None:
        if head_dim % SCALE_BYTES:
            raise InputError(
                f"keys and values in int8 take heads of a multiple of {SCALE_BYTES} channels, so that scales are "
                f"aligned, and the model's have {head_dim}: leave the cache in the model's dtype (cache_dtype 'auto')"
            )

    def width(self, head_dim: int) -> int:
        return head_dim + SCALE_BYTES

    def head_dim(self, width: int) -> int:
        return width - SCALE_BYTES

    def encode(self, x: Tensor) -> Tensor:
        x = x.detach().float()
        scale = x.abs().amax(-1, keepdim=True) * INVERSE
        # the largest number may be a little more than 127 scales, and a scale of 0 is that of zeros
        q = (x / scale.where(scale != 0, 1)).round_().clamp_(-LARGEST, LARGEST)
        return torch.cat([q.to(torch.int8), scale.view(torch.int8)], dim=-1)

    def decode(self, stored: Tensor, like: Tensor) -> Tensor:
        channels = self.head_dim(stored.shape[-1])
        q, scale = stored[..., :channels], stored[..., channels:].view(torch.float32)
        if like.dtype == torch.float64:
            return q * scale.double()
        return torch.mul(q, scale, out=torch.empty(q.shape, dtype=like.dtype, device=q.device))  # rounded once

    def rounded(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x), x)


_FLOATS = {dtype: FloatSlots(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
_SLOTS: dict[torch.dtype, Slots] = {**_FLOATS, torch.int8: Int8Slots()}


def slots_of(dtype: torch.dtype) -> Slots:
    """How slots of a dtype are written and read."""
    return _SLOTS[dtype]


def as_cache_dtype(value: object) -> torch.dtype | None:
    """Convert a name or a dtype to the dtype of keys and values; None for ``"auto"``, the model's own.

    Raises:
        InputError: keys and values are not stored in it.
    """
    if value is None or value == "auto":
        return None
    dtype = getattr(torch, value) if isinstance(value, str) and value in CACHE_DTYPES else value
    if not isinstance(dtype, torch.dtype) or dtype not in _SLOTS:
        names = ", ".join(("auto", *CACHE_DTYPES))
        raise InputError(f"keys and values are not stored in {shown(value)}: choose a cache dtype among {names}")
    return dtype
