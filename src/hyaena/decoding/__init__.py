"""From the last token of every row to the next: by calls of the model, or by steps on static memory and CUDA graphs."""

from hyaena.decoding.decoder import Decoder, Decoding, make_decoder, resolve_decoding
from hyaena.decoding.eager import EagerDecoder, sample_outputs
from hyaena.decoding.isolated import IsolatedDecoder
from hyaena.decoding.pipeline import PipelinedDecoder
from hyaena.decoding.sampler import StepOutput, pack_outputs
from hyaena.decoding.static_cache import StaticCache

__all__ = [
    "Decoder",
    "Decoding",
    "EagerDecoder",
    "IsolatedDecoder",
    "PipelinedDecoder",
    "StaticCache",
    "StepOutput",
    "make_decoder",
    "pack_outputs",
    "resolve_decoding",
    "sample_outputs",
]
