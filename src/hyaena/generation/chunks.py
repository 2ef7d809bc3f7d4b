"""How many tokens of a prompt one pass of the model reads: enough to keep a device busy, and what its memory holds."""

from __future__ import annotations

import torch

from hyaena.config import ModelConfig
from hyaena.model import StripedHyena

PREFILL_CHUNK = {"cpu": 512}
"""Tokens that one pass of the model reads on a kind of device: as many as keep it busy, so that memory stays flat."""
MIN_PREFILL_CHUNK = 2048
"""On other devices; on CUDA devices the least."""
MAX_PREFILL_CHUNK = 32768
"""The most on CUDA devices: products are no faster for more rows, and memory is better kept for the cache."""
SHARE = 0.5
"""Of the free memory that a pass may fill; the rest is for what is not counted: plain long convolutions, fragments."""


def choose_chunk(model: StripedHyena, slots: int) -> int:
    """The tokens of one pass on the model's device.

    On CUDA devices a power of two whose activations fit into ``SHARE`` of the memory that is free now, less the keys
    and values that are still to be stored.

    Args:
        model: on its device.
        slots: tokens, of all rows together, that a cache will be made for.
    """
    device = model.device
    if device.type != "cuda":
        return PREFILL_CHUNK.get(device.type, MIN_PREFILL_CHUNK)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free, but torch's
    free = torch.cuda.mem_get_info(device)[0] + kept
    itemsize = model.dtype.itemsize
    stored = slots * model.config.kv_bytes_per_token(itemsize)  # the states of Hyena layers do not grow
    return fitting_chunk(free - stored, pass_bytes_per_token(model.config, itemsize))


def fitting_chunk(free: int, bytes_per_token: int) -> int:
    """The largest power of two whose bytes fit into ``SHARE`` of what is free, within the bounds above."""
    fitting = max(1, int(SHARE * free) // bytes_per_token)
    return min(MAX_PREFILL_CHUNK, max(MIN_PREFILL_CHUNK, 1 << (fitting.bit_length() - 1)))


def pass_bytes_per_token(config: ModelConfig, itemsize: int) -> int:
    """Most bytes of activations that one token needs in a pass without gradients, with the fused kernels.

    Every part of a layer runs beside four tensors of the residual's width: the layer's input, what its mixer gave,
    their sum, and a norm. Within the parts:

    - Hyena: the projection (three widths) and the operator's output;
    - attention: ``[q | k | v]``, rotated queries and keys, and where there is a past, attention to it, to the present
      and both merged;
    - MLP: both products and the gate's result.
    """
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    parts = {
        "hyena": 4 * width,
        "attention": (queries + 2 * keys) + (queries + keys) + 3 * queries,
    }
    return itemsize * (4 * width + max(3 * inner, *(parts[kind] for kind in set(config.layer_types))))
