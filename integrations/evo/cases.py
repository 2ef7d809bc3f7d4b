"""The golden cases, and a folder in the place of the hub's cache on this machine."""

from __future__ import annotations

import json
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

from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from stripedhyena.model import StripedHyena  # noqa: E402
from stripedhyena.utils import dotdict  # noqa: E402

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


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
        model = StripedHyena(dotdict(self.config | changes, Loader=yaml.FullLoader))
        model.load_state_dict(self.weights, strict=True)
        return model.eval()

    @property
    def ids(self) -> Tensor:
        return self.expected["input_ids"]


def write_snapshot(name: str, revision: str, weights: dict[str, Tensor], config: dict[str, Any], shards: int) -> Path:
    """Lay weights out as the hub's cache holds a repository of Evo: a branch, a commit, shards with ``backbone.``."""
    repository = Path(os.environ["HF_HOME"]) / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(COMMIT)
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model*"):
        old.unlink()
    stored = {f"backbone.{key}": tensor for key, tensor in weights.items() if key != "unembed.weight"}
    if shards == 1:
        save_file(stored, folder / "model.safetensors")
    else:
        places = {key: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, key in enumerate(stored)}
        for file in set(places.values()):
            save_file({key: stored[key] for key in stored if places[key] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "stripedhyena"}))
    return folder
