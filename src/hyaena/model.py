"""The StripedHyena architecture, read top to bottom.

    tokens -> embed -> layers -> norm -> head -> logits
    layer:  x += mixer(mixer_norm(x));  x += mlp(mlp_norm(x))
    mixer:  grouped-query attention, or a Hyena block

One forward serves training, prefill, chunked prefill, continuation and decoding:
``model(a ++ b)`` equals ``model(a, cache)`` then ``model(b, cache)``.

Shapes: B batch, T time, D channels, H query heads, G key/value heads, K short-filter taps, N modes, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from hyaena import ops, original
from hyaena.cache import Cache, KVCache
from hyaena.config import ModelConfig
from hyaena.errors import InputError, UnsupportedError
from hyaena.ops import HyenaState, ModalFilter


@dataclass(frozen=True)
class Step:
    """What every layer needs to know of one forward pass.

    Attributes:
        start: slots of the cache in use before this pass.
        rotary: cos and sin of the positions of this pass.
        padding: int [B], leading slots of each row that hold no token, or None.
        mask: bool [B,T], False where this pass reads padding, or None.
        reset: bool [B,T], True at the first token of every packed document but the first, or None.
        segment_ids: int [B,T], packed documents, each with a number of its own, or None.
        method: how long convolutions are evaluated.
    """

    start: int
    rotary: tuple[Tensor, Tensor]
    padding: Tensor | None
    mask: Tensor | None
    reset: Tensor | None
    segment_ids: Tensor | None
    method: str


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale; see ``ops.rms_norm`` for the two conventions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.norm_eps
        self.eps_inside_root = config.norm_eps_inside_root

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, eps_inside_root=self.eps_inside_root)


class GatedMLP(nn.Module):
    """``down(act(gate(x)) · up(x))``, without biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.gate(self.gate_proj(x), self.up_proj(x), self.activation))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and one fused projection ``[q | k | v]``."""

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

    def forward(self, x: Tensor, step: Step, memory: KVCache | None, keep: int) -> tuple[Tensor, None]:
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B,H+2G,T,head_dim]
        qk, v = qkv.split([self.heads + self.groups, self.groups], dim=1)
        q, k = ops.rotate(qk, step.rotary).split([self.heads, self.groups], dim=1)
        if memory is not None:
            k, v = memory.write(k, v, step.start)
        y = ops.attention(q[:, :, -keep:], k, v, padding=step.padding, segment_ids=step.segment_ids)
        return self.o_proj(y.transpose(1, 2).flatten(2)), None


class ShortFilter(nn.Module):
    """The parameters of the short depthwise filter: weight [3D,K], bias [3D]."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels))


class LongFilter(nn.Module):
    """The parameters of the long filter; calling it gives the filter itself.

    Poles and residues, stored as real pairs [D,N,2], are never narrower than float32: they ignore ``.to(bfloat16)``,
    ``.half()`` and whatever else casts a model, because a pole of 0.999 has no neighbour in bfloat16 below 1.
    """

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.poles = nn.Parameter(torch.empty(channels, modes, 2, dtype=torch.float32))
        self.residues = nn.Parameter(torch.empty(channels, modes, 2, dtype=torch.float32))
        self.skip = nn.Parameter(torch.empty(channels))

    def forward(self) -> ModalFilter:
        return ModalFilter(
            torch.complex(*self.poles.unbind(-1)), torch.complex(*self.residues.unbind(-1)), self.skip.clone()
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LongFilter:
        wide = [p for name, p in self.named_parameters() if name != "skip"]  # by exclusion: training reparametrises
        precise = {id(t) for p in wide for t in (p, p.grad) if t is not None}

        def apply(t: Tensor) -> Tensor:
            out = fn(t)
            if id(t) in precise and out.dtype.is_floating_point and out.dtype.itemsize < 4:
                return t.to(out.device)
            return out

        return super()._apply(apply, recurse)


class Hyena(nn.Module):
    """A Hyena block: project to ``[x2 | x1 | v]``, gate, convolve, gate, project back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.in_proj = nn.Linear(width, 3 * width)
        self.short_filter = ShortFilter(3 * width, config.short_filter_length)
        self.long_filter = LongFilter(width, config.state_size)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, step: Step, memory: HyenaState | None, keep: int) -> tuple[Tensor, HyenaState]:
        y, state = ops.hyena(
            self.in_proj(x),
            self.short_filter.weight,
            self.short_filter.bias,
            self.long_filter(),
            memory,
            mask=step.mask,
            reset=step.reset,
            method=step.method,
        )
        return self.out_proj(y[:, -keep:]), state


class Layer(nn.Module):
    """One stripe: a mixer and a gated MLP, each behind its norm, each added to the residual stream.

    A layer reads all T positions into its memory, and computes its output at the last ``keep`` of them only.
    """

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.mixer_norm = RMSNorm(config)
        self.mixer = Attention(config) if kind == "attention" else Hyena(config)
        self.mlp_norm = RMSNorm(config)
        self.mlp = GatedMLP(config)

    def forward(
        self, x: Tensor, step: Step, memory: KVCache | HyenaState | None, keep: int
    ) -> tuple[Tensor, HyenaState | None]:
        y, state = self.mixer(self.mixer_norm(x), step, memory, keep)
        x = x[:, -keep:] + y
        return x + self.mlp(self.mlp_norm(x)), state


class StripedHyena(nn.Module):
    """A StripedHyena language model.

    ``load_state_dict`` takes our parameter names and those of the original implementation.

    Source: Together 2023, "StripedHyena"; Nguyen et al. 2024, "Sequence modeling and design … with Evo".
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layer_types)
        self.norm = RMSNorm(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_load_state_dict_pre_hook(_accept_original_names)
        if self.device.type != "meta":
            self.init_weights()

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
        config: ModelConfig | str | PathLike[str] | None = None,
    ) -> StripedHyena:
        """The model alone, from a bundled name, a folder, a weights file with ``config``, or a hub id.

        The arguments are those of ``hyaena.load``.
        """
        from hyaena import hub  # above us in the layering, and heavier than most users of this module need

        return hub.load_model(source, dtype=dtype, device=device, revision=revision, config=config)

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
        """An empty cache for this model: room for ``max_length`` tokens, or room that grows.

        Args:
            batch_size: rows.
            max_length: the most tokens; None to grow for ever.
            dtype: of keys, values and the short filters' windows; the model's unless given.
            device: the model's unless given.
            method: how long convolutions will be evaluated. It matters for ``"truncated"``, which remembers a window of
                inputs where every other method remembers modes; ``method="auto"`` then goes on from what it finds.
            tolerance: the share of a filter's energy that ``"truncated"`` may drop; it decides the window of a layer.

        Raises:
            UnsupportedError: an unknown method, or a filter that cannot be cut; see ``ops.truncate``.
        """
        windowed = ops.capabilities(method).state == "window"
        return Cache.create(
            self.config,
            batch_size,
            max_length=max_length,
            dtype=dtype or self.dtype,
            device=device or self.device,
            windows=self.truncation_windows(tolerance) if windowed else None,
        )

    def truncation_windows(self, tolerance: float = ops.TRUNCATION_TOLERANCE) -> dict[int, int]:
        """How many taps of each Hyena layer's filter the method ``"truncated"`` keeps, layer -> W.

        Raises:
            UnsupportedError: a filter that cannot be cut; see ``ops.truncate``.
        """
        windows = {}
        for i, layer in enumerate(self.layers):
            if isinstance(layer.mixer, Hyena):
                try:
                    windows[i] = ops.choose_window(layer.mixer.long_filter(), tolerance)
                except UnsupportedError as error:
                    raise UnsupportedError(f"layer {i}: {error}") from None
        return windows

    def forward(
        self,
        ids: Tensor,
        *,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        logits_to_keep: int | None = None,
        method: str = "auto",
    ) -> Tensor:
        """Logits of the token that follows each position.

        Args:
            ids: int [B,T], T >= 1.
            cache: what came before; it is brought up to date, or left as it was if anything fails.
            mask: bool [B,T], True where there is a token; padding stands on the left, and a cache takes it with its
                first tokens only.
            segment_ids: int [B,T]; a new document begins where the number changes, and nothing passes from one to the
                next. Not with a cache.
            logits_to_keep: compute the logits of the last so many positions only, and the last layer's output there.
            method: how long convolutions are evaluated; see ``ops.METHODS`` and ``ops.FUSED_METHODS``.

        Returns:
            [B,T,V], or [B,logits_to_keep,V].

        Raises:
            InputError: shapes, ids or masks that do not fit.
            CapacityError: the cache would pass its maximum length.
        """
        mask, padding = self._check(ids, cache, mask, segment_ids, logits_to_keep)
        length = ids.shape[1]
        start = 0
        if cache is not None:
            cache.reserve(length)
            start = cache.length
            padding = cache.padding if start else padding
        positions = torch.arange(start, start + length, device=ids.device)
        if padding is not None:
            positions = (positions - padding[:, None]).clamp(min=0)
        config = self.config
        rotary = ops.rotary_table(positions, config.head_dim, config.rope_theta, config.rope_scaling_factor)
        reset = None
        if segment_ids is not None:
            reset = torch.nn.functional.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0))
            segment_ids = reset.cumsum(dim=1)  # a number that comes back later is another document
        step = Step(start, rotary, padding, mask, reset, segment_ids, method)

        x = self.embed_tokens(ids)
        states: dict[int, HyenaState] = {}
        keep = length if logits_to_keep is None else min(logits_to_keep, length)
        for i, layer in enumerate(self.layers):
            kept = keep if i == len(self.layers) - 1 else length  # nothing reads the other outputs of the last layer
            x, state = layer(x, step, None if cache is None else cache.layers[i], kept)
            if cache is not None and state is not None:
                states[i] = HyenaState(*(t.detach() for t in state))
        if cache is not None:
            cache.padding = padding
            cache.commit(states, length)
        head = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return nn.functional.linear(self.norm(x), head)

    def _check(
        self,
        ids: Tensor,
        cache: Cache | None,
        mask: Tensor | None,
        segment_ids: Tensor | None,
        logits_to_keep: int | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Refuse what does not fit; return the mask and the padding, each None where there is none."""
        if ids.ndim != 2 or ids.shape[1] == 0:
            raise InputError(f"the model takes token ids of shape [B, T>=1], and was given {tuple(ids.shape)}")
        if logits_to_keep is not None and logits_to_keep < 1:
            raise InputError(f"logits_to_keep is {logits_to_keep}: keep at least the last position")
        if _readable(ids):
            low, high = (int(t) for t in torch.aminmax(ids)) if ids.numel() else (0, 0)
            if low < 0 or high >= self.config.vocab_size:
                raise InputError(
                    f"token id {low if low < 0 else high} is outside the vocabulary of {self.config.vocab_size}: "
                    "use the tokenizer of this model"
                )
        if cache is not None and cache.batch_size != ids.shape[0]:
            raise InputError(f"the cache holds {cache.batch_size} rows and the ids {ids.shape[0]}: make another cache")
        if segment_ids is not None and (cache is not None or mask is not None or segment_ids.shape != ids.shape):
            raise InputError("segment_ids must have the shape of ids, and go without cache and without mask")
        if mask is None:
            return None, None
        if mask.shape != ids.shape:
            raise InputError(f"the mask has shape {tuple(mask.shape)} and the ids {tuple(ids.shape)}")
        mask = mask.to(torch.bool)
        if bool(mask.all()):
            return None, None
        if cache is not None and cache.length:
            raise InputError("padding is accepted with a cache's first tokens only")
        if not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            raise InputError("padding must stand on the left: every row of the mask is False …, then True …")
        return mask, (~mask).sum(dim=1)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights for training from scratch.

        Linear weights ~ N(0, 2/(5D)), those that write to the residual stream ~ N(0, (2/(L·√D))²) for L layers
        (Nguyen & Salazar 2019; Wang & Komatsuzaki 2021, GPT-J). Poles after S4D-Lin (Gu et al. 2022):
        ``p = exp(dt·(-1/2 + iπn))``, dt log-uniform in [1e-3, 0.1] per channel, so time constants of 20 to 2,000
        steps; residues random with ``E|R|² = (1-|p|²)/N``, so that white noise keeps its power (the normalisation of
        Orvieto et al. 2023, "Resurrecting Recurrent Neural Networks").
        """
        config = self.config
        width, modes = config.hidden_size, config.state_size
        small, output = math.sqrt(2 / (5 * width)), 2 / (config.num_layers * math.sqrt(width))
        writers: set[nn.Module] = set()
        for module in self.modules():
            if isinstance(module, Attention):
                writers.add(module.o_proj)
            elif isinstance(module, Hyena):
                writers.add(module.out_proj)
            elif isinstance(module, GatedMLP):
                writers.add(module.down_proj)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=output if module in writers else small, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=small, generator=generator)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, ShortFilter):
                bound = module.weight.shape[-1] ** -0.5
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, LongFilter):
                nn.init.ones_(module.skip)
                nn.init.uniform_(module.poles, math.log(1e-3), math.log(0.1), generator=generator)
                dt = module.poles[:, :1, 0].exp()  # one draw per channel
                phase = torch.arange(modes, device=dt.device) * torch.pi
                poles = torch.polar(torch.exp(-0.5 * dt).expand(-1, modes), dt * phase)
                module.poles.copy_(torch.view_as_real(poles))
                nn.init.normal_(module.residues, std=(0.5 / modes) ** 0.5, generator=generator)
                module.residues.mul_((1 - torch.exp(-dt)).sqrt().unsqueeze(-1))


def _readable(ids: Tensor) -> bool:
    """Whether the ids can be looked at: not while a graph is traced, not under vmap, not where it stalls a device."""
    transformed = torch._C._functorch.is_functorch_wrapped_tensor(ids)
    return ids.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed


def _accept_original_names(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
    """Rename, in place, a state dict that has the original implementation's keys."""
    assert isinstance(module, StripedHyena)
    if original.is_original(state):
        renamed = original.to_ours(dict(state), module.config)
        state.clear()
        state.update(renamed)
