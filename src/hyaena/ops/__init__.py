"""Pure functions on tensors: the mathematics of StripedHyena models, with no notion of a model."""

from hyaena.ops.attention import Documents, attention, find_documents
from hyaena.ops.gate import ACTIVATIONS, gate
from hyaena.ops.hyena import FUSED_METHODS, HyenaState, capabilities, hyena
from hyaena.ops.long_conv import (
    METHODS,
    TRUNCATION_TOLERANCE,
    CanonicalFilter,
    ExplicitFilter,
    ModalFilter,
    Truncation,
    choose_window,
    decay_lengths,
    dropped_energy,
    long_conv,
    resolve_method,
    taps,
    to_canonical,
    to_canonical_state,
    to_modal,
    truncate,
)
from hyaena.ops.norm import rms_norm
from hyaena.ops.rope import rotary_table, rotate
from hyaena.ops.short_conv import short_conv

__all__ = [
    "ACTIVATIONS",
    "FUSED_METHODS",
    "METHODS",
    "TRUNCATION_TOLERANCE",
    "CanonicalFilter",
    "Documents",
    "ExplicitFilter",
    "HyenaState",
    "ModalFilter",
    "Truncation",
    "attention",
    "capabilities",
    "choose_window",
    "decay_lengths",
    "dropped_energy",
    "find_documents",
    "gate",
    "hyena",
    "long_conv",
    "resolve_method",
    "rms_norm",
    "rotary_table",
    "rotate",
    "short_conv",
    "taps",
    "to_canonical",
    "to_canonical_state",
    "to_modal",
    "truncate",
]
