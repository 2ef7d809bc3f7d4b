"""``QuantizedLinear``: the module in the place of a linear layer whose weight is narrow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hyaena.errors import InputError
from hyaena.ops.narrow import Narrow, narrow_linear
from hyaena.quant.feedback import feed_back
from hyaena.quant.moments import ESTIMATED, expected_moments
from hyaena.quant.rounding import code_dtype, round_weight
from hyaena.schemes import SCHEMES, Scheme

TENSORS = ("codes", "scale", "minimum")
"""The buffers of a ``QuantizedLinear``: integers and scales, which keep their dtypes whatever the model is cast to."""


class QuantizedLinear(nn.Module):
    """A linear layer with a narrow weight, see ``ops.Narrow``; x [...,D] -> [...,E] in the dtype of x.

    It has no parameter to train but a bias; gradients pass through x. Its buffers keep their dtypes when a model is
    cast.

    Attributes:
        codes, scale, minimum: the weight; ``minimum`` is None in schemes without minima.
        bias: [E] or None.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        groups = out_features, scheme.groups(in_features)
        dtype = torch.float32 if scheme.scale_bytes == 4 else torch.float16
        self.register_buffer(
            "codes", torch.zeros(out_features, in_features * scheme.bits // 8, dtype=code_dtype(scheme))
        )
        self.register_buffer("scale", torch.zeros(groups, dtype=dtype))
        self.register_buffer("minimum", torch.zeros(groups, dtype=dtype) if scheme.minima else None)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return narrow_linear(x, self.record())

    def record(self) -> Narrow:
        """What kernels read."""
        return Narrow(self.codes, self.scale, self.minimum, self.bias)

    def narrow(self, weight: Tensor, moments: Tensor | None = None) -> None:
        """Take the numbers with which outputs are nearest to those of a weight [E,D].

        Args:
            weight: see ``round_weight``.
            moments: float32 [N,B,B] of ``collect_moments``; what the weight tells of them unless given. See
                ``feed_back``.

        Raises:
            InputError: see ``round_weight``; or moments of other inputs.
        """
        squares = None  # of which the weight tells nothing
        if moments is not None:
            blocks, size = moments.shape[:2] if moments.ndim == 3 else (0, 0)
            if not 0 <= blocks * size - weight.shape[1] < max(blocks, 1) or moments.shape[2] != size:
                raise InputError(
                    f"moments {list(moments.shape)} are not those of {weight.shape[1]} inputs: take them from "
                    "quant.collect_moments of this model"
                )
            squares = moments.diagonal(dim1=1, dim2=2).flatten()[: weight.shape[1]]
        rounded = round_weight(weight, self.scheme, squares)
        known = expected_moments(weight, ESTIMATED) if moments is None else moments
        self.codes, self.scale, self.minimum, _ = feed_back(weight, rounded, self.scheme, known)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, weights={self.scheme.name}"

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """The narrow numbers of weights ~ N(0, 2/(5D))."""
        weight = torch.empty(self.out_features, self.in_features, device=self.codes.device)
        nn.init.normal_(weight, std=(2 / (5 * self.in_features)) ** 0.5, generator=generator)
        self.codes, self.scale, self.minimum, _ = round_weight(weight, self.scheme)  # which tell nothing of inputs
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        fixed = {id(t) for t in self.buffers()}

        def apply(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device) if id(t) in fixed and out.dtype != t.dtype else out

        return super()._apply(apply, recurse)


def narrow_linears(model: nn.Module, scheme: Scheme) -> None:
    """Put an empty ``QuantizedLinear`` in the place of every plain linear layer in a module, in place.

    Norms, filters and modules of other types stay as they are: FP8 layers, which are computed in FP8, too.

    Args:
        model: whose layers are replaced.
        scheme: of their weights; ``lm_head`` has the scheme's for heads.

    Raises:
        InputError: the inputs of a layer do not divide by the groups of the scheme.
    """
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            chosen = SCHEMES[scheme.head] if name == "lm_head" else scheme
            chosen.check_columns(name, module.in_features)
            owner, _, leaf = name.rpartition(".")
            with torch.device(module.weight.device):
                layer = QuantizedLinear(module.in_features, module.out_features, chosen, bias=module.bias is not None)
            if layer.bias is not None:
                layer.bias = module.bias
            setattr(model.get_submodule(owner), leaf, layer)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The layers of a model with narrow weights, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def fixed_tensors(model: nn.Module) -> set[str]:
    """Names of the tensors of narrow weights: in a model of any dtype they are what they are."""
    return {f"{path}.{name}" for path, layer in quantized_layers(model).items() for name, _ in layer.named_buffers()}


def check_wide(model: nn.Module, what: str) -> None:
    """Refuse what changes weights in a model whose weights are narrow.

    Raises:
        InputError: naming what can be done in place of ``what``.
    """
    for name, layer in quantized_layers(model).items():
        raise InputError(f"{name} has {layer.scheme.name} weights, {what}")
