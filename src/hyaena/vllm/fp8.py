"""The FP8 input projections of Evo 2 as a linear method of vLLM: what ``hyaena.fp8.FP8Linear`` computes.

Ranks share out the rows of a weight; the scales are those of the whole, so every rank computes its part of the same
numbers. The wide weight is dropped when it has been rounded: a layer takes one byte per number.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.utils.torch_utils import direct_register_custom_op

from hyaena.ops.fp8 import Quantized, check_fp8_sizes, fp8_linear, fp8_road, is_hopper, quantize_weight


class FP8Method(UnquantizedLinearMethod):
    """Products in e4m3 with static scales, by a Hopper GPU's tensor cores, and elsewhere emulated in every bit.

    Until weights are loaded a layer is one without quantisation, and has ``scales`` beside its weight, float32 [2].
    """

    supports_pre_processed_weights = False

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        weight, inputs, outputs = quantize_weight(layer.weight, *layer.scales)
        if not is_hopper(weight.device):
            weight = weight.t().contiguous().t()  # as the emulation reads it
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.register_buffer("input_inverse", inputs, persistent=False)
        layer.register_buffer("weight_inverse", outputs, persistent=False)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops.vllm.hyaena_fp8_linear(
            x, layer.weight, layer.scales, layer.input_inverse, layer.weight_inverse
        )


def computes_fp8(mode: str, device: torch.device) -> bool:
    """Whether FP8 input projections are computed as such: ``mode`` as in ``hyaena.load``."""
    return fp8_road(mode, device) != "plain"


def make_fp8(layer: nn.Module) -> None:
    """Turn a linear layer of vLLM without quantisation, and without a bias, into an FP8 one.

    Raises:
        UnsupportedError: sizes that FP8 products do not have.
    """
    check_fp8_sizes(*layer.weight.shape)
    layer.register_buffer("scales", torch.ones(2, dtype=torch.float32))
    layer.quant_method = FP8Method()


def _linear(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, input_inverse: torch.Tensor,
            weight_inverse: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """The product of rounded weights, as one operator, so that a compiled graph need not know its road."""
    return fp8_linear(x, weight, *scales, "exact", quantized=Quantized(weight, input_inverse, weight_inverse))


def _shape(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, input_inverse: torch.Tensor,
           weight_inverse: torch.Tensor) -> torch.Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], weight.shape[0])


direct_register_custom_op("hyaena_fp8_linear", _linear, fake_impl=_shape)
