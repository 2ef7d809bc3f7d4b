"""The operators of a decoding step as kernels: ``FusedDecodeOperators`` equals ``ops.step.DecodeOperators``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hyaena.ops import triton
from hyaena.ops.backend import Backend
from hyaena.ops.hyena import HyenaState
from hyaena.ops.kv import KVState
from hyaena.ops.linear import Dense, Linear
from hyaena.ops.long_conv import ExplicitFilter, Filter, ModalFilter, RealModalFilter
from hyaena.ops.narrow import Narrow
from hyaena.ops.pages import PagedKVState
from hyaena.ops.step import DecodeOperators, Norm, RMSNormWeight, StepContext
from hyaena.ops.triton import pointwise
from hyaena.ops.triton.decode import embed_argmax, gemv, narrow, row_tiles
from hyaena.ops.triton.decode.attention import decode_attention
from hyaena.ops.triton.decode.few_rows import Products
from hyaena.ops.triton.hyena import step_launch
from hyaena.ops.triton.hyena.register import real_pairs

if TYPE_CHECKING:
    from hyaena.ops.triton.decode.streamed import StreamedProducts


class FusedDecodeOperators(DecodeOperators):
    """Kernels that read every weight and every valid slot once, and never wait for the device.

    Products that none of ``gemv``, ``row_tiles``, ``few_rows`` and ``narrow`` takes, layers that are not records of
    weights, and filters that the kernels do not support are computed by the plain operators, captured all the same.

    Args:
        tiles: measured tiles of one row by operator and shape of the matrix, in place of the rule's.
        products: of several rows; made unless given.
        overlap: kernels start before their predecessors end, see ``ops.triton.pdl``; only where the device
            supports it, see ``ops.triton.can_overlap``.
        longest: the most tokens of any row, which bounds the splits of attention; the largest capacity unless given.
    """

    def __init__(
        self,
        tiles: dict[tuple[str, int, int], gemv.Tile] | None = None,
        *,
        products: Products | None = None,
        overlap: bool = False,
        longest: int | None = None,
    ) -> None:
        self.tiles = tiles or {}
        self.products = products or Products(overlap=overlap)
        self.backend = Backend(hyena=False, pointwise=True)
        self.overlap = overlap
        self.longest = longest
        self._arrived: dict[tuple[torch.device, int], Tensor] = {}

    def embed(self, ids: Tensor, table: Tensor | Callable[[Tensor], Tensor], context: StepContext) -> Tensor:
        if not isinstance(table, Tensor):
            return super().embed(ids, table, context)
        return embed_argmax.embed(ids, table, context, overlap=self.overlap)

    def argmax(self, logits: Tensor, ids: Tensor) -> Tensor:
        return embed_argmax.argmax(logits, ids, overlap=self.overlap)

    def linear(self, x: Tensor, layer: Linear, *, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        if not isinstance(layer, Dense | Narrow) or not isinstance(norm, RMSNormWeight | None):
            return super().linear(x, layer, norm=norm, residual=residual)
        if isinstance(layer, Dense) and row_tiles.takes(x, layer):
            return row_tiles.linear(x, layer, norm=norm, residual=residual, overlap=self.overlap)
        if isinstance(layer, Dense) and self.streams(x, layer):
            return self.streamed.linear(self.normalise(x, norm), layer, residual=residual)
        if x.shape[0] > 1 and self.products.takes(x, layer):
            return self.products.linear(self.normalise(x, norm), layer, residual=residual)
        if isinstance(layer, Narrow) and len(x) <= narrow.MOST_ROWS and narrow.takes(layer):
            return narrow.linear(x, layer, norm=norm, residual=residual, overlap=self.overlap)
        if not isinstance(layer, Dense) or len(x) > 1:
            return super().linear(x, layer, norm=norm, residual=residual)
        rows, width = layer.weight.shape
        tile = self.tiles.get(("linear", rows, width))
        return gemv.linear(x, layer, norm=norm, residual=residual, tile=tile, overlap=self.overlap)

    def gate(self, x: Tensor, gate: Linear, up: Linear, *, norm: Norm | None = None, activation: str) -> Tensor:
        if not isinstance(norm, RMSNormWeight | None):
            return super().gate(x, gate, up, norm=norm, activation=activation)
        if not together(gate, up):
            return super().gate(x, gate, up, norm=norm, activation=activation)
        assert isinstance(gate, Dense | Narrow) and isinstance(up, Dense | Narrow)
        if isinstance(gate, Dense) and isinstance(up, Dense) and row_tiles.takes(x, gate, up):
            return row_tiles.gate(x, gate, up, norm=norm, activation=activation, overlap=self.overlap)
        if isinstance(gate, Dense) and isinstance(up, Dense) and self.streams(x, gate, up):
            return self.streamed.gate(self.normalise(x, norm), gate, up, activation=activation)
        if x.shape[0] > 1 and self.products.takes(x, gate, up):
            return self.products.gate(self.normalise(x, norm), gate, up, activation=activation)
        if isinstance(gate, Narrow) and isinstance(up, Narrow) and len(x) <= narrow.MOST_ROWS and narrow.takes(gate):
            return narrow.gate(x, gate, up, norm=norm, activation=activation, overlap=self.overlap)
        if not isinstance(gate, Dense) or not isinstance(up, Dense) or len(x) > 1:
            return super().gate(x, gate, up, norm=norm, activation=activation)
        rows, width = gate.weight.shape
        return gemv.gate(
            x,
            gate.weight,
            up.weight,
            norm=norm,
            activation=activation,
            tile=self.tiles.get(("gate", rows, width)),
            overlap=self.overlap,
        )

    @cached_property
    def streamed(self) -> StreamedProducts:
        """Products on Hopper GPUs; imported there only, since a Triton elsewhere may lack the language of it."""
        from hyaena.ops.triton.decode.streamed import StreamedProducts

        return StreamedProducts(overlap=self.overlap)

    def streams(self, x: Tensor, *layers: Dense) -> bool:
        """Whether ``streamed`` multiplies these vectors and matrices."""
        return triton.can_stream(x.device) and self.streamed.takes(x, *layers)

    def normalise(self, x: Tensor, norm: Norm | None) -> Tensor:
        if not isinstance(norm, RMSNormWeight):
            return super().normalise(x, norm)
        return pointwise.rms_norm(x, norm.weight, norm.eps, eps_inside_root=norm.eps_inside_root, overlap=self.overlap)

    def attention(self, qkv: Tensor, state: KVState | PagedKVState, context: StepContext) -> Tensor:
        rows = state.through(context.pages)
        arrived = self._counters(qkv.device, len(qkv) * rows.groups)
        return decode_attention(qkv, rows, context, arrived, longest=self.longest, overlap=self.overlap)

    def _counters(self, device: torch.device, count: int) -> Tensor:
        """Zeros of ``count`` or more; never freed, since captured graphs hold their address."""
        size = 1 << (count - 1).bit_length()
        if (device, size) not in self._arrived:
            self._arrived[device, size] = torch.zeros(size, dtype=torch.int32, device=device)
        return self._arrived[device, size]

    def hyena(
        self, z: Tensor, short_weight: Tensor, short_bias: Tensor | None, long_filter: Filter, state: HyenaState
    ) -> Tensor:
        if triton.unsupported_reason(z, short_weight, long_filter, state.long, None) is not None:
            return super().hyena(z, short_weight, short_bias, long_filter, state)
        return self._hyena(z, short_weight, short_bias, long_filter, state, None)

    def hyena_at(
        self,
        z: Tensor,
        short_weight: Tensor,
        short_bias: Tensor | None,
        long_filter: Filter,
        state: HyenaState,
        source: Tensor,
        target: Tensor,
    ) -> Tensor:
        odd = isinstance(long_filter, RealModalFilter) and long_filter.residues.shape[1] % 2
        if odd or triton.unsupported_reason(z, short_weight, long_filter, state.long, None) is not None:
            return super().hyena_at(z, short_weight, short_bias, long_filter, state, source, target)
        return self._hyena(z, short_weight, short_bias, long_filter, state, (source.contiguous(), target.contiguous()))

    def _hyena(
        self,
        z: Tensor,
        short_weight: Tensor,
        short_bias: Tensor | None,
        long_filter: Filter,
        state: HyenaState,
        places: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        short, long = state
        if isinstance(long_filter, ExplicitFilter):
            given = (long_filter.taps, long_filter.skip, short, long, short, long)
            return step_launch.step_taps(z, short_weight, short_bias, *given, self.overlap, places).squeeze(1)
        assert isinstance(long_filter, ModalFilter | RealModalFilter)
        poles, residues, pairs = real_pairs(long_filter, long)
        assert pairs is not None
        filter = (poles, residues, long_filter.skip)
        real = isinstance(long_filter, RealModalFilter)
        y = step_launch.step_modes(
            z, short_weight, short_bias, *filter, short, pairs, short, pairs, self.overlap, real, places
        )
        if real and long.shape[-1] % 2:  # a copy that one more mode made even
            long.copy_(pairs.flatten(2)[..., :-1])
        return y.squeeze(1)


def together(gate: Linear, up: Linear) -> bool:
    """Whether two layers are of one kind and without biases, so that one kernel reads both."""
    if isinstance(gate, Narrow):
        return isinstance(up, Narrow) and narrow.alike(gate, up)
    return isinstance(gate, Dense) and isinstance(up, Dense) and gate.bias is up.bias is None
