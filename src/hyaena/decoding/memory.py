"""What a model remembers, in storage that never moves: the memory of steps that are captured as graphs.

It begins as a ``Cache`` that prompts were read into, whose keys and values it takes over where they are. From then on
every step writes in place, and what counts the steps is a number on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyaena.cache import Cache, KVCache
from hyaena.config import ModelConfig
from hyaena.errors import InputError
from hyaena.ops import HyenaState, rotary_table
from hyaena.ops.step import Slots


class StaticMemory:
    """The memory of up to ``batch_size`` rows; the first few of them may be stepped by themselves.

    Attributes:
        layers: a ``KVCache`` or a ``HyenaState`` per layer, updated in place.
        slots: how much of the key/value stores is in use, on the device.
        capacity: the most slots.
        batch_size: rows held.
    """

    def __init__(self, layers: list[KVCache | HyenaState], slots: Slots, capacity: int) -> None:
        self.layers = layers
        self.slots = slots
        self.capacity = capacity
        self.batch_size = slots.padding.shape[0]

    @classmethod
    def adopt(cls, cache: Cache, config: ModelConfig) -> StaticMemory:
        """Take over a cache, which must not be used afterwards.

        Raises:
            InputError: the cache has no maximum length.
        """
        if cache.max_length is None:
            raise InputError("captured decoding needs a cache of fixed size: make it with max_length")
        layers: list[KVCache | HyenaState] = []
        for layer in cache.layers:
            if isinstance(layer, KVCache):
                layers.append(KVCache(layer.keys, layer.values))
            else:
                layers.append(HyenaState(*(t.clone(memory_format=torch.contiguous_format) for t in layer)))
        device = cache.device
        padding = torch.zeros(cache.batch_size, dtype=torch.int32, device=device)
        if cache.padding is not None:
            padding.copy_(cache.padding)
        positions = torch.arange(cache.max_length, device=device)
        rotary = rotary_table(positions, config.head_dim, config.rope_theta, config.rope_scaling_factor)
        used = torch.full((1,), cache.length, dtype=torch.int32, device=device)
        return cls(layers, Slots(used, padding, rotary), cache.max_length)

    def rows(self, count: int) -> StaticMemory:
        """The first rows: the same storage, not a copy."""
        layers: list[KVCache | HyenaState] = [
            KVCache(layer.keys[:count], layer.values[:count])
            if isinstance(layer, KVCache)
            else HyenaState(layer.short[:count], layer.long[:count])
            for layer in self.layers
        ]
        return StaticMemory(layers, self.slots._replace(padding=self.slots.padding[:count]), self.capacity)

    def changing(self) -> list[Tensor]:
        """What a step changes and a step repeated would change again: all but keys and values."""
        return [t for layer in self.layers if isinstance(layer, HyenaState) for t in layer] + [self.slots.used]

    def by_row(self) -> list[Tensor]:
        """Every tensor whose first axis is the row."""
        held = [(x.keys, x.values) if isinstance(x, KVCache) else tuple(x) for x in self.layers]
        return [t for pair in held for t in pair] + [self.slots.padding]

    def as_cache(self, length: int) -> Cache:
        """An ordinary cache over this storage, of which ``length`` slots are in use; not a copy."""
        padding = self.slots.padding.long()
        return Cache(
            list(self.layers),
            length=length,
            max_length=self.capacity,
            padding=padding if bool(padding.any()) else None,
        )


def move_rows(tensors: Sequence[Tensor], rows: Sequence[int]) -> None:
    """Bring the given rows, in rising order, to the front, in place."""
    for tensor in tensors:
        for place, row in enumerate(rows):
            if place != row:
                tensor[place].copy_(tensor[row])
