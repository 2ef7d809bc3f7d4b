"""What users put around a model in training and deployment: per-sample gradients, and an exported graph."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from configs import TINY_EVO2
from hyaena.config import ModelConfig
from hyaena.filters import LongFilter
from hyaena.model import StripedHyena
from hyaena.train.filters import parametrize_filters

CONFIG = ModelConfig(
    vocab_size=20,
    hidden_size=8,
    layer_types=("hyena", "attention", "hyena"),
    intermediate_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    state_size=3,
    tie_embeddings=True,
)


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """torch warns that some batching rules are slow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("trainable", [False, True])
def test_gradients_of_each_sample(trainable: bool) -> None:
    model = StripedHyena(CONFIG)
    if trainable:
        parametrize_filters(model)
    ids = torch.randint(20, (3, 37))

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        logits = functional_call(model, parameters, (row.unsqueeze(0),))
        return nn.functional.cross_entropy(logits[0, :-1], row[1:])

    parameters = dict(model.named_parameters())
    gradients = vmap(grad(loss), in_dims=(None, 0))(parameters, ids)
    for number, row in enumerate(ids):
        model.zero_grad()
        loss(parameters, row).backward()
        for name, parameter in model.named_parameters():
            # Sums of 37 float32 terms in another order.
            torch.testing.assert_close(gradients[name][number], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("config", "traced"), [(CONFIG, 17), (CONFIG, 130), (TINY_EVO2, 40)])
def test_an_exported_graph_holds_for_every_length(config: ModelConfig, traced: int) -> None:
    model = StripedHyena(config).eval()
    if config is CONFIG:
        with torch.no_grad():  # as some published checkpoints have them: one at 0, one outside the unit circle
            model.layers[0].mixer.long_filter.poles[0, 0] = 0.0
            model.layers[2].mixer.long_filter.poles[1, 1] = torch.tensor([1.003, 0.01])
    length = torch.export.Dim("T", min=2, max=4096)
    exported = torch.export.export(
        model, (torch.zeros(2, traced, dtype=torch.long),), dynamic_shapes={"ids": {1: length}}
    ).module()
    with torch.no_grad():
        for size in (2, 3, 16, 31, 64, 65, 128, 700):  # of Evo 2's filters one has 128 taps
            ids = torch.randint(20, (2, size))
            expected = model(ids)
            # Another method of the convolution, float32: 1e-6 of the largest number, three layers of it.
            atol = 1e-5 * expected.abs().max().item()
            torch.testing.assert_close(exported(ids), expected, rtol=0, atol=atol, msg=lambda m, n=size: f"T={n}: {m}")


def test_a_filter_owns_its_memory() -> None:
    """FSDP frees the storage of parameters after a forward, while autograd still holds what the filter returned."""
    module = LongFilter(4, 2)
    nn.init.normal_(module.poles)
    nn.init.normal_(module.residues)
    nn.init.normal_(module.skip)
    filter = module()
    storages = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    for part, raw in ((filter.poles, module.poles), (filter.residues, module.residues)):
        assert part.dtype == torch.complex64 and part.untyped_storage().data_ptr() not in storages
        assert torch.equal(torch.view_as_real(part), raw)
    assert filter.skip is not None and filter.skip.untyped_storage().data_ptr() not in storages
    assert torch.equal(filter.skip, module.skip)
