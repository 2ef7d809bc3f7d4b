"""Causal grouped-query attention through torch's scaled_dot_product_attention.

The only thing added to it is the case that it lacks: T > 1 new queries after a past of P keys, causal among
themselves, without ever making a mask of T·P entries.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from hyaena.errors import InputError

sdpa = torch.nn.functional.scaled_dot_product_attention


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, padding: Tensor | None = None, segment_ids: Tensor | None = None
) -> Tensor:
    """Attention of the last T positions of S to all positions up to their own.

    Equation: ``softmax(q·k^T / sqrt(head_dim)) v`` over the keys at or before each query.

    Args:
        q: [B,H,T,head_dim], the queries of positions S-T … S-1.
        k, v: [B,G,S,head_dim]; each key/value head serves H/G query heads.
        padding: int [B], how many leading positions of each row are padding and never seen; None for none.
        segment_ids: int [B,S], packed documents that do not see one another, or None.

    Returns:
        [B,H,T,head_dim]. Rows of padding queries hold finite numbers without meaning.
    """
    batch, heads, length, head_dim = q.shape
    groups, total = k.shape[1:3]
    past = total - length
    if past < 0 or heads % groups:
        raise InputError(f"attention takes T <= S and H a multiple of G, and was given q {q.shape}, k {k.shape}")
    if segment_ids is not None:
        return _masked(q, k, v, padding, segment_ids)
    if length == 1:  # the query heads that share a key head become its queries: every key is read once
        seen = None if padding is None else _seen(padding, total)
        return sdpa(q.reshape(batch, groups, -1, head_dim), k, v, attn_mask=seen).reshape(q.shape)
    if past == 0 and padding is None:
        return sdpa(q, k, v, is_causal=True, enable_gqa=heads != groups)
    if q.device.type == "cpu" and past and (padding is None or bool((padding <= past).all())):
        return _past_and_present(q, k, v, past, padding)
    if padding is None:
        mask = causal_lower_right(length, total)
        return sdpa(q, _repeat(k, heads), _repeat(v, heads), attn_mask=mask)  # type: ignore[arg-type]
    return _masked(q, k, v, padding, None)


def _seen(padding: Tensor, total: int) -> Tensor:
    """bool [B,1,1,total]: the key is not padding."""
    return (torch.arange(total, device=padding.device) >= padding[:, None])[:, None, None, :]


def _masked(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    """The general case, with a mask of [B,1,T,S]."""
    heads, total = q.shape[1], k.shape[2]
    keys = torch.arange(total, device=q.device)
    queries = keys[total - q.shape[2] :, None]
    mask = keys <= queries
    if padding is not None:  # a padding query sees itself, so that no row of the softmax is empty
        mask = mask & (_seen(padding, total) | (keys == queries))
    if segment_ids is not None:
        mask = mask & (segment_ids[:, None, queries.squeeze(1), None] == segment_ids[:, None, None, :])
    # the kernels that take a mask want equal head counts
    return sdpa(q, _repeat(k, heads), _repeat(v, heads), attn_mask=mask)


def _repeat(x: Tensor, heads: int) -> Tensor:
    """[B,G,S,hd] -> [B,H,S,hd]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _past_and_present(q: Tensor, k: Tensor, v: Tensor, past: int, padding: Tensor | None) -> Tensor:
    """Two attentions, to the past (all of it) and to the present (causal), merged by their normalisers.

    With Z the sum of a part's exponentials, the whole is ``(Z1·o1 + Z2·o2) / (Z1 + Z2)``, that is
    ``o2 + sigmoid(log Z1 - log Z2)·(o1 - o2)``.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the public function hides the normaliser
    seen = None
    if padding is not None:
        seen = torch.zeros(len(padding), 1, 1, past, dtype=q.dtype).masked_fill(~_seen(padding, past), -torch.inf)
    before, log_before = flash(q, k[:, :, :past], v[:, :, :past], 0.0, False, attn_mask=seen)
    now, log_now = flash(q, k[:, :, past:], v[:, :, past:], 0.0, True)
    weight = torch.sigmoid(log_before - log_now).unsqueeze(-1).to(q.dtype)
    if padding is not None:  # a row whose past is all padding has no normaliser there
        empty = (padding >= past)[:, None, None, None]
        before, weight = before.masked_fill(empty, 0.0), weight.masked_fill(empty, 0.0)
    return torch.lerp(now, before, weight)
