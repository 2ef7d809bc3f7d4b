"""Narrow weights widened by a kernel equal those of ``ops.widen``: on a GPU if there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch

from device import DEVICE
from hyaena import ops
from hyaena.ops.triton.widen import widen
from hyaena.quant import round_weight
from hyaena.schemes import SCHEMES


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widening(name: str, dtype: torch.dtype) -> None:
    layer = round_weight(torch.randn(7, 2176 if name == "int8" else 1152).to(DEVICE), SCHEMES[name])
    for rows in (slice(None), slice(2, 5)):
        got, want = widen(layer, dtype, rows), ops.widen(layer, dtype, rows)
        assert got.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
        else:  # the interpreter cuts bits off
            torch.testing.assert_close(got, want, rtol=2**-7, atol=0)
