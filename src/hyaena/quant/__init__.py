"""Narrow weights: linear layers in 8 and 4 bits, see docs/quantization.md."""

from hyaena.quant.calibrate import collect_moments
from hyaena.quant.feedback import feed_back
from hyaena.quant.linear import QuantizedLinear, check_wide, fixed_tensors, narrow_linears, quantized_layers
from hyaena.quant.rounding import round_weight

__all__ = [
    "QuantizedLinear",
    "check_wide",
    "collect_moments",
    "feed_back",
    "fixed_tensors",
    "narrow_linears",
    "quantized_layers",
    "round_weight",
]
