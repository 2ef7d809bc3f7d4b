"""What the linear layers of a model read in a text: the second moments of their inputs, by which errors are weighed.

T tokens tell little of D inputs where T is not many times D. What the weights tell counts as much as D more tokens:

    E[x·xᵀ] ≈ (Σ x·xᵀ + D·m·M)/(T + D),   m = mean square of x,   M = expected_moments(weight)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hyaena.errors import NonFiniteError
from hyaena.hooks import observing
from hyaena.quant.moments import expected_moments, in_blocks

WINDOW = 2048
"""Tokens that are read at a time."""


@torch.no_grad()
def collect_moments(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Second moments ``E[x·xᵀ]`` of the inputs of every plain linear layer, name -> float32 [N,B,B].

    They are those of blocks of neighbouring inputs: all of them up to 2,048, else parts, see ``moments.blocks_of``.

    Args:
        model: reads token ids [1,T] when it is called; its weights are not narrow.
        ids: int [T], of a text like those that the model is for, read in windows of 2,048; several times as many as a
            layer has inputs tell what the weights do not.

    Raises:
        NonFiniteError: a layer reads numbers that are not finite, or the sum of whose squares is not.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def counting(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().flatten(0, -2).float()
            blocks = in_blocks(x)
            products = blocks.mT @ blocks
            sums[name] = sums[name].add_(products) if name in sums else products
            counts[name] = counts.get(name, 0) + len(x)

        return hook

    device = next(model.parameters()).device
    layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    with observing(((module, counting(name)) for name, module in layers.items()), before=True):
        for window in ids.split(WINDOW):
            model(window.unsqueeze(0).to(device))
    for name, total in sums.items():
        if not bool(total.diagonal(dim1=1, dim2=2).sum().isfinite()):  # no product is larger than its squares
            raise NonFiniteError(
                f"{name} reads numbers in the calibration text that are not finite, or too large to be squared: check "
                "the weights with `hyaena info`, or choose scales without a text"
            )
        squares, layer = total.diagonal(dim1=1, dim2=2).sum() / counts[name], layers[name]  # D·m
        total.add_(expected_moments(layer.weight).mul_(squares)).div_(counts[name] + layer.in_features)
    return {name: total.cpu() for name, total in sums.items()}
