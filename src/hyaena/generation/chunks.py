"""Work in chunks: the number of tokens per forward pass, as many as keep a device busy and its memory allows."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

import torch
from torch import nn

from hyaena.model import StripedHyena
from hyaena.sizes import LAYER_SIZES, LayerSize, ModelSizes

T = TypeVar("T")

PREFILL_CHUNK = {"cpu": 512}
"""Tokens that one pass of the model reads on a kind of device: as many as keep it busy, so that memory stays flat."""
MIN_PREFILL_CHUNK = 2048
"""On other devices; on CUDA devices the least."""
MAX_PREFILL_CHUNK = 32768
"""The most on CUDA devices: products are no faster for more rows, and memory is better kept for the cache."""
MEMORY_FRACTION = 0.5
"""Of the free memory that a pass may fill; the rest is for what is not counted: plain long convolutions, fragments."""


def choose_chunk(model: StripedHyena, slots: int) -> int:
    """The tokens of one pass on the model's device.

    On CUDA devices a power of two whose activations fit into ``MEMORY_FRACTION`` of the memory that is free now, less
    the keys and values that are still to be stored.

    Args:
        model: on its device.
        slots: tokens, of all rows together, that a cache will be made for.
    """
    device = model.device
    if device.type != "cuda":
        return PREFILL_CHUNK.get(device.type, MIN_PREFILL_CHUNK)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free, but torch's
    free = torch.cuda.mem_get_info(device)[0] + kept
    sizes, itemsize = _sizes(model), model.dtype.itemsize
    stored = slots * sizes.kv_bytes_per_token(model.cache_dtype.itemsize)  # the states of Hyena layers do not grow
    return fitting_chunk(free - stored, sizes.activation_bytes_per_token(itemsize))


def _sizes(model: StripedHyena) -> ModelSizes:
    """The sizes of a model, those of mixers of its own kinds measured."""
    kinds = dict(LAYER_SIZES)
    for i, kind in enumerate(model.config.layer_types):
        if kind not in kinds:
            size = measured_size(model.layers[i].mixer, model.dtype)  # pyright: ignore[reportArgumentType]
            kinds[kind] = lambda _, size=size: size
    return ModelSizes(model.config, kinds)


def measured_size(mixer: nn.Module, dtype: torch.dtype) -> LayerSize:
    """The size of a mixer that ``LAYER_SIZES`` does not know, from its parameters and its states.

    Activations are an estimate: the results of all its linear layers, each beside one more tensor of the same width.
    """

    def stored(length: int) -> int:
        state = mixer.make_state(1, max_length=length, dtype=dtype, device="meta")  # type: ignore[operator]
        return sum(t.numel() * t.element_size() for t in state.tensors()) // dtype.itemsize

    per_token = stored(2) - stored(1)
    return LayerSize(
        parameters=sum(p.numel() for p in mixer.parameters()),
        kv_per_token=per_token,
        state=stored(1) - per_token,
        activations_per_token=2 * sum(getattr(module, "out_features", 0) for module in mixer.modules()),
    )


def fitting_chunk(free: int, bytes_per_token: int) -> int:
    """The largest power of two whose bytes fit into ``MEMORY_FRACTION`` of what is free, within the bounds above."""
    fitting = max(1, int(MEMORY_FRACTION * free) // bytes_per_token)
    return min(MAX_PREFILL_CHUNK, max(MIN_PREFILL_CHUNK, 1 << (fitting.bit_length() - 1)))


def run_steps(steps: Generator[float, None, T]) -> T:
    """Go through all steps of work that is cut into chunks; what the generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
