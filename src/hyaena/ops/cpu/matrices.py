"""What kernels of products need to know of the weights of a linear layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyaena.ops.cpu import narrow
from hyaena.ops.cpu.memory import TOKENS
from hyaena.ops.linear import Dense, Linear
from hyaena.ops.narrow import Narrow


class Matrix(NamedTuple):
    """A matrix [outputs,width] in memory.

    Attributes:
        form: the token of its dtype, or of its form where it is narrow.
        row_bytes: of the numbers of a row, without scales.
        addresses: of numbers, scales and minima; 0 for what there is not.
    """

    form: Any
    outputs: int
    width: int
    row_bytes: int
    addresses: tuple[int, int, int]

    @classmethod
    def of(cls, layer: Linear, x: Tensor) -> Matrix | None:
        """The weights of a layer for products with x; None where kernels do not take them."""
        if isinstance(layer, Dense):
            weight = layer.weight
            if weight.dtype != x.dtype or not weight.is_contiguous():
                return None
            outputs, width = weight.shape
            return cls(TOKENS[weight.dtype], outputs, width, width * weight.element_size(), (weight.data_ptr(), 0, 0))
        form = form_of(layer) if isinstance(layer, Narrow) else None
        if form is None or not isinstance(layer, Narrow):
            return None
        codes, scale, minimum = layer.codes, layer.scale, layer.minimum
        if not all(t is None or t.is_contiguous() for t in (codes, scale, minimum)):
            return None
        addresses = codes.data_ptr(), scale.data_ptr(), 0 if minimum is None else minimum.data_ptr()
        return cls(form, *layer.shape, codes.shape[1], addresses)


def form_of(layer: Narrow) -> Any:
    """The token of the form of narrow weights; None where kernels do not take them."""
    width, groups = layer.shape[1], layer.scale.shape[1]
    if layer.floating or width % narrow.COLUMNS or layer.scale.dtype not in (torch.float32, torch.float16):
        return None
    if layer.scale.dtype == torch.float32:
        return narrow.ROW8 if layer.bits == 8 and groups == 1 and layer.minimum is None else None
    blocks = width // groups // narrow.COLUMNS if width // groups % narrow.COLUMNS == 0 else 0
    known = {
        (8, 1, False): narrow.BLOCK8,
        (4, 1, False): narrow.BLOCK4,
        (4, 1, True): narrow.AFFINE4,
        (4, narrow.PANEL, True): narrow.WIDE4,
    }
    return known.get((layer.bits, blocks, layer.minimum is not None))
