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
