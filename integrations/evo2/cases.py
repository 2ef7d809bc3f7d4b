"""Golden cases, tiny checkpoints of every published name, and a folder in the place of the hub's cache."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml

# Before huggingface_hub is imported: it reads them once. Nothing is downloaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
_HOME = tempfile.TemporaryDirectory(prefix="hub-")
os.environ["HF_HOME"] = _HOME.name

import evo2.models  # noqa: E402
import torch  # noqa: E402
from evo2.utils import CONFIG_MAP, HF_MODEL_NAME_MAP, MODEL_NAMES  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

import hyaena  # noqa: E402
from hyaena.formats import config_from_dict  # noqa: E402
from hyaena.formats.tensors import state_to_theirs  # noqa: E402
from vortex.model.model import StripedHyena  # noqa: E402
from vortex.model.utils import dotdict  # noqa: E402

__all__ = ["CONFIG_MAP", "MODEL_NAMES"]

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "evo2-tiny"
HOME = Path(_HOME.name)
PACKAGE = Path(evo2.models.__file__).parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_filters": 32,
    "hcl_filter_groups": 32,
    "hcm_filter_groups": 8,
    "hcs_filter_groups": 8,
    "num_layers": 5,
    "hcs_layer_idxs": [0, 4],
    "hcm_layer_idxs": [1],
    "hcl_layer_idxs": [2],
    "attn_layer_idxs": [3],
    "inner_mlp_size": 48,
}
"""What makes a published configuration small: 128 and 7 taps, rotary factors, FP8 and all other keys stay."""


class Case(NamedTuple):
    """A golden case: the original's configuration and weights, and its numbers in float32."""

    folder: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]
    expected: dict[str, Tensor]

    @classmethod
    def named(cls, name: str) -> Case:
        folder = GOLDEN / name
        config = yaml.safe_load((folder / "config.yml").read_text())
        return cls(folder, config, *(load_file(folder / f"{part}.safetensors") for part in ("model", "expected")))

    def model(self, **changes: Any) -> StripedHyena:
        """In float32, for comparisons with the golden numbers."""
        model = StripedHyena(dotdict(self.config | changes, Loader=yaml.FullLoader)).float()
        model.custom_load_state_dict(self.weights)
        return model.eval()

    def native(self) -> hyaena.StripedHyena:
        model = hyaena.StripedHyena(config_from_dict(self.config))
        model.load_state_dict(self.weights)
        return model.eval()

    @property
    def ids(self) -> Tensor:
        return self.expected["input_ids"]


def small_config(name: str) -> dict[str, Any]:
    """The configuration that evo2 has for a name, with few and narrow layers."""
    return yaml.safe_load((PACKAGE / CONFIG_MAP[name]).read_text()) | SMALL


def random_model(config: dict[str, Any], seed: int = 0) -> hyaena.StripedHyena:
    """hyaena's own model of a configuration, whose logits differ enough from each other to tell tokens apart."""
    torch.manual_seed(seed)
    model = hyaena.StripedHyena(config_from_dict(config))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and p.shape[1] in (32, 48):
                p.normal_(std=p.shape[1] ** -0.5)
        model.embed_tokens.weight.normal_(std=0.5)
    return model.eval()


def published(model: hyaena.StripedHyena) -> dict[str, Any]:
    """A state dict as published files have it: bfloat16 but for modes and frequencies, and with keys of older code."""
    stored: dict[str, Any] = state_to_theirs(model.state_dict(), model.config)
    for name, tensor in stored.items():
        if tensor.is_floating_point() and not name.endswith(("log_poles", "residues", "inv_freq")):
            stored[name] = tensor.to(torch.bfloat16)
    for i, kind in enumerate(model.config.layer_types):
        if kind == "attention":
            stored[f"blocks.{i}.mixer.dense._extra_state"] = serialized(None)
        elif model.config.fp8_input_projections:
            name = f"blocks.{i}.projections._extra_state"
            stored[name] = io.BytesIO(stored[name].numpy().tobytes())
        if kind == "hyena_li":
            stored[f"blocks.{i}.mixer.mixer.filter.t"] = torch.arange(8.0)[None, None]
    return stored


def serialized(value: Any) -> io.BytesIO:
    """An extra state as files hold it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer


def write_snapshot(name: str, state: dict[str, Any], parts: int = 1) -> Path:
    """Lay a checkpoint out as the hub's cache holds its repository: one file, or byte splits of it."""
    repository = HOME / "hub" / f"models--{HF_MODEL_NAME_MAP[name].replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.iterdir(), *HOME.glob("*.pt")]:
        old.unlink()
    (folder / "config.json").write_text("{}")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    size = -(-len(content) // parts)
    for i in range(parts):
        suffix = f".part{i}" if parts > 1 else ""
        (folder / f"{name}.pt{suffix}").write_bytes(content[i * size : (i + 1) * size])
    return folder


def rounded(model: hyaena.StripedHyena) -> hyaena.StripedHyena:
    """The model whose weights are what a published file keeps of them, in float32."""
    return model.to(torch.bfloat16).float()
