"""The convolution in two stages over chunks of C steps: matrix products inside a chunk, the state between chunks.

With ``x`` cut into chunks, ``i`` and ``j`` counting steps inside one::

    y[c,i] = Σ_{j<=i} h[i-j] x[c,j]  +  Re Σ_n R_n p_n^(i+1) S_n[c]          a Toeplitz product and a low-rank one
    S[c+1] = p^C S[c] + Σ_j p^(C-1-j) x[c,j]                                  a scan over the chunks

Everything is a batched matrix product but the scan, which doubles its reach at each of log2(T/C) steps. The cost is
O(T·C) on matrix units, the memory O(T); plain autograd differentiates it. It is the chunked form that linear
attention and state-space models share (Dao & Gu 2024, "Transformers are SSMs", section 6).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyaena.ops.long_conv.filters import Stop
from hyaena.ops.long_conv.modes import Modes, as_real_pairs, from_real_pairs, limit, narrow, powers, readout_pairs

CHUNK = 32


class BlockTables:
    """What the convolution needs of a filter, for chunks of C steps. A chunk of fewer steps uses parts of it.

    Attributes:
        size: C.
        decay: p^0 … p^C, [F,N,C+1], in the dtype of states.
        gather: p^(C-1-j), [F,C,M]: the state that a chunk leaves.
        spread: R p^(i+1), [F,M,C]: the outputs that a state before a chunk adds.
        toeplitz: h[i-j], [F,C,C]: the outputs of a chunk by itself.
    """

    def __init__(self, modes: Modes, size: int = CHUNK) -> None:
        p, residues = modes
        dtype = residues.dtype
        ladder = powers(p, size + 1)
        self.size = size
        self.decay = narrow(ladder, dtype)
        self.gather = as_real_pairs(ladder[..., :size].flip(-1).transpose(1, 2).to(dtype))
        spread = readout_pairs((residues.to(p.dtype).unsqueeze(-1) * ladder[..., 1:]).transpose(1, 2).to(dtype))
        self.spread = spread.transpose(1, 2)
        self.toeplitz = toeplitz_matrix(modes.impulse_response(size))
        self._reached = ladder[..., size], (self.decay[..., size],)

    def hops(self, count: int) -> Sequence[Tensor]:
        """p^C, p^2C, p^4C, …: the decay over 1, 2, 4, … chunks, [F,N] each, ``count`` of them."""
        highest, hops = self._reached  # in the precision in which powers are formed; together, since threads share them
        while len(hops) < count:
            highest = limit(highest * highest)
            hops = (*hops, narrow(highest, self.decay.dtype))
            self._reached = highest, hops
        return hops[:count]


class _Chunks:
    """x cut into chunks, and the state before each.

    Attributes:
        values: [F,B·c,C], zero behind the last step.
        starts: [F,B,c,N].
        segments: int [B·c,C], the number of the document of each step, counted in every chunk from 0; None without
            resets.
    """

    def __init__(self, x: Tensor, tables: BlockTables, state: Tensor, reset: Tensor | None) -> None:
        batch, length, channels = x.shape
        size = self.size = min(tables.size, length)
        count = -(-length // size)
        padding = count * size - length
        self.shape, self.like, self.decay = (batch, count), state, tables.decay
        self.gather = tables.gather[:, tables.size - size :]
        if padding:  # torch copies even when there is nothing to add
            x = torch.nn.functional.pad(x, (0, 0, 0, padding))
        self.values = x.reshape(batch * count, size, channels).permute(2, 0, 1).contiguous()
        self.segments = self._unbroken = None
        self._seen = self.values  # the steps of a chunk that its final state remembers
        if reset is not None:
            self.segments = torch.nn.functional.pad(reset, (0, padding)).view(batch * count, size).cumsum(-1)
            self._seen = torch.where(self.segments == self.segments[:, -1:], self.values, 0)
            self._unbroken = (self.segments[:, -1] == 0).view(batch, count)
        local = from_real_pairs((self._seen @ self.gather).unflatten(1, self.shape), state)  # [F,B,c,N]
        starts = torch.cat([state.transpose(0, 1).unsqueeze(2), local[:, :, :-1]], dim=2)
        self.starts = scan_chunks(starts, tables.hops((count - 1).bit_length()), self._unbroken)

    def state(self, stop: int | Tensor) -> Tensor:
        """The state [B,F,N] after so many steps, or int [B] of each row; with resets only after all of them."""
        if isinstance(stop, Tensor):
            return self._state_of_rows(stop)
        chunk = min(stop // self.size, self.shape[1] - 1)
        steps = stop - chunk * self.size
        found = self.starts[:, :, chunk]
        if steps:
            tail = self._seen.unflatten(1, self.shape)[:, :, chunk, :steps] @ self.gather[:, self.size - steps :]
            carried = found * self.decay[..., steps].unsqueeze(1)
            if self._unbroken is not None:
                carried = torch.where(self._unbroken[:, chunk, None], carried, 0)
            found = carried + from_real_pairs(tail, self.like)
        return found.transpose(0, 1)

    def _state_of_rows(self, stops: Tensor) -> Tensor:
        """Nothing here waits for the device, and every row costs the same."""
        batch, count = self.shape
        rows = torch.arange(batch, device=stops.device)
        chunks = (stops // self.size).clamp(max=count - 1)
        steps = stops - chunks * self.size
        places = torch.arange(self.size, device=stops.device) - self.size + steps[:, None]  # up to the last step
        tails = self.values.unflatten(1, self.shape)[:, rows[:, None], chunks[:, None], places.clamp(min=0)]
        tails = torch.where(places >= 0, tails, 0) @ self.gather
        carried = self.starts[:, rows, chunks] * self.decay[..., steps].transpose(1, 2)  # [F,B,N]
        return (carried + from_real_pairs(tails, self.like)).transpose(0, 1)


def long_conv_blocked(
    x: Tensor, tables: BlockTables, state: Tensor, reset: Tensor | None = None, stops: Sequence[Stop] = ()
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """x real [B,T,F], state [B,F,N] -> y real [B,T,F], the final state, and the states after ``stops`` steps.

    ``reset`` is bool [B,T], and goes without stops.
    """
    batch, length, channels = x.shape
    chunks = _Chunks(x, tables, state, reset)
    size = chunks.size
    toeplitz, spread = tables.toeplitz[:, :size, :size], tables.spread[..., :size]
    response = as_real_pairs(chunks.starts).flatten(1, 2)  # [F,B·c,M]
    if chunks.segments is None:
        # in place: a product's gradient needs its factors only
        y = (chunks.values @ toeplitz).baddbmm_(response, spread)
    else:
        y = segmented_product(chunks.values, toeplitz, chunks.segments, chunks.segments, response @ spread)
    y = y.permute(1, 2, 0).reshape(batch, -1, channels)[:, :length]
    return y, chunks.state(length), [chunks.state(stop) for stop in stops]


def states_blocked(x: Tensor, tables: BlockTables, state: Tensor, stops: Sequence[Stop]) -> list[Tensor]:
    """The states alone that ``long_conv_blocked`` returns for ``stops``."""
    chunks = _Chunks(x, tables, state, None)
    return [chunks.state(stop) for stop in stops]


def toeplitz_matrix(h: Tensor) -> Tensor:
    """The matrix M[j,i] = h[i-j] (zero for i < j), so that ``x @ M`` convolves a row x: real [F,C] -> [F,C,C]."""
    size = h.shape[-1]
    steps = torch.arange(size, device=h.device)
    lag = steps[None, :] - steps[:, None]
    return torch.where(lag >= 0, h[:, lag.clamp(min=0)], 0.0)


def scan_chunks(values: Tensor, hops: Sequence[Tensor], unbroken: Tensor | None = None) -> Tensor:
    """``S[c] = values[c] + hops[0]·S[c-1]`` along the chunks, by doubling the reach.

    Args:
        values: [F,B,c,N].
        hops: the decay over 1, 2, 4, … chunks, [F,N] each; log2(c) of them, rounded up.
        unbroken: bool [B,c], False where a chunk holds a reset, so that nothing passes through it.
    """
    passes = None
    if unbroken is not None:  # passes[c]: nothing was reset in the chunks that the current reach spans before c
        passes = torch.cat([torch.ones_like(unbroken[:, :1]), unbroken[:, :-1]], dim=1)
    for doubling, decay in enumerate(hops):
        reach = 1 << doubling
        moved = values[:, :, :-reach] * decay[:, None, None, :]
        if passes is not None:
            moved = torch.where(passes[:, reach:, None], moved, 0)
            passes = torch.cat([passes[:, :reach], passes[:, reach:] & passes[:, :-reach]], dim=1)
        values = torch.cat([values[:, :, :reach], values[:, :, reach:] + moved], dim=2)
    return values


def segmented_product(
    inputs: Tensor, matrix: Tensor, sources: Tensor, targets: Tensor, first: Tensor | None = None
) -> Tensor:
    """``inputs @ matrix`` where documents end inside a row: every output sees the inputs of its own document alone.

    Every document of a row costs one product over the rows that have so many.

    Args:
        inputs: [F,m,I].
        matrix: [F,I,C].
        sources, targets: int [m,I] and [m,C], the number of the document of each input and output; it counts up from
            that of the first input, 0.
        first: [F,m,C], added to the outputs of document 0, or None.
    """

    def product(rows: Tensor, inside: Tensor, outside: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.where(inside, rows, 0) @ matrix
        return torch.where(outside, y if bias is None else y + bias, 0)

    y = product(inputs, sources == 0, targets == 0, first)
    for number in range(1, int(targets.max()) + 1):
        rows = (targets[:, -1] >= number).nonzero().squeeze(1)
        y = y.index_add(1, rows, product(inputs[:, rows], sources[rows] == number, targets[rows] == number, None))
    return y
