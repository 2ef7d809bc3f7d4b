"""What the tests of the kernels for CPUs share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """So many threads of torch, and of the kernels."""
    pytest.importorskip("numba", reason="the kernels are compiled by numba")
    from hyaena.ops.cpu import operators

    monkeypatch.setattr(operators, "GRAIN", 1)  # so that small work is shared out as well
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
