"""StripedHyena as models of transformers: the modules of ``hyaena.model`` in a loop that takes its arguments.

Shapes: B batch, T time, D channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from hyaena import ops
from hyaena.adapters import LoRALinear
from hyaena.arguments import as_text_path, kind_of
from hyaena.cache import Cache
from hyaena.config import ModelConfig
from hyaena.context import ForwardContext
from hyaena.errors import CheckpointError, InputError, UnsupportedError
from hyaena.formats.transformers import code
from hyaena.hf import loading
from hyaena.hf.cache import FIELD, StripedHyenaCache, as_cache
from hyaena.hf.configuration import StripedHyenaConfig
from hyaena.hf.inputs import Layout, read_continuation, read_layout
from hyaena.layers import (
    Layer,
    RMSNorm,
    Rotary,
    call,
    embed,
    init_module,
    make_layers,
    norm_record,
    step_unsupported_reason,
)
from hyaena.model import StripedHyena
from hyaena.ops.step import CompilableOperators, StepContext

logger = logging.get_logger(__name__)

M = TypeVar("M", bound="StripedHyenaPreTrainedModel")


class StripedHyenaPreTrainedModel(PreTrainedModel):
    """What all StripedHyena models of transformers share: loading, initialisation, and the way to ``StripedHyena``."""

    config: StripedHyenaConfig
    config_class = StripedHyenaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True
    _can_compile_fullgraph = True
    _cache_dtype: torch.dtype | None = None  # of the StripedHyena that it was made of; ``to_native`` gives it back

    @classmethod
    def from_native(cls: type[M], model: StripedHyena, **options: Any) -> M:
        """A model of transformers over the modules of a ``StripedHyena``: one set of weights, nothing is copied.

        Args:
            model: stays usable; what changes the weights of one changes the other's.
            options: fields of ``StripedHyenaConfig``, such as ``num_labels``.

        A head that ``model`` does not have, that of a classifier, is initialised.

        Raises:
            InputError: it is no ``StripedHyena``.
            ConfigError: its linear layers are narrow.
        """
        if not isinstance(getattr(model, "config", None), ModelConfig):
            raise InputError(f"from_native takes the StripedHyena that hyaena.load returns, not {kind_of(model)}")
        with torch.device("meta"):
            made = cls(StripedHyenaConfig.from_native(model.config, dtype=model.dtype, **options))
        base: Any = made.base_model
        base.embed_tokens, base.layers, base.norm = model.embed_tokens, model.layers, model.norm
        base.rotary, base._cache_dtype = model.rotary, model._cache_dtype
        if model.lm_head is not None and made.get_output_embeddings() is not None:
            made.set_output_embeddings(model.lm_head)
        made.tie_weights()
        for module in made.modules():
            if any(p.is_meta for p in module.parameters(recurse=False)):
                module.to_empty(device=model.device).to(model.dtype)
                made._init_weights(module)
        return made.train(model.training)

    def to_native(self) -> StripedHyena:
        """A ``StripedHyena`` over the modules of this model: one set of weights, nothing is copied.

        Raises:
            UnsupportedError: this model has no head over the vocabulary.
        """
        base: Any = self.base_model
        config = self.config.to_native()
        head = self.get_output_embeddings()
        if head is None and not config.tie_embeddings:
            raise UnsupportedError(
                f"a {type(self).__name__} has no head over the vocabulary: load it as StripedHyenaForCausalLM"
            )
        with torch.device("meta"):
            model = StripedHyena(config)
        model.embed_tokens, model.layers, model.norm = base.embed_tokens, base.layers, base.norm
        model.rotary, model._cache_dtype = base.rotary, base._cache_dtype
        model.lm_head = None if config.tie_embeddings else head  # type: ignore[assignment]
        return model.train(self.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load a model: ``PreTrainedModel.from_pretrained``, which here reads more layouts.

        They are what ``save_pretrained`` writes, this package's own layout, and the original's hub checkpoints.

        Raises:
            CheckpointError: tensors that are missing, unexpected or misshapen, or files that are damaged.
            ConfigError: a configuration that cannot be used.
        """
        source = pretrained_model_name_or_path
        if (foreign := loading.foreign_weights(source, kwargs)) is not None:
            source, kwargs = None, foreign
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(source, *model_args, output_loading_info=True, **kwargs)
        model, info = loaded
        loading.check_complete(model, info, pretrained_model_name_or_path)
        model.config.name_or_path = model.name_or_path = str(pretrained_model_name_or_path or "")
        if model.dtype == torch.float64:
            model = model.to(torch.float64)  # poles and residues, too
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save the model: ``PreTrainedModel.save_pretrained``, and the file that names its classes.

        Raises:
            InputError: this is no path.
            CheckpointError: an adapter of this package is on the model.
        """
        folder = as_text_path("the folder", save_directory, "safetensors")
        if any(isinstance(module, LoRALinear) for module in self.modules()):
            raise CheckpointError(f"cannot save a model with an adapter to {folder}: merge it into the weights first")
        if not folder.is_file():  # which transformers refuses
            folder.mkdir(parents=True, exist_ok=True)
            (folder / code.FILE).write_text(code.CODE, encoding="utf-8")
        with loading.one_set_of_weights(folder):
            super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to do: transformers would copy the source of this class into each folder that is saved."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module, as ``StripedHyena.init_weights`` does; children come before their parents."""
        config = self.config.to_native()
        if isinstance(module, Layer):
            for part in (module.mixer, module.mlp):
                init_module(part.output_projection(), config, writes_residual=True)  # type: ignore[operator]
        elif not isinstance(module, PreTrainedModel):
            init_module(module, config)


class StripedHyenaModel(StripedHyenaPreTrainedModel):
    """Embedding, layers and final norm, without a head."""

    def __init__(self, config: StripedHyenaConfig) -> None:
        super().__init__(config)
        native = self.architecture = config.to_native()
        self.embed_tokens = nn.Embedding(native.vocab_size, native.hidden_size)
        self.layers = make_layers(native)
        self.norm = RMSNorm(native)
        self.rotary = Rotary(native)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StripedHyenaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cache: StripedHyenaCache | None = None,
        last_positions: int | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of each position.

        Args:
            input_ids: int [B,T]; or else ``inputs_embeds`` [B,T,D].
            attention_mask: [B,T], or [B,past+T] after a cache; zero at padding, which stands at the ends of rows.
            position_ids: int [B,T]; a new document begins where the position is not one more than the last. Nothing
                else is read from them: positions follow from padding, documents and the cache.
            past_key_values, cache: what came before, two names of one argument; it is brought up to date.
            use_cache: return a cache. By default as the configuration says, but not in training, nor for rows that end
                in padding or hold packed documents.
            output_hidden_states: return the embeddings, the output of each layer but the last, and the last one's after
                the norm.
            seq_idx: int [B,T], the document of each position.
            cu_seq_lens_q: int [documents+1], where documents begin in the rows one after another, and the last ends.
            last_positions: compute the output at the last so many positions only.

        Raises:
            InputError: arguments that do not fit.
            UnsupportedError: attention weights, which are never formed.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give either input_ids or inputs_embeds")
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise UnsupportedError(
                "output_attentions is not supported: attention weights are never formed, and Hyena blocks have none"
            )
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        x = self._checked(inputs_embeds) if input_ids is None else self._embed(input_ids)
        shape = (x.shape[0], x.shape[1])
        given = as_cache(past_key_values if cache is None else cache)
        if given is not None and given.step is not None and shape[1] == 1 and _may_update(given.step.lengths):
            return self._step(given, x, output_hidden_states)
        if given is not None and given.native is not None:
            layout = read_continuation(
                shape, given.native.lengths, attention_mask, position_ids, seq_idx=seq_idx, cu_seq_lens=cu_seq_lens_q
            )
            self._check_cacheable(layout)
        else:
            layout = read_layout(shape, attention_mask, position_ids, seq_idx=seq_idx, cu_seq_lens=cu_seq_lens_q)
            given = self._cache_to_fill(given, use_cache, layout)
        keep = shape[1] if last_positions is None or output_hidden_states else min(last_positions, shape[1])
        hidden = [] if output_hidden_states else None
        if given is None:
            context = self._context(x, None, layout)
            x, _states = self._read(x, context, [None] * len(self.layers), keep, hidden)
        else:
            x = self._read_into(given, x, layout, keep, hidden)  # type: ignore[call-issue]
        states = None if hidden is None else tuple(hidden)
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=states, **{FIELD: given})  # type: ignore[arg-type]

    def _embed(self, ids: Tensor) -> Tensor:
        return embed(self.embed_tokens, ids, self.config.vocab_size)

    def _checked(self, embeddings: Any) -> Tensor:
        size = self.config.hidden_size
        if not isinstance(embeddings, Tensor) or embeddings.ndim != 3 or embeddings.shape[2] != size:
            raise InputError(f"inputs_embeds must be of shape [B, T, {size}], and is {kind_of(embeddings)}")
        return embeddings

    def _cache_to_fill(
        self, given: StripedHyenaCache | None, use_cache: bool | None, layout: Layout
    ) -> StripedHyenaCache | None:
        """The cache of a pass that follows nothing: the caller's, a new one, or none."""
        if given is not None or use_cache:
            self._check_cacheable(layout)
            return StripedHyenaCache() if given is None else given
        cacheable = not layout.right_padded and layout.segment_ids is None and not self.training
        return StripedHyenaCache() if use_cache is None and self.config.use_cache and cacheable else None

    def _check_cacheable(self, layout: Layout) -> None:
        if layout.right_padded or layout.segment_ids is not None:
            reason = "end in padding" if layout.right_padded else "hold packed documents"
            raise InputError(f"rows that {reason} cannot be cached: pass use_cache=False, or pad on the left")
        if self.gradient_checkpointing and self.training:
            raise InputError("gradient checkpointing and a cache exclude each other: pass use_cache=False")

    def _context(self, x: Tensor, cache: Cache | None, layout: Layout) -> ForwardContext:
        backend = ops.resolve_backend("auto", device=x.device, dtype=x.dtype, gradients=torch.is_grad_enabled())
        return ForwardContext.of(
            self.rotary,
            x.new_empty(x.shape[:2], dtype=torch.long),  # of the shape of ids: nothing else of them is looked at
            cache=cache,
            mask=layout.mask,
            segment_ids=layout.segment_ids,
            method="auto",
            backend=backend,
            dtype=x.dtype,
        )

    @torch.compiler.disable
    def _read_into(
        self, cache: StripedHyenaCache, x: Tensor, layout: Layout, keep: int, hidden: list[Tensor] | None
    ) -> Tensor:
        """Read x into a cache, which is unchanged if anything fails."""
        cache.end_steps()
        native = self._make_native_cache(x, cache.max_length) if cache.native is None else cache.native
        context = self._context(x, native, layout)
        assert context.lengths is not None and context.counts is not None
        with native.reading(self, len(x), context.lengths, context.counts):
            length = x.shape[1]
            x, states = self._read(x, context, native.states, keep, hidden)
            native.commit([state.detach() for state in states], context.counts)
        cache.native = native
        cache.count(length)
        if cache.max_length is not None and all(native.lengths) and self._step_unsupported_reason() is None:
            cache.begin_steps(self._step_context(native, cache.max_length))
        return x

    def _step(self, cache: StripedHyenaCache, x: Tensor, output_hidden_states: bool) -> BaseModelOutputWithPast:
        """Read one token per row into a static cache, x [B,1,D], in a way that torch.compile makes one graph of."""
        assert cache.native is not None and cache.step is not None
        cache.native.check_owner(self)
        if len(x) != cache.native.batch_size:
            raise InputError(f"the cache holds {cache.native.batch_size} rows and the ids {len(x)}: make another cache")
        if torch.compiler.is_compiling():
            return self._run_step(cache, cache.native, cache.step, x, output_hidden_states)
        cache.check_room()
        with cache.stepping():
            return self._run_step(cache, cache.native, cache.step, x, output_hidden_states)

    def _run_step(
        self, cache: StripedHyenaCache, native: Cache, context: StepContext, x: Tensor, output_hidden_states: bool
    ) -> BaseModelOutputWithPast:
        hidden = []
        context.lengths.copy_(torch.minimum(context.lengths + 1, context.limits))
        x = x[:, 0]
        for layer, state in zip(self.layers, native.states, strict=True):
            hidden.append(x[:, None])
            x = layer.step(x, state, context)  # type: ignore[operator]
        x = context.operators.normalise(x, norm_record(self.norm))[:, None]
        states = (*hidden, x) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=states, **{FIELD: cache})  # type: ignore[arg-type]

    def _step_context(self, cache: Cache, max_length: int) -> StepContext:
        device = self.embed_tokens.weight.device
        return StepContext(
            operators=CompilableOperators(),
            lengths=torch.tensor(cache.lengths, dtype=torch.int32, device=device),
            limits=torch.full((cache.batch_size,), max_length, dtype=torch.int32, device=device),
            rotary=self.rotary(torch.arange(max_length, device=device), self.embed_tokens.weight.dtype),
        )

    def _step_unsupported_reason(self) -> str | None:
        """Why a static cache is read by the way of a growing one, or None."""
        if any(hasattr(module, "_hf_hook") for module in self.modules()):
            return "accelerate places the weights"
        return step_unsupported_reason(self.layers, self.embed_tokens.weight.device)

    def _make_native_cache(self, x: Tensor, max_length: int | None) -> Cache:
        rows = len(x)
        states = [
            layer.mixer.make_state(rows, max_length=max_length, dtype=x.dtype, device=device_of(layer))  # type: ignore[union-attr, operator]
            for layer in self.layers
        ]
        return Cache(states, [0] * rows, [max_length] * rows, owner=self)

    def _read(
        self, x: Tensor, context: ForwardContext, states: Sequence[Any], keep: int, hidden: list[Tensor] | None
    ) -> tuple[Tensor, list[Any]]:
        """Layers and norm over x [B,T,D]: the last ``keep`` positions, and the new states.

        What each layer reads is appended to ``hidden``, and the output at last.
        """
        length, last, new = x.shape[1], len(self.layers) - 1, []
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for i, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            if hidden is not None:
                hidden.append(x)
            count = keep if i == last else length
            if checkpointing:
                x = self._gradient_checkpointing_func(_output_of(layer, context, count), x)
            else:
                x, state = layer(x, context, state, count)
            new.append(state)
        x = call(self.norm, x, context)
        if hidden is not None:
            hidden.append(x)
        return x, new


def _may_update(state: Tensor) -> bool:
    """Whether autograd allows that what was made together with ``state`` is updated in place."""
    if torch.is_grad_enabled():
        return False
    # The compiler cannot trace the rest; autograd itself then raises where an update is not allowed.
    return torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not state.is_inference()


def _output_of(layer: nn.Module, context: ForwardContext, count: int) -> Any:
    """A layer as a function of one tensor, whose state is not wanted."""
    return lambda x: layer(x, context, None, count)[0]


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer computes: where its weights are, or where accelerate, which keeps them elsewhere, brings them."""
    device = next(layer.parameters()).device
    hook = getattr(layer, "_hf_hook", None)
    return device if device.type != "meta" or hook is None else torch.device(hook.execution_device)
