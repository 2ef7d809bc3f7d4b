"""The layers of a StripedHyena model: a mixer and a gated MLP, each behind its norm.

    x += mixer(mixer_norm(x));  x += mlp(mlp_norm(x))
    mixer:  grouped-query attention, or a Hyena block with one of several kinds of long filter

A layer owns what a layer is: ``make_state`` allocates what it remembers, ``forward`` reads any number of tokens, and
``step`` reads one token per row with its state updated in place, over operators that can be captured in a CUDA graph.
Forward serves training, prefill, chunked prefill, continuation and decoding.

Shapes: B batch, T time, D channels, H query heads, G key/value heads, K short-filter taps, N modes, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hyaena import ops
from hyaena.config import ModelConfig, unknown_layer_kind
from hyaena.context import ForwardContext
from hyaena.errors import InputError, UnsupportedError
from hyaena.filters import ExplicitLongFilter, Float32Parameters, LongFilter, RealLongFilter, ShortFilter
from hyaena.fp8 import FP8Linear
from hyaena.hooks import has_hooks
from hyaena.ops import HyenaState, KVState, PagedKVState, PagedRows, StepContext
from hyaena.ops.cpu.team import compute_alone_behind_forks
from hyaena.ops.hyena import RowTables, hyena_packed, packs_in_one_kernel
from hyaena.ops.slots import slots_of
from hyaena.quant import QuantizedLinear


class Mixer(Protocol):
    """What the first half of a layer must be able to do. A module of the user's own is as good as those below.

    A mixer that remembers keys and values may name their sizes, ``kv_shape() -> (G, head_dim)``. In a cache on pages
    its state is a ``PagedKVState`` then, and it is given the dtype of the cache; a mixer without that method has the
    state that ``make_state`` makes in the model's dtype.

    A mixer whose forward keeps packed documents (``context.reset``) and packed rows (``context.packing``) apart says so
    by ``packs = True``; one whose step leaves all that depends on other tokens of its row to ``context.operators``, so
    that they can read several tokens of a row together, by ``packs_steps = True``.
    """

    def make_state(self, batch: int, *, max_length: int | None, dtype: torch.dtype, device: torch.device | str) -> Any:
        """An empty state of ``batch`` rows (see ``cache.State``), for at most ``max_length`` tokens, or growing."""
        ...

    def forward(self, x: Tensor, context: ForwardContext, state: Any, keep: int) -> tuple[Tensor, Any]:
        """Read x [B,T,D] after ``state``, which is None without a cache; the output [B,keep,D] at the last positions.

        Returns the state after x. Nothing of the state that was given may change where it would be seen: a pass that
        fails later must leave the cache as it was.
        """
        ...

    def step(self, x: Tensor, norm: ops.Norm, state: Any, context: StepContext) -> Tensor:
        """``x + mixer(norm(x))`` for one token per row, x [B,D]; the state is updated in place."""
        ...


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale; see ``ops.rms_norm`` for the two conventions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.norm_eps
        self.eps_inside_root = config.norm_eps_inside_root

    def forward(self, x: Tensor, backend: str | ops.Backend = "auto") -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, eps_inside_root=self.eps_inside_root, backend=backend)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}, eps_inside_root={self.eps_inside_root}"

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        nn.init.ones_(self.weight)


class Rotary(Float32Parameters):
    """The rotary tables of a model; see ``ops.rotary_table``.

    Attributes:
        frequencies: float32 [head_dim/2] where checkpoints hold them, else None: then they are powers of a base.
    """

    frequencies: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.theta, self.factor = config.head_dim, config.rope_theta, config.rope_scaling_factor
        self.rounds = config.rope_tables_rounded
        stored = torch.empty(self.head_dim // 2, dtype=torch.float32) if config.rope_frequencies_stored else None
        self.register_buffer("frequencies", stored)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin at int positions [...], each [...,head_dim/2], for a model of a dtype."""
        options = {"frequencies": self.frequencies, "rounds": self.rounds, "dtype": dtype}
        return ops.rotary_table(positions, self.head_dim, self.theta, self.factor, **options)

    def powers(self, device: torch.device | str = "cpu") -> Tensor:
        """The frequencies that the configuration gives, float32."""
        return ops.rotary_frequencies(self.head_dim, self.theta, torch.float32, device)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        if self.frequencies is not None:
            self.frequencies.copy_(self.powers())


class GatedMLP(nn.Module):
    """``down(act(gate(x)) · up(x))``, without biases."""

    def __init__(self, config: ModelConfig, activation: str | None = None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = activation or config.activation

    def forward(self, x: Tensor, backend: str | ops.Backend = "auto") -> Tensor:
        return self.down_proj(ops.gate(self.gate_proj(x), self.up_proj(x), self.activation, backend=backend))

    def step(self, x: Tensor, norm: ops.Norm, context: StepContext) -> Tensor:
        """``x + mlp(norm(x))`` for one token per row, x [B,D]."""
        gate, up, down = record(self.gate_proj), record(self.up_proj), record(self.down_proj)
        h = context.operators.gate(x, gate, up, norm=norm, activation=self.activation)
        return context.operators.linear(h, down, residual=x)

    def output_projection(self) -> nn.Module:
        return self.down_proj


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and one fused projection ``[q | k | v]``."""

    packs = True
    packs_steps = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        width = (self.heads + 2 * self.groups) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=config.attention_qkv_bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=config.attention_out_bias)

    def make_state(
        self, batch: int, *, max_length: int | None, dtype: torch.dtype, device: torch.device | str, **_: Any
    ) -> KVState:
        capacity = INITIAL_CAPACITY if max_length is None else max_length
        return KVState.allocate(batch, self.groups, capacity, self.head_dim, dtype, device)

    def kv_shape(self) -> tuple[int, int]:
        """Key/value heads, and channels of a head, of the pages of this layer."""
        return self.groups, self.head_dim

    def forward(
        self, x: Tensor, context: ForwardContext, state: KVState | PagedKVState | None, keep: int
    ) -> tuple[Tensor, KVState | PagedKVState | None]:
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B,H+2G,T,head_dim]
        qk, v = qkv.split([self.heads + self.groups, self.groups], dim=1)
        q, k = ops.rotate(qk, context.rotary, backend=context.backend).split([self.heads, self.groups], dim=1)
        q = q[:, :, -keep:]
        kv = None if state is None else state.through(context.pages)
        if kv is not None and context.lengths is not None and context.counts is not None:
            if k.requires_grad and not kv.slots.differentiable:
                raise UnsupportedError(
                    f"keys and values in {str(kv.dtype).removeprefix('torch.')} carry no gradients: read under "
                    "torch.no_grad(), or leave the cache in the model's dtype"
                )
            if context.packing is not None:
                kv.write_packed(k, v, context.lengths, context.counts)
            else:
                kv.write(k, v, context.lengths, None if context.padding is None else context.padding[1])
            k, v = kv.slots.rounded(k), kv.slots.rounded(v)  # this pass sees the numbers that later ones will see
        elif context.kv_dtype is not None:
            slots = slots_of(context.kv_dtype)
            k, v = slots.rounded(k), slots.rounded(v)
        if kv is None or context.lengths is None or not any(context.lengths):
            padding = None if context.padding is None else context.padding[0]
            y = ops.attention(q, k, v, padding=padding, documents=context.documents)
        elif context.packing is not None:
            parts = []
            for row, (start, stop) in enumerate(context.packing.spans):
                run, here = kv.row(row, context.lengths[row] + stop - start), (..., slice(start, stop), slice(None))
                run = run.with_newest(k[here], v[here]) if k.requires_grad else run
                parts.append(ops.attention(q[here], *run.read(q)))
            y = torch.cat(parts, dim=2)
        else:
            y = self._attend_to_past(q, k, v, context, kv)
        return self.o_proj(y.transpose(1, 2).flatten(2)), state

    def _attend_to_past(
        self, q: Tensor, k: Tensor, v: Tensor, context: ForwardContext, kv: KVState | PagedRows
    ) -> Tensor:
        """Attention of q [B,H,keep,head_dim] to what the rows hold, of which k and v are the newest."""
        assert context.lengths is not None
        runs = kv.runs(context.lengths, extra=k.shape[2])
        if k.requires_grad:
            runs = [run.with_newest(k, v) for run in runs]
        parts = []
        for run in runs:
            rows = run.rows
            if context.padding is not None and not context.lengths[rows.start]:  # they begin in this pass
                parts.append(ops.attention(q[rows], k[rows], v[rows], padding=context.padding[0][rows]))
            else:
                parts.append(ops.attention(q[rows], *run.read(q)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def step(self, x: Tensor, norm: ops.Norm, state: KVState | PagedKVState, context: StepContext) -> Tensor:
        operators = context.operators
        qkv = operators.linear(x, record(self.qkv_proj), norm=norm)
        y = operators.attention(qkv, state, context)
        return operators.linear(y.flatten(1), record(self.o_proj), residual=x)

    def output_projection(self) -> nn.Module:
        return self.o_proj


class Hyena(nn.Module):
    """A Hyena block: project to ``[x2 | x1 | v]``, gate, convolve, gate, project back.

    Args:
        config: of the model.
        long_filter: the module of the long filter; calling it gives the filter that ``ops.hyena`` evaluates.
    """

    packs = True
    packs_steps = True

    def __init__(self, config: ModelConfig, long_filter: nn.Module) -> None:
        super().__init__()
        width = config.hidden_size
        fp8 = config.fp8_input_projections
        self.in_proj = FP8Linear(width, 3 * width) if fp8 else nn.Linear(width, 3 * width, bias=config.hyena_in_bias)
        self.short_filter = ShortFilter(3 * width, config.short_filter_length, bias=config.short_filter_bias)
        self.long_filter = long_filter
        self.out_proj = nn.Linear(width, width, bias=config.hyena_out_bias)

    def make_state(
        self,
        batch: int,
        *,
        max_length: int | None,
        dtype: torch.dtype,
        device: torch.device | str,
        method: str = "auto",
        tolerance: float = ops.TRUNCATION_TOLERANCE,
    ) -> HyenaState:
        """An empty state; for ``method="truncated"`` of the window that ``tolerance`` leaves of the long filter."""
        weight = self.short_filter.weight
        short = torch.zeros(batch, weight.shape[0], weight.shape[1] - 1, dtype=dtype, device=device)
        long_filter = self.long_filter()
        if ops.capabilities(method).state == "window" and (window := self.truncation_window(tolerance)) is not None:
            long_filter = ops.truncate(long_filter, window=window)[0]
        long = long_filter.initial_state(batch, weight.shape[0] // 3, method)
        return HyenaState(short, torch.zeros_like(long, device=device))  # also where the weights are on the meta device

    def truncation_window(self, tolerance: float) -> int | None:
        """How many taps ``method="truncated"`` keeps of the long filter; None where it is not a filter of modes."""
        long_filter = self.long_filter()
        modes = isinstance(long_filter, ops.ModalFilter | ops.RealModalFilter)
        return ops.truncation_window(long_filter, tolerance) if modes else None

    def forward(
        self, x: Tensor, context: ForwardContext, state: HyenaState | None, keep: int
    ) -> tuple[Tensor, HyenaState]:
        (weight, bias), long_filter = self.short_filter(), self.long_filter()

        options: dict[str, Any] = {"method": context.method, "backend": context.backend}

        def operator(
            z: Tensor, state: HyenaState | None, mask: Tensor | None, reset: Tensor | None
        ) -> tuple[Tensor, HyenaState]:
            return ops.hyena(z, weight, bias, long_filter, state, mask=mask, reset=reset, **options)

        def with_states(
            z: Tensor, state: HyenaState | None, mask: Tensor | None, stops: Sequence[int | Tensor]
        ) -> tuple[Tensor, HyenaState, list[HyenaState]]:
            return ops.hyena_states(z, weight, bias, long_filter, state, stops, mask=mask, **options)

        def together(
            z: Tensor, state: HyenaState, rows: RowTables, stops: int
        ) -> tuple[Tensor, HyenaState, HyenaState | None]:
            return hyena_packed(z, weight, bias, long_filter, state, rows, stops)

        z, longest = self.in_proj(x), max(context.counts or [0])
        packs = (
            context.packing is not None
            and context.method == "auto"
            and packs_in_one_kernel(z, weight, long_filter, state, longest, context.backend)
        )
        y, after = context.evaluate(operator, z, state, with_states, together if packs else None)
        return self.out_proj(y[:, -keep:]), after

    def step(self, x: Tensor, norm: ops.Norm, state: HyenaState, context: StepContext) -> Tensor:
        operators, short = context.operators, self.short_filter
        z = operators.linear(x, record(self.in_proj), norm=norm)
        y = operators.hyena(z, short.weight, short.bias, self.long_filter.view(), state)  # type: ignore[operator]
        return operators.linear(y, record(self.out_proj), residual=x)

    def output_projection(self) -> nn.Module:
        return self.out_proj


def _hyena(config: ModelConfig) -> Hyena:
    return Hyena(config, LongFilter(config.hidden_size, config.state_size))


def _hyena_li(config: ModelConfig) -> Hyena:
    return Hyena(config, RealLongFilter(config.hidden_size, config.state_size))


def _hyena_se(config: ModelConfig) -> Hyena:
    taps, groups = config.se_filter_length, config.se_filter_groups
    return Hyena(config, ExplicitLongFilter(config.hidden_size, taps, groups=groups, skip=config.se_filter_skip))


def _hyena_mr(config: ModelConfig) -> Hyena:
    taps, groups = config.mr_filter_length, config.mr_filter_groups
    return Hyena(config, ExplicitLongFilter(config.hidden_size, taps, groups=groups, skip=config.mr_filter_skip))


Mixers = Mapping[str, Callable[[ModelConfig], nn.Module]]

MIXERS: Mixers = {
    "attention": Attention,
    "hyena": _hyena,
    "hyena_se": _hyena_se,
    "hyena_mr": _hyena_mr,
    "hyena_li": _hyena_li,
}
"""What makes the mixer of each kind of layer. ``StripedHyena(config, mixers={**MIXERS, "mine": make})`` adds a kind."""

INITIAL_CAPACITY = 256
"""Tokens for which a growing cache has room at first; the room then doubles."""


class Layer(nn.Module):
    """One stripe: a mixer and a gated MLP, each behind its norm, each added to the residual stream.

    A layer reads all T positions into its state, and computes its output at the last ``keep`` of them only.
    """

    def __init__(self, config: ModelConfig, mixer: nn.Module, index: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(config)
        self.mlp = GatedMLP(config, config.activation_of(index))

    def forward(
        self, x: Tensor, context: ForwardContext, state: Any, keep: int, places: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Read x [B,T,D] after ``state``: the output at the last ``keep`` positions, or those ``places`` of them."""
        y, state = self.mixer(call(self.mixer_norm, x, context), context, state, keep)
        x = x[:, -keep:] + y
        x = x if places is None else x[:, places]
        return x + call(self.mlp, call(self.mlp_norm, x, context), context), state

    def step(self, x: Tensor, state: Any, context: StepContext, last: bool = False) -> Tensor:
        """The layer for one token per row, x [B,D]; the state is updated in place.

        The last layer computes its output for those tokens only whose successors are chosen.
        """
        x = self.mixer.step(x, norm_record(self.mixer_norm), state, context)  # type: ignore[operator]
        x = context.operators.last_tokens(x) if last else x
        return self.mlp.step(x, norm_record(self.mlp_norm), context)


def call(module: nn.Module, x: Tensor, context: ForwardContext) -> Tensor:
    """Call a norm or an MLP; those of ours are told the backend, which then need not be resolved again."""
    return module(x, context.backend) if isinstance(module, RMSNorm | GatedMLP) else module(x)


def record(module: nn.Module) -> ops.Linear:
    """The weights of a linear layer of ours, which kernels may read; any other module itself, to be called."""
    if type(module) is QuantizedLinear and not has_hooks(module):
        return module.record()
    plain = type(module) is nn.Linear or (type(module) is FP8Linear and module.is_plain())
    if plain and type(module.weight) in (nn.Parameter, Tensor) and not has_hooks(module):  # torchao puts others there
        return ops.Dense(module.weight, module.bias)  # type: ignore[arg-type]
    return module


def norm_record(module: nn.Module) -> ops.Norm:
    """The weight and convention of a norm of ours, which kernels may read; any other module itself."""
    if type(module) is RMSNorm and not has_hooks(module):
        return ops.RMSNormWeight(module.weight, module.eps, module.eps_inside_root)
    return module


def make_layers(config: ModelConfig, mixers: Mixers = MIXERS) -> nn.ModuleList:
    """The layers that a configuration lists. A process that has some may fork from then on.

    Raises:
        ConfigError: a kind of layer that ``mixers`` does not know.
    """
    compute_alone_behind_forks()
    for i, kind in enumerate(config.layer_types):
        if kind not in mixers:
            raise unknown_layer_kind(kind, i, mixers)
    return nn.ModuleList(Layer(config, mixers[kind](config), i) for i, kind in enumerate(config.layer_types))


def embed(table: nn.Module, ids: Tensor, vocab_size: int) -> Tensor:
    """Look up ids [B,T]: [B,T,D].

    Raises:
        InputError: an id outside the vocabulary, where the table is on a CPU.
    """
    if ids.dtype not in (torch.int32, torch.int64):  # an embedding takes no others
        ids = ids.long()
    try:
        return table(ids)
    except IndexError:  # on a CPU; elsewhere looking at the ids would stall the device
        low, high = (int(t) for t in torch.aminmax(ids))
        raise InputError(
            f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}: "
            "use the tokenizer of this model"
        ) from None


def init_module(
    module: nn.Module, config: ModelConfig, *, writes_residual: bool = False, generator: torch.Generator | None = None
) -> None:
    """Initialise one module for training from scratch, as ``StripedHyena.init_weights`` says."""
    width = config.hidden_size
    if hasattr(module, "init_weights"):
        module.init_weights(generator)  # type: ignore[operator]
    elif isinstance(module, nn.Linear):
        std = 2 / (config.num_layers * math.sqrt(width)) if writes_residual else math.sqrt(2 / (5 * width))
        nn.init.normal_(module.weight, std=std, generator=generator)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=math.sqrt(2 / (5 * width)), generator=generator)


def step_unsupported_reason(layers: nn.ModuleList, device: torch.device) -> str | None:
    """Why the method ``step`` of layers cannot compute what their ``forward`` does, or None."""
    for i, layer in enumerate(layers):
        if type(layer) is not Layer or type(layer.mlp) is not GatedMLP:
            part = layer if type(layer) is not Layer else layer.mlp
            return f"layer {i} has a {type(part).__name__}, which static decoding does not support"
        if not hasattr(layer.mixer, "step"):
            return f"the mixer of layer {i}, a {type(layer.mixer).__name__}, has no method step"
        for name, module in (("layer", layer), ("mixer", layer.mixer), ("mlp", layer.mlp)):
            if has_hooks(module):
                return f"the {name} of layer {i} has forward hooks, which static decoding would not call"
    return "autocast is on" if torch.is_autocast_enabled(device.type) else None
