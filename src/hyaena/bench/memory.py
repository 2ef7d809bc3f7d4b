"""Checks that a benchmark fits into memory before allocating."""

from __future__ import annotations

from pathlib import Path

import torch

from hyaena.config import ModelConfig
from hyaena.errors import CapacityError
from hyaena.sizes import FLOAT32, ModelSizes


def prefill_bytes(config: ModelConfig, length: int, chunk: int, itemsize: int, kv_itemsize: int | None = None) -> int:
    """About what a prefill needs beside the weights: its cache, and a chunk's activations twice, for plain methods.

    ``kv_itemsize`` is of keys and values, see ``ModelSizes.cache_bytes``.
    """
    activations = min(chunk, length) * ModelSizes(config).activation_bytes_per_token(itemsize)
    return _cache_bytes(config, 1, length, itemsize, kv_itemsize) + 2 * activations


def decode_bytes(config: ModelConfig, batch: int, slots: int, itemsize: int, kv_itemsize: int | None = None) -> int:
    """About what decoding needs beside the weights: its cache, and its logits in float32 four times."""
    return _cache_bytes(config, batch, slots, itemsize, kv_itemsize) + 4 * batch * config.vocab_size * FLOAT32


def _cache_bytes(config: ModelConfig, batch: int, slots: int, itemsize: int, kv_itemsize: int | None) -> int:
    sizes = ModelSizes(config)
    return sizes.cache_bytes(batch, slots, itemsize, kv_itemsize) + batch * sizes.state_bytes(itemsize)


def require_memory(needed: int, device: torch.device, what: str, remedy: str) -> None:
    """Refuse what does not fit into the memory that is free now, where the system reports it.

    Raises:
        CapacityError: with both figures and the remedy.
    """
    free = free_bytes(device)
    if free is not None and needed > free:
        raise CapacityError(
            f"{what} needs about {needed / 1e9:.1f} GB and {device} has {free / 1e9:.1f} GB free: {remedy}"
        )


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device, or None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None
