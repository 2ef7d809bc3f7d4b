"""The verbs of states whose tensors have the row as their first axis."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hyaena.errors import InputError
from hyaena.ops import RowTensors


class Pair(RowTensors, NamedTuple("Pair", [("a", Tensor), ("b", Tensor)])):
    """Two tensors a row."""

    __slots__ = ()


def pair(rows: int = 2, width: int = 3, dtype: torch.dtype = torch.float32) -> Pair:
    return Pair(torch.randn(rows, 2), torch.randn(rows, width).to(dtype))


@pytest.mark.parametrize("other", [pair(width=4), pair(dtype=torch.float64)], ids=["size", "dtype"])
def test_states_that_differ_in_size_or_dtype_alone_are_refused(other: Pair) -> None:
    mine = pair()
    before = [t.clone() for t in mine]
    with pytest.raises(InputError, match="cannot be joined: make the caches with the same method and dtype"):
        mine.join([other])
    with pytest.raises(InputError, match="must have states of one size"):
        mine.put(0, other, 1)
    assert torch.equal(mine.b, before[1])  # the second tensor is the one that does not fit


def test_rows_are_copied_joined_and_replaced() -> None:
    mine, other = pair(3), pair(2)
    chosen = mine.select([2, 0])
    assert torch.equal(chosen.a, mine.a[[2, 0]]) and torch.equal(chosen.b, mine.b[[2, 0]])
    joined = mine.join([other])
    assert torch.equal(joined.b, torch.cat([mine.b, other.b]))
    mine.put(1, other, 0)
    assert torch.equal(mine.a[1], other.a[0]) and torch.equal(mine.b[1], other.b[0])
    first = mine.first(2)
    first.a.zero_()
    assert not mine.a[:2].any() and mine.a[2].any()  # the same storage
    blank = mine.blank(5)
    assert blank.b.shape == (5, 3) and not blank.b.any()
    assert not mine.reset().b.any() and mine.b.any()
    assert all(x is y for x, y in zip(mine.mutated(), mine, strict=True))


def test_a_detached_state_has_no_history() -> None:
    mine = Pair(torch.randn(2, 2, requires_grad=True) * 2, torch.randn(2, 3))
    assert mine.a.requires_grad and not mine.detach().a.requires_grad
