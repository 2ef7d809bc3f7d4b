"""The StripedHyena architecture.

    tokens -> embed -> layers -> norm -> head -> logits
    layer:  x += mixer(mixer_norm(x));  x += mlp(mlp_norm(x))
    mixer:  grouped-query attention, or a Hyena block with one of several kinds of long filter

A layer owns what a layer is: ``make_state`` allocates what it remembers, ``forward`` reads any number of tokens, and
``step`` reads one token per row with its state updated in place, over operators that can be captured in a CUDA graph.
Forward serves training, prefill, chunked prefill, continuation and decoding: ``model(a ++ b)`` equals
``model(a, cache)`` then ``model(b, cache)``.

Shapes: B batch, T time, D channels, H query heads, G key/value heads, K short-filter taps, N modes, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hyaena import ops
from hyaena.arguments import kind_of, whole
from hyaena.cache import Cache
from hyaena.config import ModelConfig, unknown_layer_kind
from hyaena.context import ForwardContext
from hyaena.errors import InputError, UnsupportedError
from hyaena.filters import ExplicitLongFilter, LongFilter, RealLongFilter, ShortFilter
from hyaena.formats.stripedhyena import tensors as original
from hyaena.ops import HyenaState, KVState, PagedKVState, PagedRows, PagePool, StepContext
from hyaena.ops.hyena import RowTables, hyena_packed, packs_in_one_kernel
from hyaena.packing import Snapshots


class Mixer(Protocol):
    """What the first half of a layer must be able to do. A module of the user's own is as good as those below.

    A mixer that remembers keys and values may name their sizes, ``kv_shape() -> (G, head_dim)``. In a cache on pages
    its state is a ``PagedKVState`` then; a mixer without that method has the state that ``make_state`` makes.

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


class GatedMLP(nn.Module):
    """``down(act(gate(x)) · up(x))``, without biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = config.activation

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
            if context.packing is not None:
                kv.write_packed(k, v, context.lengths, context.counts)
            else:
                kv.write(k, v, context.lengths, None if context.padding is None else context.padding[1])
        if kv is None or context.lengths is None or not any(context.lengths):
            padding = None if context.padding is None else context.padding[0]
            y = ops.attention(q, k, v, padding=padding, documents=context.documents)
        elif context.packing is not None:
            parts = []
            for row, (start, stop) in enumerate(context.packing.spans):
                run, here = kv.row(row, context.lengths[row] + stop - start), (..., slice(start, stop), slice(None))
                run = run.with_newest(k[here], v[here]) if k.requires_grad else run
                parts.append(ops.attention(q[here], run.keys.to(q), run.values.to(q)))
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
                parts.append(ops.attention(q[rows], run.keys.to(q), run.values.to(q)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def step(self, x: Tensor, norm: ops.Norm, state: KVState | PagedKVState, context: StepContext) -> Tensor:
        operators = context.operators
        qkv = operators.linear(x, record(self.qkv_proj), norm=norm)
        q = operators.rotate_and_cache(qkv, state, context)
        y = operators.attend(q, state, context)
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
        self.in_proj = nn.Linear(width, 3 * width)
        self.short_filter = ShortFilter(3 * width, config.short_filter_length)
        self.long_filter = long_filter
        self.out_proj = nn.Linear(width, width)

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
        if ops.capabilities(method).state == "window" and isinstance(long_filter, ops.ModalFilter):
            long_filter = ops.truncate(long_filter, tolerance=tolerance)[0]
        long = long_filter.initial_state(batch, weight.shape[0] // 3, method)
        return HyenaState(short, torch.zeros_like(long, device=device))  # also where the weights are on the meta device

    def truncation_window(self, tolerance: float) -> int | None:
        """How many taps ``method="truncated"`` keeps of the long filter; None where it is not a filter of modes."""
        long_filter = self.long_filter()
        return ops.choose_window(long_filter, tolerance) if isinstance(long_filter, ops.ModalFilter) else None

    def forward(
        self, x: Tensor, context: ForwardContext, state: HyenaState | None, keep: int
    ) -> tuple[Tensor, HyenaState]:
        (weight, bias), long_filter = self.short_filter(), self.long_filter()

        def operator(
            z: Tensor, state: HyenaState | None, mask: Tensor | None, reset: Tensor | None
        ) -> tuple[Tensor, HyenaState]:
            options: dict[str, Any] = {"method": context.method, "backend": context.backend}
            return ops.hyena(z, weight, bias, long_filter, state, mask=mask, reset=reset, **options)

        def states_at(
            z: Tensor, state: HyenaState | None, mask: Tensor | None, stops: Sequence[int]
        ) -> list[HyenaState]:
            return ops.hyena_states(z, weight, bias, long_filter, state, stops, mask=mask)

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
        y, after = context.evaluate(operator, z, state, states_at, together if packs else None)
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
    return Hyena(config, ExplicitLongFilter(config.hidden_size, taps, groups=groups, skip=False))


def _hyena_mr(config: ModelConfig) -> Hyena:
    taps, groups = config.mr_filter_length, config.mr_filter_groups
    return Hyena(config, ExplicitLongFilter(config.hidden_size, taps, groups=groups, skip=True))


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

    def __init__(self, config: ModelConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(config)
        self.mlp = GatedMLP(config)

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
    """The weights of a plain linear layer, which kernels may read; any other module itself, to be called."""
    if type(module) is nn.Linear and not _has_hooks(module):
        return ops.Dense(module.weight, module.bias)
    return module


def norm_record(module: nn.Module) -> ops.Norm:
    """The weight and convention of a norm of ours, which kernels may read; any other module itself."""
    if type(module) is RMSNorm and not _has_hooks(module):
        return ops.RMSNormWeight(module.weight, module.eps, module.eps_inside_root)
    return module


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def make_layers(config: ModelConfig, mixers: Mixers = MIXERS) -> nn.ModuleList:
    """The layers that a configuration lists.

    Raises:
        ConfigError: a kind of layer that ``mixers`` does not know.
    """
    for i, kind in enumerate(config.layer_types):
        if kind not in mixers:
            raise unknown_layer_kind(kind, i, mixers)
    return nn.ModuleList(Layer(config, mixers[kind](config)) for kind in config.layer_types)


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
            if _has_hooks(module):
                return f"the {name} of layer {i} has forward hooks, which static decoding would not call"
    return "autocast is on" if torch.is_autocast_enabled(device.type) else None


class StripedHyena(nn.Module):
    """A StripedHyena language model.

    ``load_state_dict`` takes our parameter names and those of the original implementation.

    Args:
        config: the architecture. On the meta device no weights are initialised.
        mixers: what makes the mixer of each kind of layer that the configuration names.

    Raises:
        ConfigError: a kind of layer that ``mixers`` does not know.

    Source: Together 2023, "StripedHyena"; Nguyen et al. 2024, "Sequence modeling and design … with Evo".
    """

    def __init__(self, config: ModelConfig, *, mixers: Mixers = MIXERS) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = make_layers(config, mixers)
        self.norm = RMSNorm(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_load_state_dict_pre_hook(_accept_original_names)
        if self.device.type != "meta":
            self.init_weights()

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def make_cache(
        self,
        batch_size: int = 1,
        *,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        method: str = "auto",
        tolerance: float = ops.TRUNCATION_TOLERANCE,
    ) -> Cache:
        """Make an empty cache for this model: room for ``max_length`` tokens a row, or room that grows.

        Args:
            batch_size: rows.
            max_length: the most tokens of a row; None for a growing cache.
            dtype: of keys, values and the short filters' windows; the model's unless given. States of long filters are
                float32 or wider.
            device: the model's unless given.
            method: how long convolutions will be evaluated. It matters for ``"truncated"``, which remembers a window of
                inputs where every other method remembers modes; ``method="auto"`` then goes on from what it finds.
            tolerance: the share of a filter's energy that ``"truncated"`` may drop; it decides the window of a layer.

        Raises:
            InputError: a size below 1.
            UnsupportedError: an unknown method, or a filter that cannot be cut; see ``ops.truncate``.
        """
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"a cache takes {name} as a whole number of at least 1, not {value!r}")
        device = torch.device(device) if device is not None else self.device
        states = self._make_states(batch_size, max_length, dtype or self.dtype, device, method, tolerance)
        return Cache(states, [0] * batch_size, [max_length] * batch_size, owner=self)

    def make_state(
        self,
        index: int,
        batch_size: int = 1,
        *,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        method: str = "auto",
        tolerance: float = ops.TRUNCATION_TOLERANCE,
    ) -> Any:
        """Make an empty state of one layer, see ``cache.State``; the arguments and errors are those of ``make_cache``.

        Args:
            index: of the layer.
        """
        options: dict[str, Any] = {"max_length": max_length, "dtype": dtype or self.dtype}
        options["device"] = torch.device(device) if device is not None else self.device
        if ops.capabilities(method).state == "window":
            options |= {"method": method, "tolerance": tolerance}
        try:
            return self.layers[index].mixer.make_state(batch_size, **options)  # type: ignore[union-attr, operator]
        except UnsupportedError as error:
            raise UnsupportedError(f"layer {index}: {error}") from None

    def make_page_pool(
        self, pages: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> PagePool:
        """Allocate pages for the keys and values of this model, which caches on them share.

        Args:
            pages: how many, of ``ops.PAGE`` tokens each; ``sizes.page_bytes`` says how large one is.
            dtype, device: of keys and values; the model's unless given.

        Raises:
            InputError: fewer than one page, or a model without keys and values.
        """
        return PagePool(pages, self._kv_shapes(), dtype or self.dtype, device or self.device)

    def _kv_shapes(self) -> list[tuple[int, int]]:
        """Key/value heads, and their channels, of the layers that remember keys and values."""
        mixers: list[Any] = [layer.mixer for layer in self.layers]
        return [tuple(mixer.kv_shape()) for mixer in mixers if hasattr(mixer, "kv_shape")]

    def make_paged_cache(
        self,
        pool: PagePool,
        pages: Sequence[Sequence[int]],
        *,
        max_length: int | None = None,
        method: str = "auto",
        tolerance: float = ops.TRUNCATION_TOLERANCE,
    ) -> Cache:
        """Make an empty cache whose keys and values lie in pages of a pool.

        A row that shares its first pages with another begins where a snapshot was taken: ``Cache.restore_states``.

        Args:
            pool: made by this model's ``make_page_pool``.
            pages: of each row; they need not reach up to ``max_length`` yet, see ``Cache.set_pages``.
            max_length: the most tokens of a row; None for rows without limit. Static decoding needs a limit, and makes
                tables up to the largest: give all rows the same.
            method, tolerance: as in ``make_cache``.

        Raises:
            InputError: no rows, a size below 1, numbers that are no pages of the pool, or a pool of another model.
            UnsupportedError: an unknown method, or a filter that cannot be cut; see ``ops.truncate``.
        """
        if not isinstance(pool, PagePool):
            raise InputError(f"the pool is {kind_of(pool)}: make one with this model's make_page_pool")
        if pool.shapes != self._kv_shapes():
            raise InputError("the pool was made for another model: make one with this model's make_page_pool")
        if max_length is not None:
            whole("max_length", max_length, "a whole number of at least 1", 1)
        rows = [pool.check(row) for row in pages]
        if not rows:
            raise InputError("a cache takes the pages of at least one row")
        states = self._make_states(len(rows), max_length, pool.dtype, pool.device, method, tolerance, pool)
        return Cache(states, [0] * len(rows), [max_length] * len(rows), owner=self, pool=pool, pages=rows)

    def _make_states(
        self,
        rows: int,
        max_length: int | None,
        dtype: torch.dtype,
        device: torch.device,
        method: str,
        tolerance: float,
        pool: PagePool | None = None,
    ) -> list[Any]:
        """The empty state of every layer; keys and values on pages where there is a pool."""
        options: dict[str, Any] = {"max_length": max_length, "dtype": dtype, "device": device}
        options |= {"method": method, "tolerance": tolerance}
        paged = iter([] if pool is None else pool.layers)
        states: list[Any] = []
        for i, layer in enumerate(self.layers):
            on_pages = pool is not None and hasattr(layer.mixer, "kv_shape")
            states.append(PagedKVState(*next(paged)) if on_pages else self.make_state(i, rows, **options))
        return states

    def truncation_windows(self, tolerance: float = ops.TRUNCATION_TOLERANCE) -> dict[int, int]:
        """How many taps ``method="truncated"`` keeps, layer -> W, of every layer with a filter of modes."""
        windows = {}
        for i, layer in enumerate(self.layers):
            window = getattr(layer.mixer, "truncation_window", lambda _: None)(tolerance)
            if window is not None:
                windows[i] = window
        return windows

    def forward(
        self,
        ids: Tensor,
        *,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        counts: Sequence[int] | None = None,
        logits_to_keep: int | None = None,
        method: str = "auto",
        backend: str = "auto",
        snapshots: Snapshots | None = None,
    ) -> Tensor:
        """Logits of the token that follows each position.

        Args:
            ids: int [B,T], T >= 1.
            cache: what came before; it is brought up to date, or left unchanged if anything fails. Its rows may hold
                different numbers of tokens.
            mask: bool [B,T], True where there is a token; padding stands on the left. A cache takes it before the first
                token of a row, in one pass or in several.
            segment_ids: int [B,T]; a new document begins where the number changes. Nothing passes from one document to
                the next, and positions restart. Not with a cache.
            counts: ids int [1,T] are the next tokens of all rows of the cache, so many of each, one row after another,
                without padding. ``logits_to_keep`` is None or 1 then.
            logits_to_keep: compute the logits of the last so many positions only, and the last layer's output there.
            method: how long convolutions are evaluated; see ``ops.METHODS``.
            backend: what evaluates the operators: ``"triton"`` (fused kernels), ``"plain"`` (torch), or ``"auto"``.
            snapshots: takes copies of the states inside this pass.

        Returns:
            [B,T,V], or [B,logits_to_keep,V]; of a packed pass [1,T,V], or [B,1,V] after the last token of each row.

        Raises:
            InputError: shapes, ids or masks that do not fit; a cache of another model or in use by another thread.
            CapacityError: a row of the cache would pass its maximum length.
            UnsupportedError: an unknown method or backend, or one that cannot run here.
        """
        if logits_to_keep is not None:
            logits_to_keep = whole("logits_to_keep", logits_to_keep, "a whole number, 1 (the last position) or more", 1)
        if cache is not None and not isinstance(cache, Cache):
            raise InputError(f"cache is {kind_of(cache)}: make one with this model's make_cache")
        resolved = ops.resolve_backend(backend, device=self.device, dtype=self.dtype, gradients=torch.is_grad_enabled())
        if counts is not None:
            self._check_packs(logits_to_keep)
        context = ForwardContext.of(
            self.config,
            ids,
            cache=cache,
            mask=mask,
            segment_ids=segment_ids,
            counts=counts,
            method=method,
            backend=resolved,
            dtype=self.dtype,
            snapshots=snapshots,
        )
        if cache is None or context.counts is None:
            return self._layers(ids, context, [None] * len(self.layers), logits_to_keep)[0]
        assert context.lengths is not None
        with cache.reading(self, len(ids) if counts is None else len(context.counts), context.lengths, context.counts):
            logits, states = self._layers(ids, context, cache.states, logits_to_keep)
            cache.commit([state.detach() for state in states], context.counts)
        return logits

    def _layers(
        self, ids: Tensor, context: ForwardContext, states: Sequence[Any], logits_to_keep: int | None
    ) -> tuple[Tensor, list[Any]]:
        x, new = embed(self.embed_tokens, ids, self.config.vocab_size), []
        length = ids.shape[1]
        packed = context.packing is not None
        keep = length if logits_to_keep is None or packed else min(logits_to_keep, length)
        last = len(self.layers) - 1
        for i, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            if context.snapshots is not None:
                context.snapshots.layer = i
            if i < last:
                x, state = layer(x, context, state, length)
            elif context.packing is None or logits_to_keep is None:
                x, state = layer(x, context, state, keep)  # nothing else of the last layer is read
            else:
                x, state = layer(x, context, state, keep, context.packing.last)
                x = x.transpose(0, 1)  # [B,1,D]
            new.append(state)
        return self.logits(call(self.norm, x, context)), new

    def logits(self, x: Tensor) -> Tensor:
        """Logits [...,V] of what the final norm returned, x [...,D]."""
        return self.lm_head(x) if self.lm_head is not None else nn.functional.linear(x, self.embed_tokens.weight)

    def _check_packs(self, logits_to_keep: int | None) -> None:
        if logits_to_keep not in (None, 1):
            raise InputError(f"a packed pass takes logits_to_keep=1 or None, not {logits_to_keep}")
        for i, layer in enumerate(self.layers):
            if not getattr(layer.mixer, "packs", False):
                raise UnsupportedError(
                    f"the mixer of layer {i}, a {type(layer.mixer).__name__}, reads no packed rows: read them padded, "
                    "with a mask"
                )

    def step(self, ids: Tensor, states: Sequence[Any], context: StepContext) -> Tensor:
        """Read one token per row, ids [B]; logits [B,V] of the next. States and lengths are updated in place."""
        plain = type(self.embed_tokens) is nn.Embedding and not _has_hooks(self.embed_tokens)
        x = context.operators.embed(ids, self.embed_tokens.weight if plain else self.embed_tokens, context)  # [B,D]
        for i, (layer, state) in enumerate(zip(self.layers, states, strict=True), 1):
            x = layer.step(x, state, context, last=i == len(self.layers))  # type: ignore[operator]
        head = ops.Dense(self.embed_tokens.weight) if self.lm_head is None else record(self.lm_head)
        return context.operators.linear(x, head, norm=norm_record(self.norm))

    def unsupported_reason(self) -> str | None:
        """Why ``step`` cannot compute what ``forward`` does, or None. Parts that ``step`` does not call are named."""
        if _has_hooks(self):
            return "the model has forward hooks, which static decoding would not call"
        return step_unsupported_reason(self.layers, self.device)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise all weights for training from scratch.

        Linear weights ~ N(0, 2/(5D)), those that write to the residual stream ~ N(0, (2/(L·√D))²) for L layers
        (Nguyen & Salazar 2019; Wang & Komatsuzaki 2021, GPT-J). Filters and norms initialise themselves: any module
        with a method ``init_weights(generator)`` does. A mixer names the layer that writes to the residual stream by
        ``output_projection()``.
        """
        parts = [part for layer in self.layers for part in (layer.mixer, layer.mlp)]
        writers = {part.output_projection() for part in parts if hasattr(part, "output_projection")}  # type: ignore[operator]
        for module in self.modules():
            if module is not self:
                init_module(module, self.config, writes_residual=module in writers, generator=generator)


def _accept_original_names(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
    """Rename, in place, a state dict that has the original implementation's keys."""
    assert isinstance(module, StripedHyena)
    if original.matches_tensors(state):
        renamed = original.state_to_ours(dict(state), module.config)
        state.clear()
        state.update(renamed)
