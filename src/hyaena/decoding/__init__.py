"""Decoding on fixed memory: one step of the model, choice of the next token included, as one captured graph."""

from hyaena.decoding.decoder import Decoder, Decoding, resolve_decoding
from hyaena.decoding.pipeline import PipelinedDecoder
from hyaena.decoding.sampler import StepOutput, pack_outputs
from hyaena.decoding.step import why_not

__all__ = ["Decoder", "Decoding", "PipelinedDecoder", "StepOutput", "pack_outputs", "resolve_decoding", "why_not"]
