"""Attention against the softmax written out, for every way in which queries meet keys."""

import pytest
import torch

from hyaena.errors import InputError
from hyaena.ops import attention
from watching import LargestResult


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


def test_packed_documents_do_not_see_one_another() -> None:
    segment_ids = torch.tensor([[0] * 5 + [1] * 3 + [2] * 4, [7] * 12])
    q, k, v = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    got = attention(q, k, v, segment_ids=segment_ids)
    expected = written_out(q, k, v, [0, 0], segment_ids)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    last = attention(q[:, :, -3:], k, v, segment_ids=segment_ids)
    torch.testing.assert_close(last.double(), expected[:, :, -3:], rtol=1e-5, atol=1e-5)


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
