"""Products by oneDNN: the same float32 numbers, for many rows of plain tensors only, and nothing else changes."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from configs import TINY
from hyaena import quant
from hyaena.ops import onednn
from hyaena.ops.onednn import FEWEST_ROWS, OneDNNProducts, onednn_products
from hyaena.schemes import SCHEMES
from models import spread

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
CPU = torch.device("cpu")


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of tensors that were brought into oneDNN's layout."""
    seen, convert = [], Tensor.to_mkldnn
    monkeypatch.setattr(Tensor, "to_mkldnn", lambda self: seen.append(self.shape) or convert(self))
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(FEWEST_ROWS, 48), (2, FEWEST_ROWS, 48)])
def test_a_linear_layer_has_the_same_numbers(bias: bool, shape: tuple[int, ...], converted: list[torch.Size]) -> None:
    layer, x = nn.Linear(48, 31, bias=bias), torch.randn(shape)
    with torch.inference_mode():
        want = layer(x)
        with OneDNNProducts():
            got = layer(x)
    assert x.shape in converted
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # sums in another order


def test_the_rest_is_left_alone(converted: list[torch.Size]) -> None:
    with torch.inference_mode(), OneDNNProducts():
        nn.Linear(8, 8)(torch.randn(FEWEST_ROWS - 1, 8))
        nn.Linear(8, 8).bfloat16()(torch.randn(FEWEST_ROWS, 8).bfloat16())
        other = threading.Thread(target=lambda: nn.Linear(8, 8)(torch.randn(FEWEST_ROWS, 8)))
        other.start()
        other.join()
    assert not converted


def test_a_pass_takes_it_where_it_is_faster(monkeypatch: pytest.MonkeyPatch, converted: list[torch.Size]) -> None:
    model, ids = spread(TINY), torch.randint(50, (1, FEWEST_ROWS))
    precision = torch.get_float32_matmul_precision()
    with torch.inference_mode():
        monkeypatch.setattr(onednn, "_preferred", lambda: False)
        want = model(ids)
        assert not converted
        monkeypatch.setattr(onednn, "_preferred", lambda: True)
        torch.testing.assert_close(model(ids), want, rtol=1e-4, atol=1e-4)  # three layers of large weights
        assert converted
        assert torch.get_float32_matmul_precision() == precision
    converted.clear()
    model(ids)  # gradients will be asked for
    assert not converted


def test_what_is_not_suited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_preferred", lambda: True)
    with torch.inference_mode():
        for arguments in ((CPU, torch.bfloat16, 999), (CPU, torch.float32, FEWEST_ROWS - 1)):
            assert isinstance(onednn_products(*arguments), contextlib.nullcontext)
        assert isinstance(onednn_products(CPU, torch.float32, FEWEST_ROWS), OneDNNProducts)


def test_a_transform_that_follows_what_torch_computes_has_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_preferred", lambda: True)
    model, ids = spread(TINY), torch.randint(50, (2, FEWEST_ROWS))
    with torch.no_grad():
        found = torch.vmap(lambda row: model(row[None])[0])(ids)
        torch.testing.assert_close(found, model(ids), rtol=1e-4, atol=1e-4)


def test_a_pass_compiles_into_one_graph_on_a_cpu() -> None:
    """A compiler can neither ask what processor it is, nor whether it is inference mode, nor for optional packages."""
    model = spread(replace(TINY, layer_types=("hyena",), hidden_size=32, intermediate_size=32))
    quant.narrow_linears(model, SCHEMES["int8"])
    model.init_weights()
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="eager")(torch.ones(1, 1, dtype=torch.long))
        torch.testing.assert_close(found, model(torch.ones(1, 1, dtype=torch.long)), rtol=1e-4, atol=1e-4)
