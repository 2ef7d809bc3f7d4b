"""What the linear layers of a model read in a text: the second moments of their inputs, by which errors are weighed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hyaena.errors import NonFiniteError

WINDOW = 2048
"""Tokens that are read at a time."""

BLOCK = 2048
"""Inputs of a layer whose products with each other are kept, at most: 8 GB for the 7B."""


@torch.no_grad()
def collect_moments(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Second moments ``E[x·xᵀ]`` of the inputs of every plain linear layer, name -> float32 [N,B,B].

    They are those of B neighbouring inputs each, D = N·B: all of them up to 2,048, else the most that divide D.

    Args:
        model: reads token ids [1,T] when it is called; its weights are not narrow.
        ids: int [N], of a text like those that the model is for; read in windows of 2,048.

    Raises:
        NonFiniteError: a layer reads numbers that are not finite, or the sum of whose squares is not.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def counting(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().flatten(0, -2).float()
            blocks = x.unflatten(-1, (-1, _block(x.shape[-1]))).transpose(0, 1)
            products = blocks.mT @ blocks
            sums[name] = sums[name].add_(products) if name in sums else products
            counts[name] = counts.get(name, 0) + len(x)

        return hook

    device = next(model.parameters()).device
    hooks = [
        module.register_forward_pre_hook(counting(name))
        for name, module in model.named_modules()
        if type(module) is nn.Linear
    ]
    try:
        for window in ids.split(WINDOW):
            model(window.unsqueeze(0).to(device))
    finally:
        for hook in hooks:
            hook.remove()
    for name, total in sums.items():
        if not bool(total.diagonal(dim1=1, dim2=2).sum().isfinite()):  # no product is larger than its squares
            raise NonFiniteError(
                f"{name} reads numbers in the calibration text that are not finite, or too large to be squared: check "
                "the weights with `hyaena info`, or choose scales without a text"
            )
    return {name: total.div_(counts[name]).cpu() for name, total in sums.items()}


def _block(inputs: int) -> int:
    return next(size for size in range(min(BLOCK, inputs), 0, -1) if inputs % size == 0)
