"""FP8 layers in the classes of transformers: scales through files and casts, and the mode of a shared model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hyaena.checkpoints import load_model, save_model
from hyaena.formats import read_config
from hyaena.fp8 import FP8Linear, set_fp8
from hyaena.hf import StripedHyenaForCausalLM
from hyaena.model import StripedHyena


@pytest.fixture
def native(golden: Path) -> StripedHyena:
    return StripedHyena(replace(read_config(golden / "evo2-tiny/config.yml"), fp8_input_projections=True))


def scales(model: torch.nn.Module) -> list[list[float]]:
    return [module.scales.tolist() for module in model.modules() if isinstance(module, FP8Linear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_pass_through_files_and_casts(native: StripedHyena, tmp_path: Path, dtype: torch.dtype) -> None:
    save_model(native, tmp_path / "a", layout="transformers")
    model = StripedHyenaForCausalLM.from_pretrained(tmp_path / "a", dtype=dtype)
    assert scales(model) == scales(native) and scales(native)
    assert all(m.scales.dtype == torch.float32 for m in model.modules() if isinstance(m, FP8Linear))
    model.save_pretrained(tmp_path / "b")
    assert scales(load_model(tmp_path / "b")) == scales(native)


@torch.no_grad()
def test_the_modules_are_shared_in_their_mode(native: StripedHyena) -> None:
    model = StripedHyenaForCausalLM.from_native(native)
    ids = torch.randint(0, native.config.vocab_size, (1, 20))
    set_fp8(model, "off")
    plain = native(ids)
    set_fp8(model, "exact")
    assert torch.equal(model(ids).logits, native(ids)) and not torch.equal(native(ids), plain)
