"""Attention against the softmax written out, for every way in which queries meet keys."""

import importlib
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hyaena.errors import InputError
from hyaena.ops import Documents, attention, find_documents
from watching import LargestResult

attention_module = importlib.import_module("hyaena.ops.attention")  # the function has its name in ops


def written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: list[int], segment_ids: torch.Tensor | None = None
) -> torch.Tensor:
    batch, heads, length, head_dim = q.shape
    total = k.shape[2]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h * k.shape[1] // heads
            for t in range(length):
                seen = torch.arange(total) <= total - length + t
                seen &= torch.arange(total) >= padding[b]
                if segment_ids is not None:
                    seen &= segment_ids[b] == segment_ids[b, t]
                if seen.any():
                    scores = (k[b, g, seen].double() @ q[b, h, t].double()) / head_dim**0.5
                    out[b, h, t] = scores.softmax(0) @ v[b, g, seen].double()
    return out


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("length", "past"), [(1, 0), (1, 9), (6, 0), (6, 1), (6, 9), (40, 3)])
@pytest.mark.parametrize("padding", [None, [0, 3], [2, 1], [9, 0]])
def test_equals_the_softmax_written_out(groups: int, length: int, past: int, padding: list[int] | None) -> None:
    total = length + past
    if padding is not None and max(padding) >= total:
        pytest.skip("a row of nothing but padding has no meaning")
    q, k, v = torch.randn(2, 4, length, 8), torch.randn(2, groups, total, 8), torch.randn(2, groups, total, 8)
    got = attention(q, k, v, padding=None if padding is None else torch.tensor(padding))
    expected = written_out(q, k, v, padding or [0, 0])
    assert torch.isfinite(got).all()
    for b in range(2):  # queries that are padding themselves have no meaning
        first = max(0, (padding or [0, 0])[b] - past)
        torch.testing.assert_close(got[b, :, first:].double(), expected[b, :, first:], rtol=1e-5, atol=1e-5)


def packed(*rows: tuple[int, ...]) -> tuple[torch.Tensor, Documents]:
    """The number of every position's document, int [B,S], and the documents, from the lengths of each row."""
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])
    return ids, find_documents(torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0)))


ROWS = (5, 1, 2, 4), (1, 1, 9, 1)


def test_the_lengths_of_packed_documents() -> None:
    _, documents = packed(*ROWS)
    assert documents.lengths == [[5, 1, 2, 4], [1, 1, 9, 1]] and documents.max_length == 9
    assert documents.cu_seqlens is not None and documents.cu_seqlens.dtype == torch.int32
    assert documents.cu_seqlens.tolist() == [0, 5, 6, 8, 12, 13, 14, 23, 24]
    assert find_documents(torch.ones(1, 3, dtype=torch.bool)).lengths == [[1, 1, 1]]  # the first one may be marked


@pytest.mark.parametrize("length", [12, 3, 1])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_packed_documents_do_not_see_one_another(groups: int, length: int) -> None:
    """Also where only the last positions are queries."""
    ids, documents = packed(*ROWS)
    q, k, v = torch.randn(2, 4, length, 8), torch.randn(2, groups, 12, 8), torch.randn(2, groups, 12, 8)
    expected = written_out(torch.cat([torch.zeros(2, 4, 12 - length, 8), q], dim=2), k, v, [0, 0], ids)
    got = attention(q, k, v, documents=documents)
    torch.testing.assert_close(got.double(), expected[:, :, 12 - length :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_documents_equal_documents_alone(dtype: torch.dtype) -> None:
    """Results and gradients, also when the forward is computed again in the backward pass."""
    q, k, v = (torch.randn(1, heads, 12, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
    slope = torch.randn(1, 4, 12, 8, dtype=dtype)
    _, documents = packed(ROWS[0])
    parts = zip(*(t.split(ROWS[0], dim=2) for t in (q, k, v)), strict=True)
    alone = torch.cat([attention(*part) for part in parts], dim=2)
    together = checkpoint(partial(attention, documents=documents), q, k, v, use_reentrant=False)
    assert isinstance(together, torch.Tensor)
    # a document is the same problem in both; in bfloat16 half an ulp of 8 bits
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 2**-8}
    torch.testing.assert_close(together, alone, **tolerance)
    for got, expected in zip(
        torch.autograd.grad(together, (q, k, v), slope), torch.autograd.grad(alone, (q, k, v), slope), strict=True
    ):
        torch.testing.assert_close(got, expected, **tolerance)


def test_packed_documents_compile_to_one_graph() -> None:
    ids, _ = packed(*ROWS)
    reset = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0))
    q, k, v = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, reset: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, documents=find_documents(reset))

    got = torch.compile(function, fullgraph=True, backend="eager")(q, k, v, reset)
    torch.testing.assert_close(got, function(q, k, v, reset), rtol=1e-5, atol=1e-5)


def test_packed_documents_make_no_quadratic_mask() -> None:
    _, documents = packed((300, 1000, 748))
    q, k, v = (torch.randn(1, heads, 2048, 8, requires_grad=True) for heads in (4, 1, 1))
    with LargestResult() as largest:
        attention(q, k, v, documents=documents).sum().backward()
    assert 0 < largest.numel <= q.numel()  # repeated keys would be no larger; a mask would be 64 times q


def test_variable_lengths_copy_no_keys() -> None:
    """torch's own shapes, on its device without data, of FlashAttention over the documents of two rows."""
    q = torch.empty(2, 6, 8, 16, device="meta", dtype=torch.bfloat16).transpose(1, 2)
    k, v = torch.empty(2, 2, 6, 2, 16, device="meta", dtype=torch.bfloat16).transpose(2, 3)
    cu_seqlens = torch.empty(5, device="meta", dtype=torch.int32)
    with LargestResult() as largest:
        y = attention_module._varlen(q, k, v, cu_seqlens, 4)
    assert y.shape == q.shape and y.dtype == q.dtype and y.transpose(1, 2).is_contiguous()
    assert 0 < largest.numel <= q.numel()


def test_documents_that_do_not_fit_are_refused() -> None:
    q, k = torch.zeros(2, 4, 12, 8), torch.zeros(2, 2, 12, 8)
    _, documents = packed(*ROWS)
    with pytest.raises(InputError, match="and padding"):
        attention(q, k, k, documents=documents, padding=torch.tensor([1, 0]))
    with pytest.raises(InputError, match=r"documents \[B, S\] = \[2, 12\]"):
        attention(q, k, k, documents=packed((4, 4), (3, 5))[1])


def test_a_long_past_makes_no_quadratic_mask() -> None:
    """The work array of a continuation stays far below T·S entries."""
    q, k, v = torch.randn(1, 2, 256, 8), torch.randn(1, 2, 4096, 8), torch.randn(1, 2, 4096, 8)
    with LargestResult() as largest:
        attention(q, k, v, padding=torch.tensor([3]))
    assert 0 < largest.numel < 256 * 4096


@pytest.mark.parametrize(
    ("q", "k"),
    [
        ((1, 4, 3, 8), (1, 2, 2, 8)),
        ((1, 4, 3, 8), (1, 3, 3, 8)),
    ],
)
def test_bad_inputs(q: tuple, k: tuple) -> None:
    with pytest.raises(InputError):
        attention(torch.zeros(q), torch.zeros(k), torch.zeros(k))


def reference_of_cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what the library's kernel does: a result in the layout of the queries, and its log-sum-exp."""
    length, total = q.shape[2], k.shape[2]
    assert not causal or length == total, "with a past its causal mask is aligned otherwise"
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(length, total).triu(1).bool(), -torch.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).contiguous().transpose(1, 2)
    return y, scores.logsumexp(-1)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("length", "past"), [(1, 9), (6, 0), (6, 1), (6, 9), (40, 3)])
def test_the_parts_of_a_gpu_make_the_whole(monkeypatch, groups: int, length: int, past: int) -> None:
    monkeypatch.setattr(attention_module, "_cudnn", reference_of_cudnn)
    monkeypatch.setattr(attention_module, "_gpu_part", lambda *_: reference_of_cudnn)
    q = torch.randn(2, length, 6, 8).transpose(1, 2)[:, :4]
    k, v = torch.randn(2, 2, groups, 60, 8)[:, :, :, : length + past]
    got = attention(q, 30 * k, v)  # scores of tens: the log-sum-exps of past and present are far apart
    torch.testing.assert_close(got.double(), written_out(q, 30 * k, v, [0, 0]), rtol=1e-5, atol=1e-5)
    assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("kernel", ["_cudnn", "_flash"])
@pytest.mark.parametrize(("length", "past"), [(1, 9), (6, 0), (6, 9)])
def test_a_gpu_copies_neither_keys_nor_results(monkeypatch, kernel: str, length: int, past: int) -> None:
    """torch's own account, on its device without data, of the kernels' shapes and layouts."""
    part = getattr(attention_module, kernel)
    monkeypatch.setattr(attention_module, "_gpu_part", lambda *_: part)
    q = torch.empty(1, length, 10, 16, device="meta", dtype=torch.bfloat16).transpose(1, 2)[:, :8]
    store = torch.empty(2, 1, 2, 5000, 16, device="meta", dtype=torch.bfloat16)
    k, v = store[:, :, :, : length + past]
    with LargestResult() as largest, torch.inference_mode():
        y = attention(q, k, v)
    assert y.shape == q.shape and y.dtype == q.dtype and y.transpose(1, 2).is_contiguous()
    assert 0 < largest.numel <= max(q.numel(), k.numel())  # repeated keys would be four times k


HOPPER = {"capability": (9, 0), "cudnn": 91900, "flash": True}


@pytest.mark.parametrize(
    ("shape", "device", "expected"),
    [
        ((torch.bfloat16, 128, 32768, 0), {}, "cudnn"),
        ((torch.float16, 64, 2048, 98304), {}, "cudnn"),
        ((torch.bfloat16, 128, 100, 0), {}, "flash"),  # a plan would cost more than it saves
        ((torch.bfloat16, 128, 1, 131072), {}, "flash"),  # and every step would need another
        ((torch.bfloat16, 128, 32768, 1), {}, "flash"),  # cuDNN takes no single key
        ((torch.bfloat16, 256, 32768, 0), {}, "flash"),
        ((torch.bfloat16, 128, 32768, 0), {"capability": (8, 0)}, "flash"),
        ((torch.bfloat16, 128, 32768, 0), {"cudnn": 91002}, "flash"),
        ((torch.bfloat16, 128, 32768, 0), {"cudnn": None}, "flash"),
        ((torch.bfloat16, 128, 32768, 0), {"cudnn": None, "flash": False}, None),
        ((torch.bfloat16, 128, 32768, 0), {"capability": (7, 5)}, None),
        ((torch.float32, 128, 32768, 0), {}, None),
        ((torch.bfloat16, 12, 32768, 0), {}, None),
    ],
)
def test_the_kernel_of_a_shape(shape: tuple, device: dict, expected: str | None) -> None:
    assert attention_module.choose_kernel(*shape, **{**HOPPER, **device}) == expected


@pytest.mark.parametrize("padding", [None, [0, 3]])
@pytest.mark.parametrize("length", [1, 2, 6])
def test_gradients_after_a_past(length: int, padding: list[int] | None) -> None:
    """They are the derivatives, in float64, whichever way inference would take."""
    q, k, v = (
        torch.randn(2, h, n, 4, dtype=torch.double, requires_grad=True) for h, n in ((4, length), (2, 9), (2, 9))
    )
    hidden = None if padding is None else torch.tensor(padding)
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, padding=hidden), (q, k, v))
