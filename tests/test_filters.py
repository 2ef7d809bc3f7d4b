"""The modules of the filters: what they give, and which dtypes their parameters may have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hyaena.errors import UnsupportedError
from hyaena.filters import ExplicitLongFilter, LongFilter, RealLongFilter


@pytest.mark.parametrize("kind", [LongFilter, RealLongFilter])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_that_something_narrowed_are_refused(kind: type[LongFilter], dtype: torch.dtype) -> None:
    """As FSDP does under a mixed-precision policy: it hands the module other parameters."""
    module = kind(4, 2)
    with torch.no_grad():
        module.init_weights()
    narrow = {name: parameter.to(dtype) for name, parameter in module.named_parameters()}
    with pytest.raises(UnsupportedError, match=r"must be float32 or wider: under FSDP, make every long filter a unit"):
        torch.func.functional_call(module, narrow)
    for name in narrow:
        if name != "skip":
            setattr(module, name, nn.Parameter(narrow[name]))
    with pytest.raises(UnsupportedError, match="must be float32 or wider"):
        module.view()


@pytest.mark.parametrize("kind", [LongFilter, RealLongFilter])
def test_a_narrow_skip_is_the_models_own_choice(kind: type[LongFilter]) -> None:
    module = kind(4, 2).to(torch.bfloat16)
    assert module().skip.dtype == module.view().skip.dtype == torch.bfloat16
    assert module().residues.real.dtype == module.view().residues.real.dtype == torch.float32


@pytest.mark.parametrize("kind", [LongFilter, RealLongFilter])
def test_parameters_that_stay_float32_go_to_the_device_all_the_same(kind: type[LongFilter]) -> None:
    module = kind(4, 2).to(device="meta", dtype=torch.bfloat16)
    for name, parameter in module.named_parameters():
        assert parameter.is_meta
        assert parameter.dtype == (torch.bfloat16 if name == "skip" else torch.float32)


@pytest.mark.parametrize("module", [LongFilter(4, 2), RealLongFilter(4, 2), ExplicitLongFilter(4, 3, skip=True)])
def test_a_filter_owns_its_memory_and_a_view_does_not(module: nn.Module) -> None:
    """FSDP frees the storage of parameters after a forward; a step copies nothing."""
    storages = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    owned, view = (
        {part.untyped_storage().data_ptr() for part in filter if isinstance(part, torch.Tensor)}
        for filter in (module(), module.view())  # type: ignore[operator]
    )
    assert not owned & storages and view == storages


def test_fresh_filters_keep_the_power_of_white_noise() -> None:
    """In the mean over 4,096 filters, known to 1.3 % (modes) and 1.0 % (taps); four times that."""
    torch.manual_seed(0)
    with torch.no_grad():
        modal, explicit = RealLongFilter(4096, 3), ExplicitLongFilter(4096, 5, skip=False)
        for module in (modal, explicit):
            module.init_weights()
        poles = modal.log_poles.exp()
        assert 10 <= float(-1 / modal.log_poles.min()) <= float(-1 / modal.log_poles.max()) <= 1000.1
        power = (modal.residues**2 / (1 - poles**2)).sum(1)  # of each mode alone: their signs are random
        assert power.mean().item() == pytest.approx(1, abs=0.05)
        assert explicit.taps.square().sum(1).mean().item() == pytest.approx(1, abs=0.04)
