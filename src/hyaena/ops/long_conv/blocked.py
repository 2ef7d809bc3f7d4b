"""The convolution in two stages over chunks of C steps: matrix products inside a chunk, the state between chunks.

With ``x`` cut into chunks, ``i`` and ``j`` counting steps inside one::

    y[c,i] = Σ_{j<=i} h[i-j] x[c,j]  +  Re Σ_n R_n p_n^(i+1) S_n[c]          a Toeplitz product and a low-rank one
    S[c+1] = p^C S[c] + Σ_j p^(C-1-j) x[c,j]                                  a scan over the chunks

Everything is a batched matrix product but the scan, which doubles its reach at each of log2(T/C) steps. The cost is
O(T·C) on matrix units, the memory O(T); plain autograd differentiates it. It is the chunked form that linear
attention and state-space models share (Dao & Gu 2024, "Transformers are SSMs", section 6).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from hyaena.ops.long_conv.modes import Modes, as_real_pairs, from_real_pairs, limit, narrow, powers, readout_pairs

CHUNK = 32


def long_conv_blocked(
    x: Tensor, modes: Modes, state: Tensor, reset: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """x real [B,T,F], state [B,F,N] -> (y real [B,T,F], final state); ``reset`` bool [B,T]."""
    batch, length, channels = x.shape
    chunk = min(chunk, length)
    count = -(-length // chunk)
    last = length - (count - 1) * chunk  # steps in the last chunk, which may be shorter
    padding = count * chunk - length

    p, residues = modes
    dtype = residues.dtype
    ladder = powers(p, chunk + 1)  # p^0 … p^C, [F,N,C+1]
    gather = as_real_pairs(ladder[..., :chunk].flip(-1).transpose(1, 2).to(dtype))  # p^(C-1-j), [F,C,M]
    spread = readout_pairs((residues.to(p.dtype).unsqueeze(-1) * ladder[..., 1:]).transpose(1, 2).to(dtype))
    spread = spread.transpose(1, 2)  # R p^(i+1), [F,M,C]
    toeplitz = toeplitz_matrix(modes.impulse_response(chunk))  # [F,C,C]

    if padding:  # torch copies even when there is nothing to add
        x = torch.nn.functional.pad(x, (0, 0, 0, padding))
    chunks = x.reshape(batch * count, chunk, channels).permute(2, 0, 1).contiguous()  # [F,B·c,C]
    segments = None
    seen = chunks  # the steps of a chunk that its final state remembers
    if reset is not None:
        segments = torch.nn.functional.pad(reset, (0, padding)).view(batch * count, chunk).cumsum(-1)
        seen = torch.where(segments == segments[:, -1:], chunks, 0)

    local = from_real_pairs((seen @ gather).unflatten(1, (batch, count)), state)  # [F,B,c,N]
    starts = torch.cat([state.transpose(0, 1).unsqueeze(2), local[:, :, :-1]], dim=2)
    unbroken = None if segments is None else (segments[:, -1] == 0).view(batch, count)
    starts = scan_chunks(starts, ladder[..., chunk], unbroken)  # the state before each chunk
    response = as_real_pairs(starts).flatten(1, 2)  # [F,B·c,M]

    if segments is None:
        y = (chunks @ toeplitz).baddbmm_(response, spread)  # in place: a product's gradient needs its factors only
    else:
        y = segmented_product(chunks, toeplitz, segments, segments, response @ spread)
    y = y.permute(1, 2, 0).reshape(batch, count * chunk, channels)[:, :length]

    tail = seen.unflatten(1, (batch, count))[:, :, -1, :last] @ gather[:, chunk - last :]  # [F,B,M]
    carried = starts[:, :, -1] * ladder[..., last].to(dtype).unsqueeze(1)
    if unbroken is not None:
        carried = torch.where(unbroken[:, -1, None], carried, 0)
    return y, (carried + from_real_pairs(tail, state)).transpose(0, 1)


def states_blocked(x: Tensor, modes: Modes, state: Tensor, stops: Sequence[int]) -> list[Tensor]:
    """The states [B,F,N] after the first ``stops`` steps of x real [B,T,F]: one product, and a step per stop."""
    batch, _, channels = x.shape
    p, residues = modes
    dtype = residues.dtype
    edges = list(itertools.pairwise([0, *stops]))
    longest = max(stop - start for start, stop in edges)
    ladder = powers(p, longest + 1)
    gather = as_real_pairs(ladder[..., :longest].flip(-1).transpose(1, 2).to(dtype))  # p^(L-1-j), [F,L,M]
    pieces = [torch.nn.functional.pad(x[:, a:b], (0, 0, longest - (b - a), 0)) for a, b in edges]
    rows = torch.stack(pieces, dim=1).permute(3, 0, 1, 2).reshape(channels, batch * len(edges), longest)
    local = from_real_pairs((rows @ gather).unflatten(1, (batch, len(edges))), state)  # [F,B,J,N]
    states, now = [], state.transpose(0, 1)
    for j, (start, stop) in enumerate(edges):
        now = local[:, :, j] + now * narrow(ladder[..., stop - start], dtype).unsqueeze(1)
        states.append(now.transpose(0, 1))
    return states


def toeplitz_matrix(h: Tensor) -> Tensor:
    """The matrix M[j,i] = h[i-j] (zero for i < j), so that ``x @ M`` convolves a row x: real [F,C] -> [F,C,C]."""
    size = h.shape[-1]
    steps = torch.arange(size, device=h.device)
    lag = steps[None, :] - steps[:, None]
    return torch.where(lag >= 0, h[:, lag.clamp(min=0)], 0.0)


def scan_chunks(values: Tensor, decay: Tensor, unbroken: Tensor | None = None) -> Tensor:
    """``S[c] = values[c] + decay·S[c-1]`` along the chunks, by doubling the reach.

    Args:
        values: [F,B,c,N].
        decay: [F,N], the decay over a whole chunk, in which precision it is squared.
        unbroken: bool [B,c], False where a chunk holds a reset, so that nothing passes through it.
    """
    count = values.shape[2]
    decay = decay[:, None, None, :]
    passes = None
    if unbroken is not None:  # passes[c]: nothing was reset in the chunks that the current reach spans before c
        passes = torch.cat([torch.ones_like(unbroken[:, :1]), unbroken[:, :-1]], dim=1)
    reach = 1
    while reach < count:
        moved = values[:, :, :-reach] * narrow(decay, values.dtype)
        if passes is not None:
            moved = torch.where(passes[:, reach:, None], moved, 0)
            passes = torch.cat([passes[:, :reach], passes[:, reach:] & passes[:, :-reach]], dim=1)
        values = torch.cat([values[:, :, :reach], values[:, :, reach:] + moved], dim=2)
        decay = limit(decay * decay)
        reach *= 2
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
