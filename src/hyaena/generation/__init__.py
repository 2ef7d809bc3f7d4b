"""From a prompt to text: ``generate`` for the whole, ``stream`` token by token; one prompt or a list.

A row of a batch is that row alone: it has its own parameters, its own random numbers and its own state in the cache.
"""

from hyaena.generation.api import Completion, generate, stream
from hyaena.generation.chunks import MIN_PREFILL_CHUNK, PREFILL_CHUNK, choose_chunk
from hyaena.generation.loop import Event, Stats
from hyaena.generation.prefixes import Prefix, load_prefix, prefix
from hyaena.generation.settings import Options, Settings, encode_prompts, parse_prompts

__all__ = [
    "MIN_PREFILL_CHUNK",
    "PREFILL_CHUNK",
    "Completion",
    "Event",
    "Options",
    "Prefix",
    "Settings",
    "Stats",
    "choose_chunk",
    "encode_prompts",
    "generate",
    "load_prefix",
    "parse_prompts",
    "prefix",
    "stream",
]
