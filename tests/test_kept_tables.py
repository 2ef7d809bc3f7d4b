"""Tables of filters that modules keep between passes: never those of other numbers."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from configs import TINY
from hyaena.errors import UnsupportedError
from hyaena.filters import LongFilter, RealLongFilter
from hyaena.model import StripedHyena
from hyaena.ops import long_conv
from hyaena.ops.long_conv import blocked, kept, modes
from hyaena.ops.long_conv.blocked import BlockTables

MODULES = {"complex": LongFilter, "real": RealLongFilter}


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> LongFilter | RealLongFilter:
    made = MODULES[request.param](6, 4)
    with torch.no_grad():
        made.init_weights()
    return made


def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often tables are made, as a list that grows."""
    made, make = [], kept.BlockTables

    def counted(*args: object) -> kept.BlockTables:
        made.append(1)
        return make(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(kept, "BlockTables", counted)
    return made


def test_tables_are_made_once(module: LongFilter, monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = count(monkeypatch), torch.randn(1, 100, 6)
    want, _ = long_conv(x, module())
    assert not made, "outside inference mode nothing is kept"
    with torch.inference_mode():
        for _ in range(3):
            torch.testing.assert_close(long_conv(x, module())[0], want, atol=0, rtol=0)
            long_conv(x[:, :20], module())
    assert len(made) == 1


@pytest.mark.parametrize("how", ["in place", "data", "loaded", "float64"])
def test_changed_parameters_are_noticed(module: LongFilter, how: str) -> None:
    x = torch.randn(1, 100, 6)
    with torch.inference_mode():
        before, _ = long_conv(x, module())
    numbers = next(module.parameters())
    if how == "in place":
        with torch.no_grad():
            numbers.mul_(0.9)
    elif how == "data":  # no version counter sees it
        numbers.data[0, 0] *= 0.9
    elif how == "loaded":
        module.load_state_dict({name: value * 0.9 for name, value in module.state_dict().items()})
    else:
        module.double()
    want, _ = long_conv(x, module())
    with torch.inference_mode():
        found, _ = long_conv(x, module())
    assert torch.equal(found, want.detach())
    assert how == "float64" or not torch.equal(found, before)


def test_tables_do_not_stand_in_the_way_of_gradients_and_copies(module: LongFilter) -> None:
    x = torch.randn(1, 100, 6)
    with torch.inference_mode():
        long_conv(x, module())
    module.requires_grad_(False)
    x.requires_grad_()
    long_conv(x, module())[0].sum().backward()
    assert x.grad is not None
    assert copy.deepcopy(module)._tables._kept is None
    assert set(module.state_dict()) == {name for name, _ in module.named_parameters()}


def test_large_tables_are_not_kept(module: LongFilter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST_BYTES", 1000)
    with torch.inference_mode():
        long_conv(torch.randn(1, 100, 6), module())
    assert module._tables._kept is None


def test_a_model_reads_a_prompt_alike_with_and_without() -> None:
    model = StripedHyena(replace(TINY, layer_types=("hyena", "attention", "hyena_li")))
    ids = torch.randint(TINY.vocab_size, (1, 100))
    want = model(ids)
    with torch.inference_mode():
        assert torch.equal(model(ids), want.detach()) and torch.equal(model(ids), want.detach())


def test_a_method_that_a_filter_has_not_names_its_kind(module: LongFilter) -> None:
    name = "RealModalFilter" if isinstance(module, RealLongFilter) else "ModalFilter"
    with torch.inference_mode(), pytest.raises(UnsupportedError, match=f"'direct' takes no {name}: choose auto"):
        long_conv(torch.randn(1, 100, 6), module(), method="direct")


def test_threads_that_extend_the_same_tables_disturb_none(module: LongFilter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread takes longer steps while one multiplies its own: each has the powers that it would have alone."""
    tables, alone = BlockTables(module().modes()), BlockTables(module().modes())
    others = [5]

    def limit(z: torch.Tensor) -> torch.Tensor:
        if others:
            tables.hops(others.pop())
        return modes.limit(z)

    monkeypatch.setattr(blocked, "limit", limit)
    for count in (2, 7):
        torch.testing.assert_close(tables.hops(count), alone.hops(count), atol=0, rtol=0)
