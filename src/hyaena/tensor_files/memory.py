"""Memory for the numbers of a model: on large pages, where the system gives them to those that ask.

Decoding on a CPU reads all weights for every token. In pages of 4 KiB the processor also looks up where each of a
million pages lies. Linux has pages of 2 MiB, on many systems only for memory whose owner asks (``madvise``).
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = 1 << 21
"""Bytes of a large page on most processors; less memory than one page is never large."""
BLOCK = 1 << 25
"""Bytes of memory that small tensors of a model share; what they leave is not touched, but for the rest of a page."""
_LINE = 64
"""Bytes of a cache line, where a tensor begins."""


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU whose numbers are still to be written, and whose storage has no more bytes than they.

    Where there are large pages it begins with one, and asks that all of its whole pages be large. What remains lies on
    small ones, so that nothing is wasted.
    """
    found = _large(shape, dtype)
    return torch.empty(shape, dtype=dtype, device="cpu") if found is None else found


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As ``empty``, but zero; what is not written takes no memory yet."""
    found = _large(shape, dtype)
    return torch.zeros(shape, dtype=dtype, device="cpu") if found is None else found


def _large(shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """Zeros, as the system gives memory; None where large pages do not serve."""
    size = math.prod(shape) * dtype.itemsize
    found = _mapped(size, size // PAGE * PAGE) if size >= PAGE else None
    if found is None:
        return None
    mapping, start = found
    return torch.frombuffer(mapping, dtype=torch.uint8, count=size, offset=start).view(dtype).view(tuple(shape))


def _mapped(size: int, large: int) -> tuple[mmap.mmap, int] | None:
    """Memory, and where in it so many bytes begin with a page, of which the first are to lie on large ones.

    None where the system has no large pages, or not as much memory: torch says how much is missing.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone has it
    if advice is None:
        return None
    try:
        mapping = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):
        return None
    start = -torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() % PAGE
    mapping.resize(start + size)  # where large pages come unasked, one would hold the end and what lies behind it
    with contextlib.suppress(OSError):  # a kernel that was built without them
        mapping.madvise(advice, start, large)
    return mapping, start


def settled(tensor: Tensor) -> Tensor:
    """The same numbers in memory of ``empty``; the tensor itself if it is there, too small, or not plain CPU memory."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.nbytes < PAGE:
        return tensor
    return tensor if tensor.data_ptr() % PAGE == 0 else empty(tensor.shape, tensor.dtype).copy_(tensor)


class Shelf:
    """Large pages for tensors that stay as long as a model: the small ones lie on them side by side.

    Each has a storage of its own; the memory is given back when the last one is gone.
    """

    def __init__(self) -> None:
        self._block: mmap.mmap | None = None
        self._next = 0

    def settled(self, tensor: Tensor) -> Tensor:
        """The same numbers on large pages; the tensor itself if it is there, or not plain CPU memory."""
        size = tensor.nbytes
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or not 0 < size < PAGE:
            return settled(tensor)
        if self._block is None or self._next + size > len(self._block):
            found = _mapped(BLOCK, BLOCK)
            if found is None:
                return tensor
            self._block, self._next = found
        place = torch.frombuffer(self._block, dtype=torch.uint8, count=size, offset=self._next)
        self._next += -(-size // _LINE) * _LINE
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)
