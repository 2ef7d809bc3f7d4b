"""What a model remembers of the sequences it has read: keys and values, and the states of Hyena blocks.

Rows of unequal length are aligned at their ends: a row that is shorter begins with ``padding`` slots that nothing
ever sees. The verbs below are all that batching needs: select rows, merge caches, snapshot, restore, reset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyaena.config import ModelConfig
from hyaena.errors import CapacityError, InputError
from hyaena.ops.hyena import HyenaState

GROWTH = 256
"""Slots that a growing key/value store begins with; it then doubles."""


@dataclass
class KVCache:
    """Keys and values of one attention layer, each [B,G,capacity,head_dim]."""

    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(
        cls, batch: int, heads: int, capacity: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        shape = (batch, heads, capacity, head_dim)
        with torch.inference_mode(False):  # storage that grew in inference mode may be written outside of it
            return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    def write(self, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Store [B,G,T,head_dim] from slot ``start`` on; return everything up to the end of it."""
        stop = start + keys.shape[2]
        self.keys[:, :, start:stop] = keys
        self.values[:, :, start:stop] = values
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def resized(self, rows: Tensor | None, drop: int, length: int, capacity: int) -> KVCache:
        """A copy of slots ``drop … length-1`` of the given rows, at the front of a new store."""
        batch = self.keys.shape[0] if rows is None else len(rows)
        _, heads, _, head_dim = self.keys.shape
        new = KVCache.allocate(batch, heads, capacity, head_dim, self.keys.dtype, self.keys.device)
        for source, target in ((self.keys, new.keys), (self.values, new.values)):
            kept = source[:, :, drop:length]
            target[:, :, : length - drop] = kept if rows is None else kept[rows]
        return new


class Cache:
    """The memory of a batch of sequences, one entry per layer.

    Attributes:
        layers: a ``KVCache`` for an attention layer, a ``HyenaState`` for a Hyena layer.
        length: slots in use, padding included; the position of the next token of an unpadded row.
        max_length: the length past which the cache refuses, or None to grow for ever.
        padding: int [B], leading slots of each row that hold no token; None when no row has any.
    """

    def __init__(
        self, layers: list[KVCache | HyenaState], *, length: int, max_length: int | None, padding: Tensor | None
    ) -> None:
        self.layers = layers
        self.length = length
        self.max_length = max_length
        self.padding = padding

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        batch_size: int = 1,
        *,
        max_length: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        windows: Mapping[int, int] | None = None,
    ) -> Cache:
        """An empty cache: storage for ``max_length`` tokens at once, or storage that grows.

        Hyena states are float32 pairs (complex64) whatever ``dtype`` is; wider when ``dtype`` is float64. A layer that
        ``windows`` gives W taps to keeps the window of a truncated filter instead, in the same precision.
        """
        if batch_size < 1 or (max_length is not None and max_length < 1):
            raise InputError(f"a cache takes batch_size >= 1 and max_length >= 1, not {batch_size} and {max_length}")
        device = torch.device(device)
        complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
        layers: list[KVCache | HyenaState] = []
        for i, kind in enumerate(config.layer_types):
            if kind == "attention":
                capacity = max_length if max_length is not None else GROWTH
                layers.append(
                    KVCache.allocate(batch_size, config.num_key_value_heads, capacity, config.head_dim, dtype, device)
                )
            else:
                fir = torch.zeros(
                    batch_size, 3 * config.hidden_size, config.short_filter_length - 1, dtype=dtype, device=device
                )
                size, iir_dtype = config.state_size, complex_dtype
                if windows is not None and i in windows:
                    size, iir_dtype = windows[i] - 1, complex_dtype.to_real()
                iir = torch.zeros(batch_size, config.hidden_size, size, dtype=iir_dtype, device=device)
                layers.append(HyenaState(fir, iir))
        return cls(layers, length=0, max_length=max_length, padding=None)

    def _tensors(self) -> list[Tensor]:
        pairs = [(x.keys, x.values) if isinstance(x, KVCache) else tuple(x) for x in self.layers]
        return [t for pair in pairs for t in pair]

    @property
    def batch_size(self) -> int:
        return self._tensors()[0].shape[0]

    @property
    def device(self) -> torch.device:
        return self._tensors()[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of storage held, used or reserved."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    def reserve(self, count: int) -> None:
        """Make room for ``count`` more tokens, or raise CapacityError and change nothing."""
        needed = self.length + count
        if self.max_length is not None and needed > self.max_length:
            raise CapacityError(
                f"the cache holds {self.length} of at most {self.max_length} tokens and was given {count} more: "
                "make it with a larger max_length, or shorten the prompt"
            )
        for i, layer in enumerate(self.layers):
            if isinstance(layer, KVCache) and layer.keys.shape[2] < needed:
                capacity = max(needed, 2 * layer.keys.shape[2])
                if self.max_length is not None:
                    capacity = min(capacity, self.max_length)
                self.layers[i] = layer.resized(None, 0, self.length, capacity)

    def commit(self, states: dict[int, HyenaState], count: int) -> None:
        """Make a finished forward pass of ``count`` tokens part of the memory, all at once."""
        for i, state in states.items():
            self.layers[i] = state
        self.length += count

    def _copy(self, rows: Tensor | None, drop: int = 0) -> Cache:
        layers: list[KVCache | HyenaState] = []
        for layer in self.layers:
            if isinstance(layer, KVCache):
                capacity = layer.keys.shape[2] if self.max_length is None else self.max_length - drop
                layers.append(layer.resized(rows, drop, self.length, capacity))
            else:
                layers.append(HyenaState(*(t.clone() if rows is None else t[rows] for t in layer)))
        padding = self.padding
        if padding is not None:
            padding = (padding.clone() if rows is None else padding[rows]) - drop
            padding = padding if bool(padding.any()) else None
        max_length = None if self.max_length is None else self.max_length - drop
        return Cache(layers, length=self.length - drop, max_length=max_length, padding=padding)

    def select(self, rows: Sequence[int] | Tensor) -> Cache:
        """A cache of the given rows, in that order; padding that all of them share is dropped, and its room with it."""
        index = torch.as_tensor(rows, dtype=torch.long)
        if index.numel() == 0 or int(index.min()) < 0 or int(index.max()) >= self.batch_size:
            raise InputError(f"select takes rows of 0 … {self.batch_size - 1}, and was given {index.tolist()}")
        index = index.to(self.device)
        drop = 0 if self.padding is None else int(self.padding[index].min())
        return self._copy(index, drop)

    @staticmethod
    def merge(caches: Sequence[Cache], *, max_length: int | None = None) -> Cache:
        """One batch of all rows of all caches, aligned at their ends.

        ``max_length`` of the result, when it is not given: as many tokens more as the roomiest cache had left.
        """
        if not caches:
            raise InputError("merge takes at least one cache")
        length = max(c.length for c in caches)
        if max_length is None and all(c.max_length is not None for c in caches):
            max_length = length + max((c.max_length or 0) - c.length for c in caches)
        if max_length is not None and max_length < length:
            raise CapacityError(f"merge was given max_length {max_length} for caches that hold {length} tokens")
        layers: list[KVCache | HyenaState] = []
        for column in zip(*(c.layers for c in caches), strict=True):
            first = column[0]
            if isinstance(first, KVCache):
                _, heads, _, head_dim = first.keys.shape
                rows, capacity = sum(c.batch_size for c in caches), max(max_length or length, 1)
                new = KVCache.allocate(rows, heads, capacity, head_dim, first.keys.dtype, first.keys.device)
                row = 0
                for cache, layer in zip(caches, column, strict=True):
                    here = slice(row, row + cache.batch_size)
                    new.keys[here, :, length - cache.length : length] = layer.keys[:, :, : cache.length]
                    new.values[here, :, length - cache.length : length] = layer.values[:, :, : cache.length]
                    row += cache.batch_size
                layers.append(new)
            elif any(c.long.shape[1:] != first.long.shape[1:] or c.long.dtype != first.long.dtype for c in column):
                raise InputError("merge was given caches of different methods: make all of them with the same one")
            else:
                layers.append(HyenaState(*(torch.cat(parts) for parts in zip(*column, strict=True))))
        device = caches[0].device
        padding = torch.cat(
            [
                (torch.zeros(c.batch_size, dtype=torch.long, device=device) if c.padding is None else c.padding)
                + (length - c.length)
                for c in caches
            ]
        )
        return Cache(layers, length=length, max_length=max_length, padding=padding if bool(padding.any()) else None)

    def snapshot(self) -> Cache:
        """An independent copy: what happens to either leaves the other alone."""
        return self._copy(None)

    def restore(self, snapshot: Cache) -> None:
        """Become what ``snapshot`` holds; the snapshot stays usable."""
        copy = snapshot._copy(None)
        self.layers, self.length = copy.layers, copy.length
        self.max_length, self.padding = copy.max_length, copy.padding

    def reset(self) -> None:
        """Forget everything; keep the storage."""
        for i, layer in enumerate(self.layers):
            if isinstance(layer, HyenaState):
                self.layers[i] = HyenaState(*map(torch.zeros_like, layer))
        self.length = 0  # nothing reads keys and values beyond it
        self.padding = None
