"""Decoding on fixed memory: one step of the model, choice of the next token included, as one captured graph."""

from hyaena.decoding.ahead import Ahead
from hyaena.decoding.choice import Choice, pack
from hyaena.decoding.decoder import Decoder, Decoding, resolve_decoding
from hyaena.decoding.step import why_not

__all__ = ["Ahead", "Choice", "Decoder", "Decoding", "pack", "resolve_decoding", "why_not"]
