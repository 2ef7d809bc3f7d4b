"""The operators of a decoding step as kernels; see ``DecodeOperators``, whose subclass and equal this is."""

from __future__ import annotations

import torch
from torch import Tensor

from hyaena.ops.hyena import HyenaState
from hyaena.ops.long_conv import ModalFilter
from hyaena.ops.step import DecodeOperators, Norm, Slots
from hyaena.ops.triton.decode import embed_argmax, gemv
from hyaena.ops.triton.decode.attention import decode_attention
from hyaena.ops.triton.decode.rope_kv import remember
from hyaena.ops.triton.hyena import launch


class FusedDecodeOperators(DecodeOperators):
    """Kernels that read every weight and every valid slot once, and never wait for the device.

    They take what ``ops.triton.decode_unsupported_reason`` has nothing against. With more than one row products are the
    library's.

    Args:
        tiles: measured tiles by operator and shape of the matrix, in place of the rule's.
        overlap: kernels begin before their predecessors end, see ``ops.triton.overlap``; only where the device can, of
            which ``can_overlap`` knows.
    """

    def __init__(self, tiles: dict[tuple[str, int, int], gemv.Tile] | None = None, *, overlap: bool = False) -> None:
        self.tiles = tiles or {}
        self.overlap = overlap

    def begin(self, ids: Tensor, table: Tensor, slots: Slots) -> Tensor:
        return embed_argmax.begin(ids, table, slots, overlap=self.overlap)

    def greedy(self, logits: Tensor, ids: Tensor) -> Tensor:
        return embed_argmax.greedy(logits, ids, overlap=self.overlap)

    def project(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        if x.shape[0] > 1:
            return super().project(x, weight, bias, norm=norm, residual=residual)
        return gemv.project(
            x,
            weight,
            bias,
            norm=norm,
            residual=residual,
            tile=self.tiles.get(("project", weight.shape[0], weight.shape[1])),
            overlap=self.overlap,
        )

    def gate(self, x: Tensor, gate: Tensor, up: Tensor, *, norm: Norm | None = None, activation: str) -> Tensor:
        if x.shape[0] > 1:
            return super().gate(x, gate, up, norm=norm, activation=activation)
        return gemv.gate(
            x,
            gate,
            up,
            norm=norm,
            activation=activation,
            tile=self.tiles.get(("gate", gate.shape[0], gate.shape[1])),
            overlap=self.overlap,
        )

    def remember(self, qkv: Tensor, keys: Tensor, values: Tensor, slots: Slots) -> Tensor:
        return remember(qkv, keys, values, slots, overlap=self.overlap)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, slots: Slots) -> Tensor:
        return decode_attention(q, keys, values, slots.padding, slots.used, overlap=self.overlap)

    def hyena(
        self, z: Tensor, short_weight: Tensor, short_bias: Tensor, long_filter: ModalFilter, state: HyenaState
    ) -> Tensor:
        poles, residues, iir = (torch.view_as_real(t) for t in (long_filter.poles, long_filter.residues, state.long))
        fir = state.short
        y = launch.step(
            z, short_weight, short_bias, poles, residues, long_filter.skip, fir, iir, fir, iir, self.overlap
        )
        return y.squeeze(1)
