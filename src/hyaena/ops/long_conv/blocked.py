"""The convolution in two stages over chunks of C steps: matrix products inside a chunk, the state between chunks.

With ``x`` cut into chunks, ``i`` and ``j`` counting steps inside one::

    y[c,i] = Σ_{j<=i} h[i-j] x[c,j]  +  Re Σ_n R_n p_n^(i+1) S_n[c]          a Toeplitz product and a low-rank one
    S[c+1] = p^C S[c] + Σ_j p^(C-1-j) x[c,j]                                  a scan over the chunks

Everything is a batched matrix product but the scan, which doubles its reach at each of log2(T/C) steps. The cost is
O(T·C) on matrix units, the memory O(T); plain autograd differentiates it. It is the chunked form that linear
attention and state-space models share (Dao & Gu 2024, "Transformers are SSMs", section 6).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyaena.ops.long_conv.filters import ModalFilter, as_real_pairs, from_real_pairs, powers, readout_pairs, taps, widen

CHUNK = 32


def long_conv_blocked(
    x: Tensor, filter: ModalFilter, state: Tensor, reset: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """x real [B,T,D], state complex [B,D,N] -> (y real [B,T,D], final state); ``reset`` bool [B,T]."""
    batch, length, channels = x.shape
    chunk = min(chunk, length)
    count = -(-length // chunk)
    last = length - (count - 1) * chunk  # steps in the last chunk, which may be shorter
    padding = count * chunk - length

    dtype = filter.poles.dtype
    p = widen(filter.poles)
    ladder = powers(p, chunk + 1)  # p^0 … p^C, [D,N,C+1]
    gather = as_real_pairs(ladder[..., :chunk].flip(-1).transpose(1, 2).to(dtype))  # p^(C-1-j), [D,C,2N]
    spread = readout_pairs((widen(filter.residues).unsqueeze(-1) * ladder[..., 1:]).transpose(1, 2).to(dtype))
    spread = spread.transpose(1, 2)  # R p^(i+1), [D,2N,C]
    toeplitz = toeplitz_matrix(taps(filter, chunk))  # [D,C,C]

    if padding:  # torch copies even when there is nothing to add
        x = torch.nn.functional.pad(x, (0, 0, 0, padding))
    chunks = x.reshape(batch * count, chunk, channels).permute(2, 0, 1).contiguous()  # [D,B·c,C]
    segments = None
    seen = chunks  # what the state at the end of a chunk still remembers of it
    if reset is not None:
        segments = torch.nn.functional.pad(reset, (0, padding)).view(batch * count, chunk).cumsum(-1)
        seen = chunks * (segments == segments[:, -1:])

    local = from_real_pairs((seen @ gather).unflatten(1, (batch, count)))  # [D,B,c,N]
    starts = torch.cat([state.transpose(0, 1).unsqueeze(2), local[:, :, :-1]], dim=2)
    unbroken = None if segments is None else (segments[:, -1] == 0).view(batch, count)
    starts = scan_chunks(starts, ladder[..., chunk], unbroken)  # the state before each chunk
    response = as_real_pairs(starts).flatten(1, 2)  # [D,B·c,2N]

    if segments is None:
        y = (chunks @ toeplitz).baddbmm_(response, spread)  # in place: a product's gradient needs its factors only
    else:
        y = segmented_product(chunks, toeplitz, response @ spread, segments)
    y = y.permute(1, 2, 0).reshape(batch, count * chunk, channels)[:, :length]

    tail = seen.unflatten(1, (batch, count))[:, :, -1, :last] @ gather[:, chunk - last :]  # [D,B,2N]
    carried = starts[:, :, -1] * ladder[..., last].to(dtype).unsqueeze(1)
    if unbroken is not None:
        carried = carried * unbroken[:, -1, None]
    return y, (carried + from_real_pairs(tail)).transpose(0, 1)


def toeplitz_matrix(h: Tensor) -> Tensor:
    """The matrix M[j,i] = h[i-j] (zero for i < j), so that ``x @ M`` convolves a row x: real [D,C] -> [D,C,C]."""
    size = h.shape[-1]
    steps = torch.arange(size, device=h.device)
    lag = steps[None, :] - steps[:, None]
    return torch.where(lag >= 0, h[:, lag.clamp(min=0)], 0.0)


def scan_chunks(values: Tensor, decay: Tensor, unbroken: Tensor | None = None) -> Tensor:
    """``S[c] = values[c] + decay·S[c-1]`` along the chunks, by doubling the reach.

    Args:
        values: complex [D,B,c,N].
        decay: complex [D,N], what a whole chunk does to the state.
        unbroken: bool [B,c], False where a chunk holds a reset, so that nothing passes through it.
    """
    count = values.shape[2]
    decay = decay[:, None, None, :]
    passes = None
    if unbroken is not None:  # passes[c]: nothing was reset in the chunks that the current reach spans before c
        passes = torch.cat([torch.ones_like(unbroken[:, :1]), unbroken[:, :-1]], dim=1)
    reach = 1
    while reach < count:
        moved = values[:, :, :-reach] * decay.to(values.dtype)
        if passes is not None:
            moved = moved * passes[:, reach:, None]
            passes = torch.cat([passes[:, :reach], passes[:, reach:] & passes[:, :-reach]], dim=1)
        values = torch.cat([values[:, :, :reach], values[:, :, reach:] + moved], dim=2)
        decay = decay * decay
        reach *= 2
    return values


def segmented_product(chunks: Tensor, toeplitz: Tensor, response: Tensor, segments: Tensor) -> Tensor:
    """The product of a chunk in which documents end: each document sees itself alone.

    chunks [D,m,C], toeplitz [D,C,C], response [D,m,C] of the incoming state, segments [m,C] counting the resets so
    far in the chunk. Every document of a chunk costs one product over the chunks that have so many.
    """
    first = segments == 0
    y = ((chunks * first) @ toeplitz + response) * first
    for number in range(1, int(segments.max()) + 1):
        rows = (segments[:, -1] >= number).nonzero().squeeze(1)
        mine = segments[rows] == number
        y = y.index_add(1, rows, ((chunks[:, rows] * mine) @ toeplitz) * mine)
    return y
