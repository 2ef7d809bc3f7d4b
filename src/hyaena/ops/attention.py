"""Causal grouped-query attention through torch's scaled_dot_product_attention and the kernels behind it.

Three things are added to it: T > 1 new queries after a past of P keys, causal among themselves, without a mask of T·P
entries; packed documents without a mask of T·T entries; and, for inference on a GPU, the choice of the kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from hyaena.errors import InputError
from hyaena.ops.backend import wants_gradients

sdpa = torch.nn.functional.scaled_dot_product_attention

Part = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
"""Attention of q to all of k and v, or causally; and float32 [B,H,T], the log-sum-exp of its scores."""

CUDNN_PAIRS = 2**27
"""Pairs of query and key from which cuDNN is worth the plan that it makes for every new shape."""


class Documents(NamedTuple):
    """The packed documents of a batch, see ``find_documents``.

    Attributes:
        reset: bool [B,S], True where a document begins.
        lengths: of the documents of every row, on the host; None inside torch.compile.
        cu_seqlens: int32 [documents+1] on the device, where each begins in the rows one after another, and their end;
            None inside torch.compile.
    """

    reset: Tensor
    lengths: list[list[int]] | None = None
    cu_seqlens: Tensor | None = None

    @classmethod
    def of(cls, lengths: list[list[int]], device: torch.device) -> Documents:
        """The documents of rows, all of one sum, whose lengths the host knows: the device is not waited for."""
        ends = torch.tensor(list(itertools.accumulate(itertools.chain.from_iterable(lengths), initial=0)), device="cpu")
        reset = torch.zeros(int(ends[-1]), dtype=torch.bool, device="cpu")
        reset[ends[:-1]] = True
        return cls(reset.view(len(lengths), -1).to(device), lengths, ends.to(device, torch.int32))

    @property
    def max_length(self) -> int:
        """The length of the longest document; 0 inside torch.compile."""
        return max((n for row in self.lengths or () for n in row), default=0)


def find_documents(reset: Tensor) -> Documents:
    """Find the lengths of packed documents. Call it once per forward pass: on a GPU it waits for the device.

    Inside torch.compile, whose graphs know no lengths that depend on data, only the boundaries are kept, and attention
    makes a mask.

    Args:
        reset: bool [B,S], True where a document begins; every row begins one, marked or not.
    """
    if torch.compiler.is_compiling():
        return Documents(reset)
    width = reset.shape[1]
    lengths = []
    for row in reset.cpu():
        edges = [0, *(row[1:].nonzero().flatten() + 1).tolist(), width]
        lengths.append([stop - start for start, stop in itertools.pairwise(edges)])
    return Documents.of(lengths, reset.device)._replace(reset=reset)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, padding: Tensor | None = None, documents: Documents | None = None
) -> Tensor:
    """Attention of the last T positions of S to all positions up to their own.

    Equation: ``softmax(q·k^T / sqrt(head_dim)) v`` over the keys at or before each query.

    Args:
        q: [B,H,T,head_dim], the queries of positions S-T … S-1.
        k, v: [B,G,S,head_dim]; each key/value head serves H/G query heads.
        padding: int [B], how many leading positions of each row are padding and never seen; None for none.
        documents: packed documents that do not see one another, or None; not together with padding.

    Returns:
        [B,H,T,head_dim]. Rows of padding queries hold finite numbers without meaning.

    Raises:
        InputError: shapes that do not fit, or padding and documents together.
    """
    batch, heads, length, head_dim = q.shape
    groups, total = k.shape[1:3]
    past = total - length
    if past < 0 or heads % groups:
        raise InputError(f"attention takes T <= S and H a multiple of G, and was given q {q.shape}, k {k.shape}")
    if documents is not None:
        if padding is not None or documents.reset.shape != (batch, total):
            raise InputError(
                f"attention takes documents [B, S] = {[batch, total]} and no padding beside them, not documents "
                f"{list(documents.reset.shape)}{' and padding' if padding is not None else ''}"
            )
        return _packed(q, k, v, documents)
    if length == 1:  # the query heads that share a key head become its queries: every key is read once
        rows = q.reshape(batch, groups, -1, head_dim)
        if padding is not None:
            seen = _seen(padding.clamp(max=total - 1), total)  # a padding query sees itself
            return _sdpa_masked(rows, k, v, seen).reshape(q.shape)
        part = _gpu_part(rows, k, v, past)
        return (sdpa(rows, k, v) if part is None else part(rows, k, v, False)[0]).reshape(q.shape)
    if padding is None:
        part = _gpu_part(q, k, v, past)
        if part is not None:  # _cudnn alone takes no causal mask beside a past
            return _past_and_present(q, k, v, past, part) if past and part is _cudnn else part(q, k, v, True)[0]
        if past == 0:
            return sdpa(q, k, v, is_causal=True, enable_gqa=heads != groups)
    # autograd knows no gradient of the log-sum-exps by which two parts are merged
    merged = q.device.type == "cpu" and past and not wants_gradients(q, k, v)
    if merged and (padding is None or bool((padding <= past).all())):
        return _past_and_present(q, k, v, past, _cpu_part(padding, past, q.dtype), padding)
    if padding is None:
        mask = causal_lower_right(length, total)
        return sdpa(q, _repeat(k, heads), _repeat(v, heads), attn_mask=mask)  # type: ignore[arg-type]
    return _masked(q, k, v, padding, None)


def _packed(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Attention inside packed documents: by FlashAttention's variable lengths, one by one, or with a mask."""
    if documents.lengths is None or documents.cu_seqlens is None:
        return _masked(q, k, v, None, documents.reset.cumsum(dim=1))
    if q.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        q, k, v = (t.to(torch.get_autocast_dtype("cuda")) for t in (q, k, v))
    if q.shape[2] == k.shape[2] and _has_varlen(q):
        return _varlen(q, k, v, documents.cu_seqlens, documents.max_length)
    return _one_by_one(q, k, v, documents.lengths)


def _has_varlen(q: Tensor) -> bool:
    """Return whether FlashAttention's variable-length kernels take these queries."""
    return (
        q.device.type == "cuda"
        and not torch.version.hip
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
    """FlashAttention over the documents of all rows, one after another; differentiable, keys are not repeated."""
    rows = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]  # [B·T,heads,head_dim]
    y = torch.ops.aten._flash_attention_forward(
        *rows, cu_seqlens, cu_seqlens, max_length, max_length, 0.0, True, False
    )[0]
    return y.unflatten(0, (q.shape[0], -1)).transpose(1, 2)


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: list[list[int]]) -> Tensor:
    """Attention of every document by itself: exact, in memory that grows with T. q may be the last T positions of S.

    ``split`` and ``cat`` on the way, not slices, whose gradients would each have the size of the whole.
    """
    first = k.shape[2] - q.shape[2]
    out = []
    for row_q, row_k, row_v, row in zip(q.split(1), k.split(1), v.split(1), lengths, strict=True):
        queries = [max(0, min(n, end - first)) for n, end in zip(row, itertools.accumulate(row), strict=True)]
        parts = zip(row_q.split(queries, dim=2), row_k.split(row, dim=2), row_v.split(row, dim=2), strict=True)
        out.append(torch.cat([attention(*part) for part in parts if part[0].shape[2]], dim=2))
    return torch.cat(out)


def _gpu_part(q: Tensor, k: Tensor, v: Tensor, past: int) -> Part | None:
    """Return the fastest fused attention of a GPU for these tensors, or None to leave the choice to torch.

    The kernels are called by name, since torch's public function hides the log-sum-exp, repeats keys where there is a
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
    """Choose ``"cudnn"``, ``"flash"`` or None, for neither.

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
    # cuDNN has kernels for these generations; older versions fail at some lengths, and none take a single key
    able = cudnn is not None and cudnn > 91500 and capability[0] in (9, 10) and head_dim <= 128 and past != 1
    if able and pairs >= CUDNN_PAIRS:
        return "cudnn"
    return "flash" if flash and head_dim <= 256 else None


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """cuDNN's attention; causal only where there is no past."""
    y, log_sum = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[:2]
    return y, log_sum.reshape(q.shape[:3])


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """FlashAttention. The causal mask is aligned bottom-right: the last query sees the last key."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]


def _cpu_part(padding: Tensor | None, past: int, dtype: torch.dtype) -> Part:
    """torch's attention of a CPU, whose past hides the padding."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    seen = None
    if padding is not None:
        seen = torch.zeros(len(padding), 1, 1, past, dtype=dtype, device="cpu").masked_fill(
            ~_seen(padding, past), -torch.inf
        )

    def part(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        return flash(q, k, v, 0.0, causal, attn_mask=None if causal else seen)

    return part


def _past_and_present(q: Tensor, k: Tensor, v: Tensor, past: int, part: Part, padding: Tensor | None = None) -> Tensor:
    """Two attentions, to the past (all of it) and to the present (causal), merged by their log-sum-exps.

    With Z the sum of a part's exponentials, the result is ``(Z1·o1 + Z2·o2) / (Z1 + Z2)``, that is
    ``o2 + sigmoid(log Z1 - log Z2)·(o1 - o2)``.
    """
    before, log_before = part(q, k[:, :, :past], v[:, :, :past], False)
    now, log_now = part(q, k[:, :, past:], v[:, :, past:], True)
    weight = torch.sigmoid(log_before - log_now).unsqueeze(-1).to(q.dtype)
    if padding is not None:  # a row whose past is all padding has no log-sum-exp there
        empty = (padding >= past)[:, None, None, None]
        before, weight = before.masked_fill(empty, 0.0), weight.masked_fill(empty, 0.0)
    return torch.lerp(now, before, weight)


def _seen(padding: Tensor, total: int) -> Tensor:
    """Make a mask bool [B,1,1,total], True where the key is not padding."""
    return (torch.arange(total, device=padding.device) >= padding[:, None])[:, None, None, :]


def _masked(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, document: Tensor | None) -> Tensor:
    """The general case, with a mask of [B,1,T,S]; ``document`` int [B,S] numbers the document of every position."""
    heads, total = q.shape[1], k.shape[2]
    keys = torch.arange(total, device=q.device)
    queries = keys[total - q.shape[2] :, None]
    mask = keys <= queries
    if padding is not None:  # a padding query sees itself, so that no row of the softmax is empty
        mask = mask & (_seen(padding, total) | (keys == queries))
    if document is not None:
        mask = mask & (document[:, None, queries.squeeze(1), None] == document[:, None, None, :])
    # the kernels that take a mask want equal head counts
    return _sdpa_masked(q, _repeat(k, heads), _repeat(v, heads), mask)


def _sdpa_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """torch's function with a mask; in inference on a GPU without cuDNN, for the reason in ``choose_kernel``."""
    if q.device.type != "cuda" or torch.compiler.is_compiling() or wants_gradients(q, k, v):
        return sdpa(q, k, v, attn_mask=mask)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return sdpa(q, k, v, attn_mask=mask)


def _repeat(x: Tensor, heads: int) -> Tensor:
    """Repeat every key/value head for its query heads: [B,G,S,hd] -> [B,H,S,hd]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
