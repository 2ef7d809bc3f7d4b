"""The original's model: its module and parameter names and layouts, computed by hyaena.

Parameters are stored as in the original's checkpoints: poles and residues [D,N,1,2], short filters [3D,1,K], and
projections whose rows are interleaved head by head where ``column_split_hyena`` says so. Every module is called, so
hooks, adapters and modules of the user's own in their places see and compute what they did there.

Shapes: B batch, T time, D channels, H query heads, K short-filter taps, N modes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hyaena import ModelConfig, ops
from hyaena.errors import CheckpointError, InputError
from hyaena.filters import Float32Parameters, LongFilter, ShortFilter
from hyaena.formats import config_from_dict
from stripedhyena.cache import InferenceParams, Memory, Pass, RecurrentInferenceParams, make_context
from stripedhyena.layers import MHA, ParallelGatedMLP, RMSNorm, Unembedding, VocabParallelEmbedding


class ParallelHyenaFilter(Float32Parameters):
    """Everything between the two projections of a Hyena block; see ``hyaena.ops.hyena``.

    Poles and residues stay float32 through every cast.
    """

    narrow: ClassVar = frozenset({"D", "short_filter_weight", "short_filter_bias"})

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads if config.column_split_hyena else 1
        width = config.hidden_size
        short, long = ShortFilter(3 * width, config.short_filter_length), LongFilter(width, config.state_size)
        with torch.no_grad():
            short.init_weights()
            long.init_weights()
        assert short.bias is not None
        self.D = long.skip
        self.short_filter_weight = nn.Parameter(short.weight.detach().unsqueeze(1))
        self.short_filter_bias = short.bias
        self.poles = nn.Parameter(long.poles.detach().unsqueeze(2))
        self.residues = nn.Parameter(long.residues.detach().unsqueeze(2))

    def forward(
        self, u: Tensor, inference_params: Any = None, padding_mask: Tensor | None = None, *, run: Pass
    ) -> tuple[Tensor, Any]:
        """u [B,T,3D], the projection in the order of the checkpoint, → (y [B,T,D], inference_params)."""
        y, run.states[self.layer_idx] = ops.hyena(
            self.to_blocks(u, -1),
            self.to_blocks(self.short_filter_weight, 0).squeeze(1),
            self.to_blocks(self.short_filter_bias, 0),
            self.modal_filter(),
            run.states[self.layer_idx],
            mask=run.context.mask,
            method=run.context.method,
            backend=run.context.backend,
        )
        return y, inference_params

    def modal_filter(self) -> ops.ModalFilter:
        """The long filter, in tensors that own their memory."""
        poles, residues = (torch.complex(*t.squeeze(2).unbind(-1)) for t in (self.poles, self.residues))
        return ops.ModalFilter(poles, residues, self.D.clone())

    def make_state(self, rows: int, method: str, dtype: torch.dtype) -> ops.HyenaState:
        """An empty state, for ``method``."""
        channels, _, taps = self.short_filter_weight.shape
        short = torch.zeros(rows, channels, taps - 1, dtype=dtype, device=self.D.device)
        long: ops.ModalFilter | ops.ExplicitFilter = self.modal_filter()
        if ops.capabilities(method).state == "window":
            long = ops.truncate(long)[0]  # type: ignore[arg-type]
        return ops.HyenaState(short, long.initial_state(rows, channels // 3, method).to(self.D.device))

    def to_blocks(self, t: Tensor, dim: int) -> Tensor:
        """An axis of 3D channels: the order of the checkpoint → three blocks ``[x2 | x1 | v]``."""
        return _swap(t, dim, (self.num_heads, 3))

    def to_heads(self, t: Tensor, dim: int) -> Tensor:
        """The inverse of :meth:`to_blocks`."""
        return _swap(t, dim, (3, self.num_heads))

    def compute_filter(
        self, L: int, device: torch.device | str | None = None
    ) -> tuple[Tensor, torch.dtype, Tensor, Tensor]:
        """The long filter h [1,D,L] without D, its dtype, the logarithms of the poles and the residues [D,N,1]."""
        poles, residues, _ = self.modal_filter()
        h = ops.taps(ops.ModalFilter(poles, residues, None), L).to(device or poles.device)
        return h[None], h.dtype, poles.log().unsqueeze(2), residues.unsqueeze(2)


def _swap(t: Tensor, dim: int, sizes: tuple[int, int]) -> Tensor:
    dim %= t.dim()
    if 1 in sizes:  # the two orders are the same
        return t
    return t.unflatten(dim, (*sizes, -1)).transpose(dim, dim + 1).flatten(dim, dim + 2)


class AttentionBlock(nn.Module):
    """``u += inner_mha_cls(pre_norm(u));  u += mlp(post_norm(u))``."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.architecture, self.layer_idx = config, layer_idx
        self.pre_norm, self.post_norm = RMSNorm(config), RMSNorm(config)
        self.inner_mha_cls = MHA(config, layer_idx)
        self.mlp = ParallelGatedMLP(config)

    def forward(
        self,
        u: Tensor,
        inference_params: Any = None,
        padding_mask: Tensor | None = None,
        *,
        run: Pass | None = None,
    ) -> tuple[Tensor, None]:
        """u [B,T,D] → (u [B,T,D], None). The model gives ``run``; a block that is called by itself keeps nothing."""
        run = run or Pass.stateless(self.architecture, u, inference_params, padding_mask)
        u = u + self.inner_mha_cls(self.pre_norm(u), run)
        return u + self.mlp(self.post_norm(u)), None


class ParallelGatedConvBlock(nn.Module):
    """``u += out_filter_dense(filter(projections(pre_norm(u))));  u += mlp(post_norm(u))``."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.architecture, self.layer_idx = config, layer_idx
        self.pre_norm, self.post_norm = RMSNorm(config), RMSNorm(config)
        self.filter = ParallelHyenaFilter(config, layer_idx)
        self.projections = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_filter_dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.mlp = ParallelGatedMLP(config)

    def forward(
        self,
        u: Tensor,
        inference_params: Any = None,
        padding_mask: Tensor | None = None,
        *,
        run: Pass | None = None,
    ) -> tuple[Tensor, Any]:
        """u [B,T,D] → (u [B,T,D], inference_params). See :class:`AttentionBlock`."""
        run = run or Pass.stateless(self.architecture, u, inference_params, padding_mask)
        y, _ = self.filter(self.projections(self.pre_norm(u)), inference_params, padding_mask, run=run)
        u = u + self.out_filter_dense(y)
        return u + self.mlp(self.post_norm(u)), inference_params


BLOCKS = {"attention": AttentionBlock, "hyena": ParallelGatedConvBlock}


class StripedHyena(nn.Module):
    """A StripedHyena model of the original's API.

    ``load_state_dict`` takes the original's keys; what checkpoints hold in addition (rotary frequencies, times of
    filters, a tied head or none) is accepted.

    Args:
        config: the original's configuration, as a dictionary.

    Attributes:
        config: that dictionary.
        architecture: the same as hyaena's ``ModelConfig``.

    Raises:
        ConfigError: unknown, missing or contradictory keys.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.architecture = config_from_dict(dict(config))
        vocabulary, width = self.architecture.vocab_size, self.architecture.hidden_size
        self.embedding_layer = VocabParallelEmbedding(vocabulary, width)
        self.norm = RMSNorm(self.architecture)
        tied = self.architecture.tie_embeddings
        self.unembed = self.embedding_layer if tied else Unembedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            BLOCKS[kind](self.architecture, i) for i, kind in enumerate(self.architecture.layer_types)
        )
        self.register_load_state_dict_pre_hook(_tolerate)

    @property
    def device(self) -> torch.device:
        return self.embedding_layer.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding_layer.weight.dtype

    def forward(
        self,
        x: Tensor,
        inference_params_dict: Mapping[str, Any] | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Mapping[str, Any] | None]:
        """Logits of the token that follows each position.

        Args:
            x: int32 or int64 ids [B,T], T >= 1.
            inference_params_dict: what :meth:`initialize_inference_params` returned. It is brought up to date, or left
                as it was if anything fails. The model knows how many tokens it holds, so any number may follow.
            padding_mask: [B,T], nonzero where there is a token. Padding stands on the left, or, without
                ``inference_params_dict``, on the right. A padded row equals that row alone.

        Returns:
            logits [B,T,V], and ``inference_params_dict``.

        Raises:
            InputError: ids, a mask or inference parameters that cannot be used.
        """
        if not isinstance(x, Tensor) or x.dim() != 2:
            raise InputError("the model takes token ids as a tensor [B,T]")
        params = inference_params_dict
        memory = None if params is None else Memory(self, params, x)
        context = make_context(self.architecture, x, padding_mask, memory, self.dtype)
        if params is None or memory is None:
            return self._logits(x, {}, padding_mask, Pass(context, [None] * len(self.blocks))), None
        assert context.lengths is not None and context.counts is not None
        with memory.cache.reading(self, len(x), context.lengths, context.counts):
            run = Pass(context, list(memory.cache.states))
            logits = self._logits(x, params, padding_mask, run)
            memory.cache.commit([state.detach() for state in run.states], context.counts)
        memory.commit()
        return logits, params

    def _logits(self, ids: Tensor, params: Mapping[str, Any], padding_mask: Tensor | None, run: Pass) -> Tensor:
        x = self.embedding_layer.embed(ids)
        for block, kind in zip(self.blocks, self.architecture.layer_types, strict=True):
            own = params.get("mha" if kind == "attention" else "hyena")
            x, _ = block(x, inference_params=own, padding_mask=padding_mask, run=run)
        return self.unembed.unembed(self.norm(x))

    def initialize_inference_params(self) -> dict[str, Any]:
        """Empty parameters for a new batch: keys and values (``"mha"``) and states of Hyena layers (``"hyena"``)."""
        config = self.architecture
        return {
            "mha": InferenceParams(max_seqlen=config.max_length, max_batch_size=1),
            "hyena": RecurrentInferenceParams(
                fir_filter_length=config.short_filter_length, state_dim=config.state_size
            ),
        }

    def to_bfloat16_except_poles_residues(self) -> None:
        """Cast all parameters to bfloat16 but poles and residues, which stay float32 through every cast."""
        self.to(torch.bfloat16)

    def load_poles_residues(self, path: str) -> None:
        """Read other poles and residues, complex [N,D], from ``approx_{poles,residues}_{i+1}.pt`` for each layer i."""
        for i, block in enumerate(self.blocks):
            if isinstance(block, ParallelGatedConvBlock):
                for name in ("poles", "residues"):
                    file = Path(path) / f"approx_{name}_{i + 1}.pt"
                    value = torch.load(file, map_location="cpu", weights_only=True)
                    value = torch.view_as_real(value).permute(1, 0, 2).unsqueeze(2)
                    parameter = getattr(block.filter, name)
                    if value.shape != parameter.shape:
                        raise CheckpointError(
                            f"{file.name} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}"
                        )
                    with torch.no_grad():
                        parameter.copy_(value)


def _tolerate(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Drop, in place, what checkpoints hold and the model computes; give a tied head where it is absent."""
    assert isinstance(module, StripedHyena)
    for key in [key for key in state if key.endswith(("filter.t", "filter.freq", "_extra_state"))]:
        del state[key]
    embedding, head = f"{prefix}embedding_layer.weight", f"{prefix}unembed.weight"
    if not module.architecture.tie_embeddings or embedding not in state:
        return
    given, weight = state.setdefault(head, state[embedding]), state[embedding]
    if given is not weight and not given.is_meta and not weight.is_meta and not torch.equal(given, weight):
        raise CheckpointError(
            "tie_embeddings is true, but unembed.weight differs from embedding_layer.weight: set it to false"
        )
