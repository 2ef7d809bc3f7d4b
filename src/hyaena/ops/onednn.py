"""float32 products of many rows by oneDNN, where torch would take MKL's, which is slow on AMD processors.

torch multiplies float32 matrices with MKL. Its switches to oneDNN belong to the whole process
(``torch.set_float32_matmul_precision("medium")``) and permit products of bfloat16 numbers, which processors with AMX
then form. A tensor in oneDNN's layout is multiplied by oneDNN in float32 proper, and concerns nobody else, so that is
what is done here, for the linear layers of one pass, in its thread.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode

FEWEST_ROWS = 128
"""Rows from which on a product repays the copy of its weights into oneDNN's layout."""


class OneDNNProducts(TorchFunctionMode):
    """While this is entered, linear layers of plain float32 tensors on a CPU, of many rows, are products of oneDNN."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear and not kwargs and all(_plain(t) for t in args if t is not None):
            x, weight = args[0], args[1]
            if x.numel() >= FEWEST_ROWS * x.shape[-1] and weight.ndim == 2:
                bias = args[2].to_mkldnn() if len(args) > 2 and args[2] is not None else None
                return func(x.to_mkldnn(), weight.to_mkldnn(), bias).to_dense()
        return func(*args, **(kwargs or {}))


def _plain(t: Any) -> bool:
    plain = type(t) in (Tensor, torch.nn.Parameter) and t.dtype == torch.float32 and t.device.type == "cpu"
    return plain and not is_functorch_wrapped_tensor(t)  # vmap knows no tensors in oneDNN's layout


def onednn_products(device: torch.device, dtype: torch.dtype, tokens: int) -> contextlib.AbstractContextManager[Any]:
    """What a pass over so many tokens is to be computed in: oneDNN's products where they are faster, or nothing."""
    if torch.compiler.is_compiling():  # first: a compiler cannot ask for the processor, and would take tokens for a
        return contextlib.nullcontext()  # condition
    suits = device.type == "cpu" and dtype == torch.float32 and not torch.is_grad_enabled() and _preferred()
    return OneDNNProducts() if suits and tokens >= FEWEST_ROWS else contextlib.nullcontext()


@functools.cache
def _preferred() -> bool:
    """Whether the processor is one of AMD's, and torch has both libraries."""
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "")
    return str(name).startswith("AMD") and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
