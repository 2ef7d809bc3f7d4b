"""hyaena's norm, MLP, attention and projections under the original's names, the embedding and the head."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hyaena import ModelConfig, layers, ops
from hyaena.compat import ParallelGatedMLP, Renamed, RMSNorm
from hyaena.formats.evo2.extra_state import read_scales, write_scales
from hyaena.fp8 import FP8Linear

if TYPE_CHECKING:
    from vortex.model.cache import Pass

__all__ = [
    "MHA",
    "Lambda",
    "ParallelGatedMLP",
    "Projections",
    "RMSNorm",
    "RotaryEmbedding",
    "TELinear",
    "VocabParallelEmbedding",
    "VocabParallelUnembedding",
]


class RotaryEmbedding(Renamed, layers.Rotary):
    """hyaena's rotary tables with the buffer ``inv_freq``, float32 [head_dim/2] through every cast."""

    names: ClassVar = {"frequencies": "inv_freq"}


class MHA(Renamed, layers.Attention):
    """hyaena's attention: ``Wqkv``, rows [q | k | v], rotary positions, causal softmax, ``out_proj``."""

    names: ClassVar = {"qkv_proj": "Wqkv", "o_proj": "out_proj"}
    _version = 2
    """In the metadata of state dicts of this package: the rows of ``Wqkv`` have this order. Those of published
    checkpoints are [q | k | v] of each head."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__(config)
        self.layer_idx = layer_idx
        self.rotary_emb = RotaryEmbedding(config)

    def forward(self, x: Tensor, run: Pass) -> Tensor:  # type: ignore[override]
        context = run.context(x.device)
        tables = self.rotary_emb.forward(
            context.rotary[0], x.dtype
        )  # the original calls it with queries and keys: no hooks
        context = replace(context, rotary=tables)
        y, run.states[self.layer_idx] = super().forward(x, context, run.states[self.layer_idx], x.shape[1])
        return y


class Projections(nn.Linear):
    """Input projections of a Hyena block that were not trained in FP8."""

    use_fp8_input_projections = False

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """x [B,T,D] → (y [B,T,3D], None)."""
        return super().forward(x), None


class TELinear(FP8Linear):
    """Input projections of a Hyena block as FP8 products, where they can be; see ``hyaena.fp8.FP8Linear``.

    The scales stand in ``_extra_state`` of state dicts, as uint8 [n], in the format of Transformer Engine 1.x; without
    one they are 1.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("scales", self.scales, persistent=False)

    @property
    def use_fp8_input_projections(self) -> bool:
        """False computes plain products on every device."""
        return self.mode != "off"

    @use_fp8_input_projections.setter
    def use_fp8_input_projections(self, value: bool) -> None:
        self.mode = "auto" if value else "off"

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """x [B,T,D] → (y [B,T,3D], None)."""
        return super().forward(x), None

    def get_extra_state(self) -> Tensor:
        return as_bytes(b"" if self.scales.is_meta else write_scales(*self.scales.tolist()))

    def set_extra_state(self, state: Any) -> None:
        self.scales.copy_(torch.tensor(read_scales(as_bytes(state).numpy().tobytes())))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *errors: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *errors)
        missing = errors[0]
        if (key := f"{prefix}_extra_state") in missing:
            missing.remove(key)


def as_bytes(state: Any) -> Tensor:
    """An extra state, as files hold it or its bytes, as uint8 [n] on the CPU."""
    if isinstance(state, Tensor):
        return state.cpu()
    content = state.getvalue() if isinstance(state, io.BytesIO) else state or b""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


class VocabParallelEmbedding(nn.Embedding):
    """The embedding, and the head by its transpose."""

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        """Look up int32 or int64 ids [B,T]: [B,T,D]."""
        return layers.embed(super().forward, ids, self.num_embeddings)  # type: ignore[arg-type]

    def unembed(self, u: Tensor) -> Tensor:
        """Logits [B,T,V] of the final hidden states u [B,T,D]."""
        return ops.linear(u, ops.Dense(self.weight))


class VocabParallelUnembedding(VocabParallelEmbedding):
    """A head with a matrix of its own."""

    def forward(self, u: Tensor) -> Tensor:  # type: ignore[override]
        return self.unembed(u)


class Lambda(nn.Module):
    """A function as a module, so that it can have hooks: the tied head."""

    def __init__(self, func: Any) -> None:
        super().__init__()
        self.func = func

    def forward(self, u: Tensor) -> Tensor:
        return self.func(u)
