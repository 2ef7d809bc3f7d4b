"""Pure functions on tensors: the mathematics of StripedHyena models, with no notion of a model."""

from hyaena.ops.attention import attention
from hyaena.ops.hyena import FUSED_METHODS, HyenaState, hyena
from hyaena.ops.long_conv import METHODS, ModalFilter, decay_lengths, long_conv, taps
from hyaena.ops.norm import rms_norm
from hyaena.ops.rope import rotary_table, rotate
from hyaena.ops.short_conv import short_conv

__all__ = [
    "FUSED_METHODS",
    "METHODS",
    "HyenaState",
    "ModalFilter",
    "attention",
    "decay_lengths",
    "hyena",
    "long_conv",
    "rms_norm",
    "rotary_table",
    "rotate",
    "short_conv",
    "taps",
]
