"""Linear layers that were trained, and are run by their authors, as FP8 products: those of Evo 2's Hyena blocks."""

from __future__ import annotations

import math
import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hyaena.errors import InputError
from hyaena.filters import Float32Parameters
from hyaena.ops.fp8 import (
    FP8_LARGEST,
    FP8_MODES,
    Quantized,
    check_fp8_sizes,
    fp8_linear,
    fp8_road,
    is_hopper,
    quantize_weight,
)


class FP8Linear(Float32Parameters, nn.Linear):
    """A linear layer without bias, computed as ``ops.fp8_linear`` does; weight [N,K].

    The weight is held in the dtype of the model. What it is in e4m3 is kept beside it after the first call (N·K bytes
    more), and made again when the weight has changed.

    Attributes:
        scales: s_x and s_w, by which inputs and weight are multiplied before they are rounded; float32 [2], in a model
            of any dtype. They come with a checkpoint and stay what they are.
        mode: how products are computed, see ``ops.fp8_road``; ``set_fp8`` sets it for a whole model.
    """

    narrow: ClassVar[frozenset[str]] = frozenset({"weight"})
    scales: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.register_buffer("scales", torch.ones(2, dtype=torch.float32))
        self.mode = "auto"
        self._quantized = _Quantized()

    def forward(self, x: Tensor) -> Tensor:
        if self.is_plain():
            return nn.functional.linear(x, self.weight)
        (input_scale, weight_scale), kept = self.scales, None
        if not (self.weight.requires_grad and torch.is_grad_enabled()):
            kept = self._quantized.of(self.weight, self.scales)
        return fp8_linear(x, self.weight, input_scale, weight_scale, self.mode, quantized=kept)

    def is_plain(self) -> bool:
        """Whether the layer computes ``x·Wᵀ`` here, so that kernels may read its weight."""
        return fp8_road(self.mode, self.weight.device) == "plain"

    @torch.no_grad()
    def fit_scale(self) -> None:
        """Lower the scale of the weight where a changed weight would pass ±448 with it: s_w = 448 / max |W|."""
        largest = self.weight.abs().max().float()
        if largest * self.scales[1] > FP8_LARGEST:
            self.scales[1] = FP8_LARGEST / largest

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode}"

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Weights ~ N(0, 2/(5K)), of which the largest becomes 448; normalised inputs up to 14 are representable."""
        nn.init.normal_(self.weight, std=math.sqrt(2 / (5 * self.in_features)), generator=generator)
        self.scales[0] = 32.0
        self.scales[1] = FP8_LARGEST / self.weight.detach().abs().max()


def set_fp8(model: nn.Module, mode: str) -> None:
    """Choose how the FP8 layers of a model are computed, in place; see ``ops.fp8_road``.

    Raises:
        InputError: an unknown mode, or ``"exact"`` for a model without FP8 layers.
        UnsupportedError: ``"exact"`` on a device that has no e4m3 numbers, or for sizes that FP8 products do not have.
    """
    layers = [module for module in model.modules() if isinstance(module, FP8Linear)]
    check_fp8(mode, bool(layers))
    for layer in layers:
        if mode == "exact":
            check_fp8_sizes(*layer.weight.shape)
            fp8_road(mode, layer.weight.device)
    for layer in layers:
        layer.mode = mode


def check_fp8(mode: str, has_layers: bool) -> None:
    """Refuse an unknown mode, and FP8 products of a model that has none.

    Raises:
        InputError: as :func:`set_fp8`.
    """
    if mode not in FP8_MODES:
        raise InputError(f"fp8 is {mode!r}: choose one of {', '.join(FP8_MODES)}")
    if mode == "exact" and not has_layers:
        raise InputError(
            "fp8='exact' is for models with FP8 input projections, and the configuration of this one has none "
            "(fp8_input_projections): leave it out"
        )


class _Quantized:
    """e4m3(W·s_w) of a weight, until the weight or its scale changes. Copies of a model share it until then."""

    def __init__(self) -> None:
        self.made_of: list[tuple[weakref.ref[Tensor], tuple[int, int]]] = []
        self.value: Quantized | None = None

    def of(self, weight: Tensor, scales: Tensor) -> Quantized | None:
        """The numbers; None where a change of the weight would go unnoticed, or they may not be kept."""
        sources = (weight, scales)
        if torch.compiler.is_compiling() or any(t.is_inference() for t in sources):
            return None
        states = [(t.data_ptr(), t._version) for t in sources]
        known = [state for (ref, state), t in zip(self.made_of, sources, strict=False) if ref() is t]
        if known != states:
            if weight.is_cuda and torch.cuda.is_current_stream_capturing():  # a graph would own the memory
                return None
            self.value = quantize_weight(weight, *scales)
            if not is_hopper(weight.device):  # laid out as the emulation reads it
                self.value = self.value._replace(weight=self.value.weight.t().contiguous().t())
            self.made_of = [(weakref.ref(t), state) for t, state in zip(sources, states, strict=True)]
        return self.value

    def __deepcopy__(self, _: Any) -> _Quantized:
        other = _Quantized()
        other.made_of, other.value = self.made_of, self.value
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        return _Quantized, ()
