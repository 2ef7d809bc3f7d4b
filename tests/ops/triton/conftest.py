"""The kernels run on a GPU where there is one, else under Triton's interpreter; on buffers that begin as NaN."""

import pytest
import torch

from device import DEVICE

pytest.importorskip("triton", reason="the kernels need triton, which is made for Linux")


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is allocated without being written holds NaN."""

    def filled(make):
        def wrapped(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(torch.nan) if out.is_floating_point() and out.device.type == DEVICE else out

        return wrapped

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
