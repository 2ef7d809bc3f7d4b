"""Small models, the golden cases, and the ways in which a checkpoint can lie on the disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hyaena.config import ModelConfig
from hyaena.model import StripedHyena

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["sh-tiny", "evo-tiny", "evo8k-tiny", "evo2-tiny", "evo2-tiny/hcm128"]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model() -> StripedHyena:
    """A small untied model with random weights, one attention layer and two Hyena layers."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=24,
        hidden_size=16,
        layer_types=("hyena", "attention", "hyena"),
        intermediate_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        state_size=2,
        attention_qkv_bias=True,
    )
    return StripedHyena(config).eval()


def golden_state(case: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / case / "model.safetensors")


def _halves(case: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    state = golden_state(case)
    keys = list(state)
    middle = len(keys) // 2
    return {key: state[key] for key in keys[:middle]}, {key: state[key] for key in keys[middle:]}


def _write_index(path: Path, parts: dict[str, dict[str, torch.Tensor]]) -> None:
    weight_map = {key: file for file, part in parts.items() for key in part}
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _single_safetensors(case: str, folder: Path) -> None:
    save_file(golden_state(case), folder / "model.safetensors")


def _prefixed_safetensors(case: str, folder: Path) -> None:
    save_file({f"backbone.{key}": tensor for key, tensor in golden_state(case).items()}, folder / "model.safetensors")


def _sharded_safetensors(case: str, folder: Path) -> None:
    parts = {f"model-0000{i + 1}-of-00002.safetensors": part for i, part in enumerate(_halves(case))}
    for file, part in parts.items():
        save_file({f"backbone.{key}": tensor for key, tensor in part.items()}, folder / file)
    _write_index(folder / "model.safetensors.index.json", parts)


def _pytorch_model_bin(case: str, folder: Path) -> None:
    torch.save(golden_state(case), folder / "pytorch-model.bin")


def _sharded_bin(case: str, folder: Path) -> None:
    parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": part for i, part in enumerate(_halves(case))}
    for file, part in parts.items():
        torch.save(part, folder / file)
    _write_index(folder / "pytorch_model.bin.index.json", parts)


def _pt_with_optimizer(case: str, folder: Path) -> None:
    torch.save({"state_dict": golden_state(case), "optimizer": {"step": 3}, "epoch": 1}, folder / "checkpoint.pt")


def _pt_before_zip(case: str, folder: Path) -> None:
    torch.save(golden_state(case), folder / "old.pt", _use_new_zipfile_serialization=False)


def _with_extra_state(case: str, folder: Path) -> None:
    import io

    extra = {
        "blocks.0.mlp.l1._extra_state": io.BytesIO(b"abc"),
        "blocks.0.filter.t": torch.arange(4)[None, None],
        "blocks.0.filter.freq": torch.ones(2),
    }
    torch.save(golden_state(case) | extra, folder / "pytorch_model.bin")


def _pt_in_parts(case: str, folder: Path) -> None:
    """As the largest models are published; the eleventh part has a name that sorts before the third."""
    torch.save(golden_state(case), folder / "whole.pt")
    content = (folder / "whole.pt").read_bytes()
    (folder / "whole.pt").unlink()
    size = len(content) // 11 + 1
    for number in range(11):
        (folder / f"evo2_40b.pt.part{number}").write_bytes(content[number * size : (number + 1) * size])


FORMS: dict[str, Callable[[str, Path], None]] = {
    "model.safetensors": _single_safetensors,
    "backbone.": _prefixed_safetensors,
    "sharded safetensors": _sharded_safetensors,
    "pytorch-model.bin": _pytorch_model_bin,
    "sharded bin": _sharded_bin,
    "state_dict beside an optimizer": _pt_with_optimizer,
    "torch before zip files": _pt_before_zip,
    "recomputed entries": _with_extra_state,
    "a pt in parts": _pt_in_parts,
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def checkpoint(case: str, form: str, tmp_path: Path) -> Path:
    """A folder with a golden case's weights in one of the forms, and its configuration."""
    shutil.copy(GOLDEN / case / "config.yml", tmp_path / "config.yml")
    FORMS[form](case, tmp_path)
    return tmp_path
