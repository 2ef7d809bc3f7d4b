"""The model at T = 1: what ``StripedHyena.forward`` computes with a cache, over operators made for one position.

Prefill is bound by arithmetic and decoding by reading the weights, so this is the one place that spells the
architecture out a second time: norms, residuals and gates belong to the products beside them here. The tests hold it
to the model's own forward, token by token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyaena.cache import KVCache
from hyaena.decoding.memory import StaticMemory
from hyaena.model import Attention, GatedMLP, Hyena, Layer, LongFilter, RMSNorm, ShortFilter, StripedHyena
from hyaena.ops import HyenaState
from hyaena.ops.step import DecodeOperators, Norm

_PARTS = (
    StripedHyena, Layer, Attention, Hyena, GatedMLP, RMSNorm, ShortFilter, LongFilter, nn.Linear, nn.Embedding,
    nn.ModuleList,
)  # fmt: skip


def step(model: StripedHyena, memory: StaticMemory, ids: Tensor, operators: DecodeOperators) -> Tensor:
    """Read one token per row, ids [B]; logits [B,V] of the next. The memory moves on in place."""
    x = operators.begin(ids, model.embed_tokens.weight, memory.slots)  # [B,D]
    for layer, held in zip(model.layers, memory.layers, strict=True):
        assert isinstance(layer, Layer)
        norm = _norm(layer.mixer_norm)
        if isinstance(layer.mixer, Attention):
            assert isinstance(held, KVCache)
            x = _attention(layer.mixer, norm, x, held, memory, operators)
        else:
            assert isinstance(layer.mixer, Hyena) and isinstance(held, HyenaState)
            x = _hyena(layer.mixer, norm, x, held, operators)
        mlp, norm = layer.mlp, _norm(layer.mlp_norm)
        activation = model.config.activation
        h = operators.gate(x, mlp.gate_proj.weight, mlp.up_proj.weight, norm=norm, activation=activation)
        x = operators.project(h, mlp.down_proj.weight, residual=x)
    head = model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
    return operators.project(x, head, norm=_norm(model.norm))


def _attention(
    mixer: Attention, norm: Norm, x: Tensor, held: KVCache, memory: StaticMemory, operators: DecodeOperators
) -> Tensor:
    qkv = operators.project(x, mixer.qkv_proj.weight, mixer.qkv_proj.bias, norm=norm)
    q = operators.remember(qkv, held.keys, held.values, memory.slots)
    y = operators.attend(q, held.keys, held.values, memory.slots)
    return operators.project(y.flatten(1), mixer.o_proj.weight, mixer.o_proj.bias, residual=x)


def _hyena(mixer: Hyena, norm: Norm, x: Tensor, held: HyenaState, operators: DecodeOperators) -> Tensor:
    z = operators.project(x, mixer.in_proj.weight, mixer.in_proj.bias, norm=norm)
    short = mixer.short_filter
    y = operators.hyena(z, short.weight, short.bias, mixer.long_filter(), held)
    return operators.project(y, mixer.out_proj.weight, mixer.out_proj.bias, residual=x)


def _norm(module: RMSNorm) -> Norm:
    return Norm(module.weight, module.eps, module.eps_inside_root)


def why_not(model: StripedHyena) -> str | None:
    """Why this step would not compute what the model's own forward does, or None: it reads weights, not modules."""
    for name, module in model.named_modules():
        where = name or "the model"
        if type(module) not in _PARTS:
            return f"{where} is a {type(module).__name__}, of which a step on fixed memory knows nothing"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{where} has forward hooks, which a step on fixed memory would not call"
    if any(p.dtype != model.dtype for name, p in model.named_parameters() if not name.endswith(("poles", "residues"))):
        return "its weights are of several dtypes"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    return None
