"""The original's model: its module and parameter names and layouts, computed by hyaena.

Parameters are stored as in the original: filters of taps [G,1,W], modes [D,N], short filters [3D,1,K], and projections
whose rows are interleaved channel by channel. Every module is called, so hooks, adapters and modules of the user's own
in their places see and compute what they did there.

Shapes: B batch, T time, D channels, H heads, G groups, K short-filter taps, W inner-filter taps, N modes, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hyaena import ModelConfig, ops
from hyaena.errors import InputError
from hyaena.filters import Float32Parameters
from hyaena.formats import config_from_dict
from hyaena.formats.evo2.config import SWITCH
from hyaena.layers import call, init_module
from vortex.model.cache import (
    NAMES,
    HyenaCascadeFIRInferenceParams,
    HyenaCascadeIIRInferenceParams,
    InferenceParams,
    Memory,
    Pass,
    device_of,
    make_context,
)
from vortex.model.layers import (
    MHA,
    Lambda,
    ParallelGatedMLP,
    Projections,
    RMSNorm,
    TELinear,
    VocabParallelEmbedding,
    VocabParallelUnembedding,
)
from vortex.model.weights import load_weights


class HyenaCascade(Float32Parameters):
    """Everything between the two projections of a Hyena block; see ``hyaena.ops.hyena``.

    The inner filter is either explicit, ``h`` [G,1,W] (with ``D`` [D] where W >= 128), or the sum of N real modes,
    ``log_poles`` [D,N,1] and ``residues`` [D,N] (with ``D``), which stay float32 through every cast.
    """

    narrow: ClassVar = frozenset({"D", "h", "short_filter_weight", "short_filter_bias"})

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, width = layer_idx, config.hidden_size
        kind = config.layer_types[layer_idx]
        explicit = {
            "hyena_se": (config.se_filter_length, config.se_filter_groups, config.se_filter_skip),
            "hyena_mr": (config.mr_filter_length, config.mr_filter_groups, config.mr_filter_skip),
        }
        self.short_filter_weight = nn.Parameter(torch.empty(3 * width, 1, config.short_filter_length))
        self.short_filter_bias = nn.Parameter(torch.empty(3 * width)) if config.short_filter_bias else None
        self.fir_inner_filter_length, groups, skip = explicit.get(kind, (None, None, True))
        self.D = nn.Parameter(torch.empty(width)) if skip else None
        if self.fir_inner_filter_length is not None:
            self.h = nn.Parameter(torch.empty(groups or width, 1, self.fir_inner_filter_length))
        else:
            self.h = None
            self.log_poles = nn.Parameter(torch.empty(width, config.state_size, 1, dtype=torch.float32))
            self.residues = nn.Parameter(torch.empty(width, config.state_size, dtype=torch.float32))

    def forward(
        self, u: Tensor, inference_params: Any = None, padding_mask: Tensor | None = None, *, run: Pass
    ) -> tuple[Tensor, Any]:
        """u [B,T,3D], the projection in the order of the checkpoint, → (y [B,T,D], inference_params)."""
        bias = self.short_filter_bias
        context = run.context(u.device)
        y, run.states[self.layer_idx] = ops.hyena(
            self.to_blocks(u, -1),
            self.to_blocks(self.short_filter_weight, 0).squeeze(1),
            None if bias is None else self.to_blocks(bias, 0),
            self.inner_filter(),
            run.states[self.layer_idx],
            mask=context.mask,
            method=context.method,
            backend=context.backend,
        )
        return y, inference_params

    def inner_filter(self) -> ops.ExplicitFilter | ops.RealModalFilter:
        """The inner filter as hyaena's, in tensors that own their memory."""
        skip = None if self.D is None else self.D.clone()
        if self.h is None:
            return ops.RealModalFilter(self.log_poles.squeeze(2).clone(), self.residues.clone(), skip)
        taps = self.h.squeeze(1)  # stored with the tap of the current token first from SWITCH taps on, else last
        return ops.ExplicitFilter(taps.clone() if taps.shape[1] >= SWITCH else taps.flip(1), skip)

    def make_state(self, rows: int, dtype: torch.dtype) -> ops.HyenaState:
        """An empty state."""
        channels, _, taps = self.short_filter_weight.shape
        device = self.short_filter_weight.device
        short = torch.zeros(rows, channels, taps - 1, dtype=dtype, device=device)
        return ops.HyenaState(short, self.inner_filter().initial_state(rows, channels // 3).to(device))

    @staticmethod
    def to_blocks(t: Tensor, dim: int) -> Tensor:
        """An axis of 3D channels: channel by channel, as in the checkpoint → three blocks ``[x2 | x1 | v]``."""
        dim %= t.dim()
        return t.unflatten(dim, (-1, 3)).transpose(dim, dim + 1).flatten(dim, dim + 1)

    @staticmethod
    def to_checkpoint(t: Tensor, dim: int) -> Tensor:
        """The inverse of :meth:`to_blocks`."""
        dim %= t.dim()
        return t.unflatten(dim, (3, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random filters of bounded gain, with which an untrained model is stable."""
        taps = self.short_filter_weight.shape[-1]
        nn.init.uniform_(self.short_filter_weight, -(taps**-0.5), taps**-0.5, generator=generator)
        for zeros in (self.short_filter_bias, self.D):
            if zeros is not None:
                nn.init.zeros_(zeros)
        if self.h is not None:
            nn.init.normal_(self.h, std=self.h.shape[2] ** -0.5, generator=generator)
        else:
            nn.init.uniform_(self.log_poles, math.log(1e-3), math.log(0.1), generator=generator)
            self.log_poles.copy_(-self.log_poles.exp())
            nn.init.normal_(self.residues, std=self.residues.shape[1] ** -0.5, generator=generator)
            self.residues.mul_((1 - torch.exp(2 * self.log_poles.squeeze(2))).sqrt())


class _Block(nn.Module):
    """What both kinds of blocks share: two norms and an MLP, and being called without a model."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.architecture, self.layer_idx = config, layer_idx
        self.pre_norm, self.post_norm = RMSNorm(config), RMSNorm(config)
        self.mlp = ParallelGatedMLP(config, config.activation_of(layer_idx))

    def _run(self, u: Tensor, inference_params: Any, padding_mask: Tensor | None, run: Pass | None) -> Pass:
        if run is not None:
            return run
        if inference_params is not None:
            raise InputError("a block that is called by itself takes no inference_params: use stateful_forward")
        ids = torch.zeros(u.shape[:2], dtype=torch.int64, device=u.device)
        return Pass(make_context(ids, padding_mask, None, u.dtype), [None] * self.architecture.num_layers)

    def _mlp(self, u: Tensor, run: Pass) -> Tensor:
        context = run.context(u.device)
        return u + call(self.mlp, call(self.post_norm, u, context), context)


class AttentionBlock(_Block):
    """``u += inner_mha_cls(pre_norm(u));  u += mlp(post_norm(u))``."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.inner_mha_cls = MHA(config, layer_idx)

    def forward(
        self, u: Tensor, inference_params: Any = None, padding_mask: Tensor | None = None, *, run: Pass | None = None
    ) -> tuple[Tensor, None]:
        """u [B,T,D] → (u [B,T,D], None). The model gives ``run``; a block that is called by itself keeps nothing."""
        run = self._run(u, inference_params, padding_mask, run)
        u = u + self.inner_mha_cls(call(self.pre_norm, u, run.context(u.device)), run)
        return self._mlp(u, run), None


class ParallelGatedConvBlock(_Block):
    """``u += out_filter_dense(filter(projections(pre_norm(u))));  u += mlp(post_norm(u))``."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        width = config.hidden_size
        self.filter = HyenaCascade(config, layer_idx)
        if config.fp8_input_projections:
            self.projections = TELinear(width, 3 * width)
        else:
            self.projections = Projections(width, 3 * width, bias=config.hyena_in_bias)
        self.out_filter_dense = nn.Linear(width, width, bias=config.hyena_out_bias)

    def forward(
        self, u: Tensor, inference_params: Any = None, padding_mask: Tensor | None = None, *, run: Pass | None = None
    ) -> tuple[Tensor, Any]:
        """u [B,T,D] → (u [B,T,D], inference_params). See :class:`AttentionBlock`."""
        run = self._run(u, inference_params, padding_mask, run)
        z = self.projections(call(self.pre_norm, u, run.context(u.device)))
        z = z[0] if isinstance(z, tuple) else z  # a module in its place may return the tensor alone
        y, _ = self.filter(z, inference_params, padding_mask, run=run)
        return self._mlp(u + self.out_filter_dense(y), run), inference_params


class StripedHyena(nn.Module):
    """A StripedHyena 2 model of the original's API.

    Weights are bfloat16, but for modes and rotary frequencies, which are float32; ``.float()`` makes all float32. Where
    there are several CUDA devices the blocks are spread over them in order. With ``torch.device(…)`` as a context the
    model is made there.

    Args:
        config: the original's configuration, as a dictionary.

    Attributes:
        config: that dictionary.
        architecture: the same as hyaena's ``ModelConfig``.

    Raises:
        ConfigError: unknown, missing or contradictory keys, or those of another member of the family.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.architecture = config_from_dict(dict(config))
        count = self.architecture.num_layers
        devices = default_devices()
        places = [devices[i * len(devices) // count] for i in range(count)]
        with places[0]:
            vocabulary, width = self.architecture.vocab_size, self.architecture.hidden_size
            self.embedding_layer = VocabParallelEmbedding(vocabulary, width, dtype=torch.bfloat16)
            self.norm = RMSNorm(self.architecture).to(torch.bfloat16)
            if self.architecture.tie_embeddings:
                self.unembed = Lambda(self.embedding_layer.unembed)
            else:
                self.unembed = VocabParallelUnembedding(vocabulary, width, dtype=torch.bfloat16)
        self.blocks = nn.ModuleList()
        for i, kind in enumerate(self.architecture.layer_types):
            make = AttentionBlock if kind == "attention" else ParallelGatedConvBlock
            with places[i]:
                self.blocks.append(make(self.architecture, i).to(torch.bfloat16))
        if devices[0].type != "meta":
            self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        writers = {m for block in self.blocks for name, m in block.named_modules() if name in WRITERS}
        for module in self.modules():
            if module is not self:
                init_module(module, self.architecture, writes_residual=module in writers)

    @property
    def device(self) -> torch.device:
        return self.embedding_layer.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding_layer.weight.dtype

    @property
    def block_idx_to_device(self) -> dict[int, str]:
        """Where each block is."""
        return {i: str(device_of(block)) for i, block in enumerate(self.blocks)}

    def block_idx_to_name(self, block_idx: int) -> str:
        """The key of ``inference_params_dict`` for a block: mha, hcl, hcm or hcs."""
        return NAMES[self.architecture.layer_types[block_idx]]

    def kinds_and_blocks(self) -> Iterator[tuple[str, Any]]:
        """The blocks, each with hyaena's name of its kind."""
        return zip(self.architecture.layer_types, self.blocks, strict=True)

    def forward(
        self,
        x: Tensor,
        inference_params_dict: Mapping[str, Any] | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Mapping[str, Any] | None]:
        """Logits of the token that follows each position.

        Args:
            x: ids [B,T], T >= 1.
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
        with self._pass(x, inference_params_dict, padding_mask, x) as run:
            x = self._through_blocks(self.embedding_layer(x), inference_params_dict, padding_mask, run)
            return self.unembed(self.norm(x)), inference_params_dict

    def stateful_forward(
        self, x: Tensor, inference_params_dict: Mapping[str, Any], padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """All blocks over embedded tokens x [B,T,D] that follow what ``inference_params_dict`` holds; [B,T,D]."""
        with self._pass(self._places(x), inference_params_dict, padding_mask, None) as run:
            return self._through_blocks(x, inference_params_dict, padding_mask, run), inference_params_dict

    def stateless_forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """All blocks over embedded tokens x [B,T,D]; [B,T,D]."""
        with self._pass(self._places(x), None, padding_mask, None) as run:
            return self._through_blocks(x, None, padding_mask, run), None

    @staticmethod
    def _places(x: Tensor) -> Tensor:
        """In the place of the ids of embedded tokens."""
        return torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)

    @contextmanager
    def _pass(
        self, places: Tensor, params: Mapping[str, Any] | None, padding_mask: Tensor | None, ids: Tensor | None
    ) -> Iterator[Pass]:
        """One pass over [B,T] tokens; what was read becomes part of ``params`` at its end, or not at all."""
        if params is None:
            context = make_context(places, padding_mask, None, self.dtype)
            yield Pass(context, [None] * len(self.blocks))
            return
        memory = Memory(self, params, *places.shape)
        context = make_context(places, padding_mask, memory.cache, self.dtype)
        assert context.lengths is not None and context.counts is not None
        with memory.cache.reading(self, len(places), context.lengths, context.counts):
            run = Pass(context, list(memory.cache.states))
            yield run
            memory.cache.commit([state.detach() for state in run.states], context.counts)
        memory.commit(ids)

    def _through_blocks(
        self, x: Tensor, params: Mapping[str, Any] | None, padding_mask: Tensor | None, run: Pass
    ) -> Tensor:
        first = x.device
        for i, block in enumerate(self.blocks):
            own = None if params is None else params[self.block_idx_to_name(i)]
            x, _ = block(self.cross_device_transfer(x, i), inference_params=own, padding_mask=padding_mask, run=run)
        return x.to(first)

    def cross_device_transfer(self, x: Tensor, block_idx: int) -> Tensor:
        """x where a block is."""
        return x.to(device_of(self.blocks[block_idx]))

    def initialize_inference_params(self, max_seqlen: int | None = None) -> dict[str, Any]:
        """Empty parameters for a new batch: keys and values (``"mha"``) and states (``"hcl"``, ``"hcm"``, ``"hcs"``).

        Args:
            max_seqlen: tokens for which there is room at first. The room grows when it does not suffice.
        """
        config = self.architecture
        short = config.short_filter_length
        return {
            "mha": InferenceParams(max_seqlen or config.max_length, max_batch_size=1, room=max_seqlen or 0),
            "hcl": HyenaCascadeIIRInferenceParams(short, config.state_size),
            "hcm": HyenaCascadeFIRInferenceParams(short, config.mr_filter_length),
            "hcs": HyenaCascadeFIRInferenceParams(short, config.se_filter_length),
        }

    def custom_load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Load a state dict as published checkpoints have it.

        Rows of ``Wqkv`` stand head by head there (``column_split``) and are put in the order [q | k | v] of this model.
        What checkpoints hold and the model computes is left out; rotary frequencies may be missing. A state dict of
        this model is known by its metadata and loaded as it is.

        Args:
            strict: whether missing and unknown keys are errors.

        Raises:
            CheckpointError: missing or unknown keys, or shapes of another model.
        """
        load_weights(self, state_dict, strict=strict)

    def to_bfloat16_except_pr_lc(self, to_float32: bool = False) -> None:
        """Cast all parameters to bfloat16 but modes and rotary frequencies, which are float32 through every cast.

        Args:
            to_float32: the original's; it makes those float32, which they are.
        """
        self.to(torch.bfloat16)


WRITERS = ("out_filter_dense", "inner_mha_cls.out_proj", "mlp.l3")
"""The layers of a block that write to the residual stream."""


def default_devices() -> list[torch.device]:
    """Where a new model goes: the device that a context names, else all CUDA devices, else the CPU."""
    chosen = torch.get_default_device()
    if chosen.type != "cpu" or not torch.cuda.is_available():
        return [chosen]
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
