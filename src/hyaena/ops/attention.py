"""Causal grouped-query attention through torch's scaled_dot_product_attention and the kernels behind it.

Two things are added to it: the case that it lacks, T > 1 new queries after a past of P keys, causal among themselves,
without ever making a mask of T·P entries; and, for inference on a GPU, which of its kernels runs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from hyaena.errors import InputError
from hyaena.ops.backend import wants_gradients

sdpa = torch.nn.functional.scaled_dot_product_attention

Part = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
"""Attention of q to all of k and v, or causally; and float32 [B,H,T], the logarithms of its normalisers."""

CUDNN_PAIRS = 2**27
"""Pairs of query and key from which cuDNN is worth the plan that it makes for every new shape."""


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
        rows = q.reshape(batch, groups, -1, head_dim)
        if padding is not None:
            return _sdpa_masked(rows, k, v, _seen(padding, total)).reshape(q.shape)
        part = _gpu_part(rows, k, v, past)
        return (sdpa(rows, k, v) if part is None else part(rows, k, v, False)[0]).reshape(q.shape)
    if padding is None:
        part = _gpu_part(q, k, v, past)
        if part is not None:  # _cudnn alone takes no causal mask beside a past
            return _past_and_present(q, k, v, past, part) if past and part is _cudnn else part(q, k, v, True)[0]
        if past == 0:
            return sdpa(q, k, v, is_causal=True, enable_gqa=heads != groups)
    if q.device.type == "cpu" and past and (padding is None or bool((padding <= past).all())):
        return _past_and_present(q, k, v, past, _cpu_part(padding, past, q.dtype), padding)
    if padding is None:
        mask = causal_lower_right(length, total)
        return sdpa(q, _repeat(k, heads), _repeat(v, heads), attn_mask=mask)  # type: ignore[arg-type]
    return _masked(q, k, v, padding, None)


def _gpu_part(q: Tensor, k: Tensor, v: Tensor, past: int) -> Part | None:
    """The fastest fused attention of a GPU for these tensors; None where torch is to choose among its own.

    The kernels are called by name, since torch's public function hides the normalisers, repeats keys where there is a
    past, and takes cuDNN for every shape where it takes it at all.
    """
    if q.device.type != "cuda" or torch.compiler.is_compiling() or wants_gradients(q, k, v) or torch.version.hip:
        return None
    name = choose_kernel(
        q.dtype,
        q.shape[-1],
        k.shape[2] - past,
        past,
        capability=torch.cuda.get_device_capability(q.device),
        cudnn=torch.backends.cudnn.version() if torch.backends.cuda.cudnn_sdp_enabled() else None,
        flash=torch.backends.cuda.flash_sdp_enabled(),
    )
    return {"cudnn": _cudnn, "flash": _flash, None: None}[name]


def choose_kernel(
    dtype: torch.dtype,
    head_dim: int,
    length: int,
    past: int,
    *,
    capability: tuple[int, int],
    cudnn: int | None,
    flash: bool,
) -> str | None:
    """``"cudnn"``, ``"flash"`` or None, for neither.

    On an H200 cuDNN 9.19 takes 0.54 to 0.59 of the time of FlashAttention-2 at 8,192 to 131,072 positions. But it makes
    a plan for every new shape of queries or keys, on the host, for which others report tens to hundreds of
    milliseconds (not measured here): too long to wait for in short prompts and single steps, each of another length.

    Args:
        length: new positions.
        past: positions before them.
        capability: of the device.
        cudnn: version of the library, None where the user or the machine is without.
        flash: whether FlashAttention is allowed.
    """
    if dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or capability < (8, 0):
        return None
    pairs = length * past + length**2 // 2
    # cuDNN has kernels for these generations, and torch itself trusts no older one with every length; none take one key
    able = cudnn is not None and cudnn > 91500 and capability[0] in (9, 10) and head_dim <= 128 and past != 1
    if able and pairs >= CUDNN_PAIRS:
        return "cudnn"
    return "flash" if flash and head_dim <= 256 else None


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """A Part; causal only where there is no past."""
    y, normaliser = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[:2]
    return y, normaliser.reshape(q.shape[:3])


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """A Part; where there is a past, causal means that the last query sees the last key."""
    y, normaliser = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    return y, normaliser


def _cpu_part(padding: Tensor | None, past: int, dtype: torch.dtype) -> Part:
    """A Part whose past hides the padding."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    seen = None
    if padding is not None:
        seen = torch.zeros(len(padding), 1, 1, past, dtype=dtype).masked_fill(~_seen(padding, past), -torch.inf)

    def part(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        return flash(q, k, v, 0.0, causal, attn_mask=None if causal else seen)

    return part


def _past_and_present(q: Tensor, k: Tensor, v: Tensor, past: int, part: Part, padding: Tensor | None = None) -> Tensor:
    """Two attentions, to the past (all of it) and to the present (causal), merged by their normalisers.

    With Z the sum of a part's exponentials, the whole is ``(Z1·o1 + Z2·o2) / (Z1 + Z2)``, that is
    ``o2 + sigmoid(log Z1 - log Z2)·(o1 - o2)``.
    """
    before, log_before = part(q, k[:, :, :past], v[:, :, :past], False)
    now, log_now = part(q, k[:, :, past:], v[:, :, past:], True)
    weight = torch.sigmoid(log_before - log_now).unsqueeze(-1).to(q.dtype)
    if padding is not None:  # a row whose past is all padding has no normaliser there
        empty = (padding >= past)[:, None, None, None]
        before, weight = before.masked_fill(empty, 0.0), weight.masked_fill(empty, 0.0)
    return torch.lerp(now, before, weight)


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
    return _sdpa_masked(q, _repeat(k, heads), _repeat(v, heads), mask)


def _sdpa_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """torch's function with a mask; in inference on a GPU not by cuDNN, for the reason that ``choose_kernel`` gives."""
    if q.device.type != "cuda" or torch.compiler.is_compiling() or wants_gradients(q, k, v):
        return sdpa(q, k, v, attn_mask=mask)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return sdpa(q, k, v, attn_mask=mask)


def _repeat(x: Tensor, heads: int) -> Tensor:
    """[B,G,S,hd] -> [B,H,S,hd]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
