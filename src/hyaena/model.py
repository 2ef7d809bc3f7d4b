"""The StripedHyena architecture.

    tokens -> embed -> layers -> norm -> head -> logits

The layers themselves are in ``layers``. ``model(a ++ b)`` equals ``model(a, cache)`` then ``model(b, cache)``.

Shapes: B batch, T time, D channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hyaena import ops
from hyaena.arguments import kind_of, whole
from hyaena.cache import Cache
from hyaena.config import ModelConfig
from hyaena.context import ForwardContext
from hyaena.errors import InputError, UnsupportedError
from hyaena.formats import tensors as originals
from hyaena.hooks import has_hooks
from hyaena.layers import (
    MIXERS,
    Mixers,
    RMSNorm,
    Rotary,
    call,
    embed,
    init_module,
    make_layers,
    norm_record,
    record,
    step_unsupported_reason,
)
from hyaena.ops import PagedKVState, PagePool, StepContext
from hyaena.ops.onednn import onednn_products
from hyaena.ops.slots import as_cache_dtype, slots_of
from hyaena.packing import Snapshots
from hyaena.quant import narrow_linears
from hyaena.schemes import SCHEMES

WIDEST_HEAD = 2**22
"""Weights of a head whose product in float32 takes a small part of a pass: 512 tokens of 8,192 channels."""


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

    _cache_dtype: torch.dtype | None = None  # of the class: models that were pickled before it was there have it, too

    def __init__(self, config: ModelConfig, *, mixers: Mixers = MIXERS) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = make_layers(config, mixers)
        self.norm = RMSNorm(config)
        self.rotary = Rotary(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.weights is not None:
            narrow_linears(self, SCHEMES[config.weights])
        self.register_load_state_dict_pre_hook(_accept_original_names)
        if self.device.type != "meta":
            self.init_weights()

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype of keys and values in the caches that are made for this model; the model's own unless set.

        Set it to a dtype, a name of ``schemes.CACHE_DTYPES``, or ``"auto"`` for the model's own. ``"int8"`` takes about
        half the memory of 16 bits; see ``ops.slots``.
        """
        return self._cache_dtype or self.dtype

    @cache_dtype.setter
    def cache_dtype(self, value: str | torch.dtype | None) -> None:
        dtype = as_cache_dtype(value)
        self._slot_dtype(dtype)
        self._cache_dtype = dtype

    def _slot_dtype(self, value: str | torch.dtype | None) -> torch.dtype:
        """The dtype of keys and values that a caller chose.

        Raises:
            InputError: one that keys and values, or heads of this model, are not stored in.
        """
        dtype = as_cache_dtype(value) or self.cache_dtype
        for _, head_dim in self._kv_shapes():
            slots_of(dtype).check(head_dim)
        return dtype

    def make_cache(
        self,
        batch_size: int = 1,
        *,
        max_length: int | None = None,
        dtype: str | torch.dtype | None = None,
        device: torch.device | str | None = None,
        method: str = "auto",
        tolerance: float = ops.TRUNCATION_TOLERANCE,
    ) -> Cache:
        """Make an empty cache for this model: room for ``max_length`` tokens a row, or room that grows.

        Args:
            batch_size: rows.
            max_length: the most tokens of a row; None for a growing cache.
            dtype: of keys and values; ``cache_dtype`` unless given. States of Hyena layers are in the model's dtype,
                those of long filters in float32 or wider.
            device: the model's unless given.
            method: how long convolutions will be evaluated. It matters for ``"truncated"``, which remembers a window of
                inputs where every other method remembers modes; ``method="auto"`` then goes on from what it finds.
            tolerance: the share of a filter's energy that ``"truncated"`` may drop; it decides the window of a layer.

        Raises:
            InputError: a size below 1, or a dtype that keys and values are not stored in.
            UnsupportedError: an unknown method, or a filter that cannot be cut; see ``ops.truncate``.
        """
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"a cache takes {name} as a whole number of at least 1, not {value!r}")
        device = torch.device(device) if device is not None else self.device
        states = self._make_states(batch_size, max_length, dtype, device, method, tolerance)
        return Cache(states, [0] * batch_size, [max_length] * batch_size, owner=self)

    def make_state(
        self,
        index: int,
        batch_size: int = 1,
        *,
        max_length: int | None = None,
        dtype: str | torch.dtype | None = None,
        device: torch.device | str | None = None,
        method: str = "auto",
        tolerance: float = ops.TRUNCATION_TOLERANCE,
    ) -> Any:
        """Make an empty state of one layer, see ``cache.State``; the arguments and errors are those of ``make_cache``.

        Args:
            index: of the layer.
        """
        mixer: Any = self.layers[index].mixer
        kept = self._slot_dtype(dtype) if hasattr(mixer, "kv_shape") else self.dtype
        options: dict[str, Any] = {"max_length": max_length, "dtype": kept}
        options["device"] = torch.device(device) if device is not None else self.device
        if ops.capabilities(method).state == "window":
            options |= {"method": method, "tolerance": tolerance}
        try:
            return mixer.make_state(batch_size, **options)
        except UnsupportedError as error:
            raise UnsupportedError(f"layer {index}: {error}") from None

    def make_page_pool(
        self, pages: int, *, dtype: str | torch.dtype | None = None, device: torch.device | str | None = None
    ) -> PagePool:
        """Allocate pages for the keys and values of this model, which caches on them share.

        Args:
            pages: how many, of ``ops.PAGE`` tokens each; ``sizes.page_bytes`` says how large one is.
            dtype: of keys and values; ``cache_dtype`` unless given.
            device: the model's unless given.

        Raises:
            InputError: fewer than one page, a model without keys and values, or a dtype that they are not stored in.
        """
        return PagePool(pages, self._kv_shapes(), self._slot_dtype(dtype), device or self.device)

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
        dtype: str | torch.dtype | None,
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
        wide_logits: bool = False,
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
            wide_logits: see ``logits``.

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
            self.rotary,
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
        products = onednn_products(self.device, self.dtype, ids.numel())
        if cache is None or context.counts is None:
            with products:
                return self._layers(ids, context, [None] * len(self.layers), logits_to_keep, wide_logits)[0]
        assert context.lengths is not None
        rows = len(ids) if counts is None else len(context.counts)
        with products, cache.reading(self, rows, context.lengths, context.counts):
            logits, states = self._layers(ids, context, cache.states, logits_to_keep, wide_logits)
            cache.commit([state.detach() for state in states], context.counts)
        return logits

    def _layers(
        self, ids: Tensor, context: ForwardContext, states: Sequence[Any], logits_to_keep: int | None, wide: bool
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
        return self.logits(call(self.norm, x, context), wide=wide), new

    def logits(self, x: Tensor, *, wide: bool = False) -> Tensor:
        """Logits [...,V] of what the final norm returned, x [...,D].

        With ``wide`` those of a model of 16 bits are float32 and not rounded to 16 bits, where the head is plain and of
        at most ``WIDEST_HEAD`` weights: that of a model of letters or bytes. Sums of log-probabilities are nearer to
        those of a float32 model then.
        """
        if wide and x.dtype.itemsize < 4:
            head = ops.Dense(self.embed_tokens.weight) if self.lm_head is None else record(self.lm_head)
            if isinstance(head, ops.Dense) and head.weight.numel() <= WIDEST_HEAD:
                with torch.autocast(x.device.type, enabled=False):
                    bias = None if head.bias is None else head.bias.float()
                    return ops.linear(x.float(), ops.Dense(head.weight.float(), bias))
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
        plain = type(self.embed_tokens) is nn.Embedding and not has_hooks(self.embed_tokens)
        x = context.operators.embed(ids, self.embed_tokens.weight if plain else self.embed_tokens, context)  # [B,D]
        for i, (layer, state) in enumerate(zip(self.layers, states, strict=True), 1):
            x = layer.step(x, state, context, last=i == len(self.layers))  # type: ignore[operator]
        head = ops.Dense(self.embed_tokens.weight) if self.lm_head is None else record(self.lm_head)
        return context.operators.linear(x, head, norm=norm_record(self.norm))

    def unsupported_reason(self) -> str | None:
        """Why ``step`` cannot compute what ``forward`` does, or None. Parts that ``step`` does not call are named."""
        if has_hooks(self):
            return "the model has forward hooks, which static decoding would not call"
        if type(self).forward is not StripedHyena.forward or "forward" in vars(self):
            return "the model has a forward of its own, which static decoding would not call"
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


def uncompiled(model: Any) -> Any:
    """The model that ``torch.compile`` wraps: modules are found and hooked in it; any other model as it is."""
    return getattr(model, "_orig_mod", model)


def _accept_original_names(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
    """Rename, in place, a state dict that has the original implementation's keys."""
    assert isinstance(module, StripedHyena)
    if originals.matches_tensors(state):
        renamed = originals.state_to_ours(dict(state), module.config)
        state.clear()
        state.update(renamed)
    if module.rotary.frequencies is not None:  # not every program that writes such files stores them
        state.setdefault("rotary.frequencies", module.rotary.powers())
