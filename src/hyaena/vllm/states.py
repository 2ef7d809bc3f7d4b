"""The states of Hyena layers in vLLM's pages: which layers share a page, and where each state lies in it.

vLLM keeps what a sequence needs in pages of one size, those of attention layers and those of states alike. The states
of the three kinds of Hyena layers of Evo 2 differ by a factor of 14, so a page for each layer would be mostly padding
(58 MB for 23). Here the layers of a ``StatePages`` share a page, side by side; ``layers_per_page`` chooses how many.

Shapes: D channels of this rank, K taps of the short filter, N modes, W taps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from hyaena.config import ModelConfig

T = TypeVar("T")

ALIGNMENT = 16
"""Bytes to which the states in a page are aligned, so that kernels may read them in vectors."""

TOLERANCE = 0.05
"""How much padding, relative to the states, is accepted for shorter blocks of tokens."""


class Part(NamedTuple):
    """One tensor of a layer's state within a page: its shape per sequence, its dtype, and its first byte."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def of(self, pages: Tensor) -> Tensor:
        """The view of this part in pages int8 [blocks,bytes]: [blocks,*shape], strided by the page."""
        return pages[:, self.start : self.stop].view(self.dtype).unflatten(1, self.shape)


class LayerState(NamedTuple):
    """The state of one Hyena layer: what ``ops.HyenaState`` holds, complex numbers as real pairs."""

    short: Part
    long: Part


def long_shape(config: ModelConfig, kind: str, ranks: int) -> tuple[int, ...]:
    """The shape of one sequence's state of a long filter, float32."""
    channels = config.hidden_size // ranks
    return {
        "hyena": (channels, config.state_size, 2),
        "hyena_li": (channels, config.state_size),
        "hyena_se": (channels, config.se_filter_length - 1),
        "hyena_mr": (channels, config.mr_filter_length - 1),
    }[kind]


def place(config: ModelConfig, kinds: Sequence[str], ranks: int, dtype: torch.dtype) -> tuple[list[LayerState], int]:
    """Where the states of layers of these kinds lie in one page, and how many bytes they take."""
    layers, end = [], 0
    for kind in kinds:
        long = Part(long_shape(config, kind, ranks), torch.float32, end)
        short = Part((3 * config.hidden_size // ranks, config.short_filter_length - 1), dtype, _aligned(long.stop))
        layers.append(LayerState(short, long))
        end = _aligned(short.stop)
    return layers, end


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def split(kinds: Sequence[T], layers: int) -> list[Sequence[T]]:
    """The layers of every page, so many of them in each but the last."""
    return [kinds[i : i + layers] for i in range(0, len(kinds), layers)]


class Plan(NamedTuple):
    """How vLLM will account for the states of one sequence.

    Attributes:
        layers: Hyena layers whose states share a page.
        block: tokens of a block of attention.
        states: bytes of states of one sequence, padding and empty places included.
        exact: bytes without them.
        attention: bytes of a token's keys and values for one that is needed; above 1 where places stay empty.
    """

    layers: int
    block: int
    states: int
    exact: int
    attention: float


def plan(config: ModelConfig, ranks: int, dtype: torch.dtype, grain: int, layers: int) -> Plan:
    """What pages of so many layers cost: vLLM groups as many pages as there are of the rarer kind, and rounds up."""
    kinds = [kind for kind in config.layer_types if kind != "attention"]
    exact = sum(place(config, [kind], ranks, dtype)[1] for kind in kinds)
    sizes = [place(config, part, ranks, dtype)[1] for part in split(kinds, layers)]
    attention = config.num_layers - len(kinds)
    if not attention:
        return Plan(layers, grain, max(sizes) * len(sizes), exact, 1.0)
    token = 2 * max(1, config.num_key_value_heads // ranks) * config.head_dim * dtype.itemsize
    block = -(-max(sizes) // (token * grain)) * grain
    pages = sorted((attention, len(sizes)))
    group = pages[1] if pages[1] < 1.5 * pages[0] else pages[0]
    places = [-(-count // group) * group for count in (attention, len(sizes))]
    return Plan(layers, block, places[1] * block * token, exact, places[0] / attention)


def layers_per_page(config: ModelConfig, ranks: int, dtype: torch.dtype, grain: int) -> int:
    """The fewest layers per page, for short blocks of tokens, that waste no more than ``TOLERANCE``, or the least."""
    count = sum(kind != "attention" for kind in config.layer_types)
    plans = [plan(config, ranks, dtype, grain, layers) for layers in range(1, count + 1)]

    def waste(plan: Plan) -> float:
        return max(plan.states / plan.exact, plan.attention) - 1

    least = min(map(waste, plans))
    return next(plan.layers for plan in plans if waste(plan) <= max(least, TOLERANCE))


def chosen_layers(vllm_config: VllmConfig) -> int:
    """``state_layers`` of ``--hf-overrides`` or what ``layers_per_page`` chooses.

    Blocks of attention are multiples of 32 tokens on a CPU, and of 16 elsewhere.
    """
    model = vllm_config.model_config
    given = getattr(model.hf_config, "state_layers", None)
    grain = 32 if current_platform.is_cpu() else 16
    ranks = vllm_config.parallel_config.tensor_parallel_size
    return given or layers_per_page(model.hf_config.record(), ranks, model.dtype, grain)


class StatePages(nn.Module, MambaBase):
    """The states of some Hyena layers: one page of vLLM's for each sequence, which holds exactly what they need.

    vLLM sees one tensor of bytes; its layers see ``states``.
    """

    def __init__(self, config: ModelConfig, kinds: Sequence[str], vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        ranks = vllm_config.parallel_config.tensor_parallel_size
        self.prefix = prefix
        self.layers, self.size = place(config, kinds, ranks, vllm_config.model_config.dtype)
        context = vllm_config.compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"duplicate layer name: {prefix}")
        context[prefix] = self
        self.kv_cache = (torch.tensor([], device="cpu"),)

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((self.size,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.int8,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """The plainest builder of metadata that passes the numbers of accepted tokens on."""
        return MambaAttentionBackendEnum.SHORT_CONV

    def states(self, place: int) -> tuple[Tensor, Tensor]:
        """Of the layer at a place: [blocks,3D,K-1] and [blocks,D,…], views that are strided by the page."""
        (pages,), layer = self.kv_cache, self.layers[place]
        return layer.short.of(pages), layer.long.of(pages)
