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


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU whose numbers are still to be written, and whose storage has no more bytes than they.

    Where there are large pages it begins with one, and asks that all of its whole pages be large. What remains lies on
    small ones, so that nothing is wasted.
    """
    size = math.prod(shape) * dtype.itemsize
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone has it
    if size < PAGE or advice is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    try:
        mapping = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # torch says how much memory is missing
        return torch.empty(shape, dtype=dtype, device="cpu")
    start = -torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() % PAGE
    mapping.resize(start + size)  # where large pages come unasked, one would hold the end and what lies behind it
    with contextlib.suppress(OSError):  # a kernel that was built without them
        mapping.madvise(advice, start, size // PAGE * PAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8, count=size, offset=start).view(dtype).view(tuple(shape))


def settled(tensor: Tensor) -> Tensor:
    """The same numbers in memory of ``empty``; the tensor itself if it is there, too small, or not plain CPU memory."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.nbytes < PAGE:
        return tensor
    return tensor if tensor.data_ptr() % PAGE == 0 else empty(tensor.shape, tensor.dtype).copy_(tensor)
