"""Decoding on fixed memory: one step of the model, choice of the next token included, as one captured graph."""

from hyaena.decoding.choice import Choice
from hyaena.decoding.decoder import Decoder
from hyaena.decoding.step import why_not

__all__ = ["Choice", "Decoder", "why_not"]
