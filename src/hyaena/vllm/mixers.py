"""The two kinds of mixers over vLLM's parallel linear layers: attention on its pages, Hyena blocks on their states.

Shapes: T tokens of the whole batch, B sequences, D channels, K taps; every width is this rank's share.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

from hyaena import ops
from hyaena.config import ModelConfig
from hyaena.filters import ExplicitLongFilter, LongFilter, RealLongFilter, ShortFilter
from hyaena.ops import HyenaState
from hyaena.ops.hyena import hyena_packed, packs_in_one_kernel
from hyaena.ops.step import DecodeOperators
from hyaena.packing import Packing
from hyaena.vllm.fp8 import computes_fp8, make_fp8
from hyaena.vllm.states import StatePages


class AttentionMixer(nn.Module):
    """Grouped-query attention. Rotary positions are ours: their tables are float32, and frequencies may be stored."""

    def __init__(self, config: ModelConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        quantization, ranks = vllm_config.quant_config, get_tensor_model_parallel_world_size()
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.heads, self.groups = heads // ranks, max(1, groups // ranks)
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            heads,
            groups,
            bias=config.attention_qkv_bias,
            quant_config=quantization,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.hidden_size,
            config.hidden_size,
            bias=config.attention_out_bias,
            quant_config=quantization,
            prefix=f"{prefix}.o_proj",
        )
        self.attn = Attention(
            self.heads,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=self.groups,
            cache_config=vllm_config.cache_config,
            quant_config=quantization,
            prefix=f"{prefix}.attn",
        )

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        qkv = self.qkv_proj(x)[0].unflatten(-1, (-1, self.head_dim))  # [T,H+2G,head_dim]
        qk, v = qkv.split([self.heads + self.groups, self.groups], dim=1)
        qk = ops.rotate(qk.transpose(0, 1).unsqueeze(0), table).squeeze(0).transpose(0, 1)
        q, k = qk.split([self.heads, self.groups], dim=1)
        y = self.attn(*(t.flatten(1).contiguous() for t in (q, k, v)))
        return self.o_proj(y)[0]


class HyenaMixer(nn.Module):
    """A Hyena block. All between its projections is one opaque operator, which finds layer and states by name."""

    def __init__(
        self, config: ModelConfig, kind: str, pages: StatePages, place: int, vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__()
        quantization = vllm_config.quant_config
        self.prefix, self.place = prefix, place
        self._pages = (pages,)  # a tuple: the pages are no part of this module
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        d = config.hidden_size
        self.width = d // ranks
        fp8 = config.fp8_input_projections and computes_fp8(
            getattr(vllm_config.model_config.hf_config, "fp8", "auto"), vllm_config.device_config.device
        )
        self.in_proj = MergedColumnParallelLinear(
            d,
            [d] * 3,
            bias=config.hyena_in_bias,
            quant_config=None if fp8 else quantization,
            prefix=f"{prefix}.in_proj",
        )
        if fp8:
            make_fp8(self.in_proj)
        self.out_proj = RowParallelLinear(
            d, d, bias=config.hyena_out_bias, quant_config=quantization, prefix=f"{prefix}.out_proj"
        )
        self.short_filter = ShortFilter(3 * self.width, config.short_filter_length, bias=config.short_filter_bias)
        self.long_filter = make_long_filter(config, kind, ranks)
        for module, load in ((self.short_filter, load_thirds), (self.long_filter, load_channels)):
            for parameter in module.parameters():
                parameter.requires_grad_(False)
                set_weight_attrs(parameter, {"weight_loader": load(rank, ranks)})
        context = vllm_config.compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"duplicate layer name: {prefix}")
        context[prefix] = self

    def forward(self, x: Tensor) -> Tensor:
        z = self.in_proj(x)[0]
        y = torch.empty(z.shape[0], self.width, dtype=z.dtype, device=z.device)
        torch.ops.vllm.hyaena_mixer(z, y, self.prefix)
        return self.out_proj(y)[0]

    def mix(self, z: Tensor, y: Tensor) -> None:
        """Evaluate ``ops.hyena`` for all sequences of a batch, z [T,3D] -> y [T,D]; their states move on in place.

        Decoding sequences stand first, one token each (or, with drafts, some), and those that read a prompt after them.
        """
        pages = self._pages[0]
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # the run that measures memory: a prompt without a state
            y.copy_(ops.hyena(z.unsqueeze(0), *self.filters())[0].squeeze(0))
            return
        m = metadata[pages.prefix]
        states = self.states()
        decodes = m.num_decode_tokens
        if decodes and m.num_accepted_tokens is not None:
            self.verify(z, y, m, states)
        elif decodes:
            slots = m.state_indices_tensor_d[:decodes, 0]
            y[:decodes] = step_operators(z).hyena_at(z[:decodes], *self.filters(), states, slots, slots)
        if m.num_prefills:
            packing = packing_of(m, z.device)
            here = slice(decodes, decodes + m.num_prefill_tokens)
            slots = m.state_indices_tensor_p.long()
            before = HyenaState(*(_where(m.has_initial_states_p, t[slots], 0) for t in states))  # pages are not cleared
            out, after = self.read_prompts(z[None, here], before, packing)
            y[here] = out.squeeze(0)
            for stored, now in zip(states, after, strict=True):
                stored[slots] = now.to(stored.dtype)

    def states(self) -> HyenaState:
        """The states of this layer in vLLM's pages, [blocks,3D,K-1] and [blocks,D,…]."""
        short, long = self._pages[0].states(self.place)
        return HyenaState(short, torch.view_as_complex(long) if isinstance(self.long_filter, LongFilter) else long)

    def filters(self) -> tuple[Tensor, Tensor | None, ops.Filter]:
        """Weight and bias of the short filter, and the long filter."""
        return self.short_filter.weight, self.short_filter.bias, self.long_filter.view()  # type: ignore[operator]

    def read_prompts(self, z: Tensor, state: HyenaState, packing: Packing) -> tuple[Tensor, HyenaState]:
        """``ops.hyena`` of the next tokens z [1,T,3D] of several prompts, each from its state: all in one kernel where
        it takes them, else those of like lengths together."""
        weight, bias, long_filter = self.filters()
        backend = ops.resolve_backend(device=z.device, dtype=z.dtype)
        longest = max(stop - start for start, stop in packing.spans)
        if packs_in_one_kernel(z, weight, long_filter, state, longest, backend):
            return packing.apply_together(
                lambda z, state, rows, stops: hyena_packed(z, weight, bias, long_filter, state, rows, stops),
                z,
                state,
                None,
            )
        return packing.apply(
            lambda z, state, mask, reset: ops.hyena(z, weight, bias, long_filter, state, mask=mask, backend=backend),
            z,
            state,
            with_states=lambda z, state, mask, stops: ops.hyena_states(
                z, weight, bias, long_filter, state, stops, mask=mask, backend=backend
            ),
        )

    def verify(self, z: Tensor, y: Tensor, m: Any, states: HyenaState) -> None:
        """Speculative decoding: every sequence reads its last token and some drafts, and keeps the state after each.

        Slot j of a sequence holds the state after its j-th new token; the pass after it starts from the state of the
        last token that was accepted.
        """
        rows, offsets = m.num_decodes, m.query_start_loc_d.long()
        slots = m.state_indices_tensor_d[:rows]
        last = (m.num_accepted_tokens[:rows].long() - 1).clamp(min=0)
        source = slots.gather(1, last[:, None]).squeeze(1)
        lengths = offsets[1 : rows + 1] - offsets[:rows]
        operators, filters = step_operators(z), self.filters()
        for j in range(slots.shape[1]):
            # Rows with fewer drafts read their first token again; what it gives is kept nowhere. Nothing here waits for
            # the device, so that a CUDA graph can hold it.
            inside = lengths > j
            tokens = torch.where(inside, offsets[:rows] + j, offsets[:rows]).clamp(max=len(z) - 1)
            target = torch.where(inside, slots[:, j], NULL_BLOCK_ID)
            out = operators.hyena_at(z[tokens], *filters, states, source, target)
            y[tokens] = torch.where(inside[:, None], out, y[tokens])
            source = slots[:, j]


def step_operators(z: Tensor) -> DecodeOperators:
    """What takes a step on states in pages: the kernels, which update them in place, or plain torch.

    The kernels for CPUs are not used: where numba was imported, vLLM 0.32 starts no further engine.
    """
    return _step_operators(ops.resolve_backend(device=z.device, dtype=z.dtype).hyena)


@cache
def _step_operators(fused: bool) -> DecodeOperators:
    if not fused:
        return DecodeOperators()
    from hyaena.ops.triton.decode.operators import FusedDecodeOperators  # Triton comes with torch for GPUs only

    return FusedDecodeOperators()


def _where(rows: Tensor, yes: Tensor, no: Tensor | float) -> Tensor:
    """``torch.where`` by rows: bool [B], the others [B,…]."""
    return torch.where(rows.view(-1, *[1] * (yes.ndim - 1)), yes, no)


def make_long_filter(config: ModelConfig, kind: str, ranks: int) -> nn.Module:
    """The parameters of this rank's share of a long filter, by the kind of the layer."""
    width = config.hidden_size // ranks

    def groups(filters: int | None) -> int | None:
        return None if filters is None else filters // ranks

    if kind == "hyena":
        return LongFilter(width, config.state_size)
    if kind == "hyena_li":
        return RealLongFilter(width, config.state_size)
    if kind == "hyena_se":
        taps, filters, skip = config.se_filter_length, config.se_filter_groups, config.se_filter_skip
    else:
        taps, filters, skip = config.mr_filter_length, config.mr_filter_groups, config.mr_filter_skip
    return ExplicitLongFilter(width, taps, groups=groups(filters), skip=skip)


def load_channels(rank: int, ranks: int) -> Callable[[Tensor, Tensor], None]:
    """Load a rank's share of a tensor of channels or filters, [D,…]."""

    def load(parameter: Tensor, loaded: Tensor) -> None:
        parameter.data.copy_(loaded.chunk(ranks)[rank])

    return load


def load_thirds(rank: int, ranks: int) -> Callable[[Tensor, Tensor], None]:
    """Load a rank's share of a tensor of ``[x2 | x1 | v]``, [3D,…]: each third is shared out by itself."""

    def load(parameter: Tensor, loaded: Tensor) -> None:
        parameter.data.copy_(torch.cat([third.chunk(ranks)[rank] for third in loaded.chunk(3)]))

    return load


def packing_of(m: Any, device: torch.device) -> Packing:
    """The prompts of a batch as rows of one pass. Made once for all layers that share the metadata of a batch."""
    found = getattr(m, "hyaena_packing", None)
    if found is None:
        offsets = m.query_start_loc_p.tolist()
        counts = [stop - start for start, stop in pairwise(offsets)]
        found = m.hyaena_packing = Packing(m.has_initial_states_p.tolist(), counts, device)
    return found


@eager_break_during_capture
def hyaena_mixer(z: torch.Tensor, y: torch.Tensor, layer_name: str) -> None:
    """Call a layer by its name, so that a compiled graph need not know its states."""
    get_forward_context().no_compile_layers[layer_name].mix(z, y)


def _hyaena_mixer(z: torch.Tensor, y: torch.Tensor, layer_name: str) -> None:
    return


direct_register_custom_op("hyaena_mixer", hyaena_mixer, mutates_args=["y"], fake_impl=_hyaena_mixer)
