"""Training on packed documents runs through the fused operator, and equals training through the plain one."""

import pytest
import torch
from torch import Tensor

from device import DEVICE
from hyaena.config import ModelConfig
from hyaena.model import StripedHyena
from hyaena.ops.backend import VARIABLE
from hyaena.ops.triton.hyena import launch
from hyaena.train.data import IGNORE, Batch
from hyaena.train.evaluate import summed_loss

TINY = ModelConfig(
    vocab_size=32,
    hidden_size=8,
    layer_types=("hyena", "attention"),
    intermediate_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    state_size=2,
    tokenizer="bytes",
)


def batch(lengths: tuple[int, ...]) -> Batch:
    ids = torch.randint(32, (1, sum(lengths)), dtype=torch.int32)
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int()
    targets = torch.where(segments == segments.roll(-1), ids.roll(-1), IGNORE)
    return Batch(ids, targets, segments).to(torch.device(DEVICE))


def loss_and_gradients(model: StripedHyena, windows: Batch) -> list[Tensor]:
    loss = summed_loss(model, windows)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("lengths", [(4, 1, 7), (12,)])
def test_packed_documents_train_through_the_fused_operator(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]
) -> None:
    model, windows = StripedHyena(TINY).to(DEVICE), batch(lengths)
    monkeypatch.setenv(VARIABLE, "plain")
    expected = loss_and_gradients(model, windows)
    calls: list[str] = []
    for name in ("forward", "backward"):
        kernel = getattr(launch, name)
        monkeypatch.setattr(
            launch, name, lambda *args, n=name, k=kernel, **options: calls.append(n) or k(*args, **options)
        )
    monkeypatch.setenv(VARIABLE, "triton")
    got = loss_and_gradients(model, windows)
    assert calls == ["forward", "backward"]
    for value, want in zip(got, expected, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-4, atol=1e-5)
