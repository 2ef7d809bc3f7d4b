"""Pure functions on tensors: the mathematics of StripedHyena models, with no notion of a model."""

from hyaena.ops.attention import Documents, attention, find_documents
from hyaena.ops.backend import Backend, resolve_backend
from hyaena.ops.fp8 import fp8_linear, fp8_road
from hyaena.ops.gate import ACTIVATIONS, gate
from hyaena.ops.hyena import HyenaState, capabilities, hyena, hyena_states
from hyaena.ops.kv import KVState
from hyaena.ops.linear import Dense, Linear, linear
from hyaena.ops.long_conv import (
    METHODS,
    TRUNCATION_TOLERANCE,
    CanonicalFilter,
    ExplicitFilter,
    Filter,
    ModalFilter,
    RealModalFilter,
    TableStore,
    Truncation,
    choose_window,
    decay_lengths,
    dropped_energy,
    kinds_of,
    long_conv,
    taps,
    to_canonical,
    to_canonical_state,
    to_modal,
    truncate,
    truncation_window,
)
from hyaena.ops.lora import lora_linear
from hyaena.ops.narrow import Narrow, narrow_linear, widen
from hyaena.ops.norm import rms_norm
from hyaena.ops.pages import PAGE, PagedKVState, PagedRows, PagePool, PageTable, pages_for
from hyaena.ops.rope import rotary_frequencies, rotary_table, rotate
from hyaena.ops.short_conv import short_conv
from hyaena.ops.state import RowTensors
from hyaena.ops.step import DecodeOperators, Norm, RMSNormWeight, StepContext

__all__ = [
    "ACTIVATIONS",
    "METHODS",
    "PAGE",
    "TRUNCATION_TOLERANCE",
    "Backend",
    "CanonicalFilter",
    "DecodeOperators",
    "Dense",
    "Documents",
    "ExplicitFilter",
    "Filter",
    "HyenaState",
    "KVState",
    "Linear",
    "ModalFilter",
    "Narrow",
    "Norm",
    "PagePool",
    "PageTable",
    "PagedKVState",
    "PagedRows",
    "RMSNormWeight",
    "RealModalFilter",
    "RowTensors",
    "StepContext",
    "TableStore",
    "Truncation",
    "attention",
    "capabilities",
    "choose_window",
    "decay_lengths",
    "dropped_energy",
    "find_documents",
    "fp8_linear",
    "fp8_road",
    "gate",
    "hyena",
    "hyena_states",
    "kinds_of",
    "linear",
    "long_conv",
    "lora_linear",
    "narrow_linear",
    "pages_for",
    "resolve_backend",
    "rms_norm",
    "rotary_frequencies",
    "rotary_table",
    "rotate",
    "short_conv",
    "taps",
    "to_canonical",
    "to_canonical_state",
    "to_modal",
    "truncate",
    "truncation_window",
    "widen",
]
