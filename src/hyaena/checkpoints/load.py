"""Weights files -> a model, one tensor at a time.

The model is built on the meta device, so it costs nothing; every tensor is then copied from the mapped file, in its
final dtype, to its final device. Peak host memory is the model's size plus at most one shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor, nn

from hyaena.checkpoints.files import Checkpoint, find
from hyaena.checkpoints.shards import open_shard
from hyaena.config import ModelConfig
from hyaena.errors import CheckpointError, InputError
from hyaena.formats.stripedhyena import tensors as original
from hyaena.model import StripedHyena

STORED = "stored"
"""The dtype that keeps every tensor as it is stored."""

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    path: str | PathLike[str],
    config: ModelConfig | str | PathLike[str] | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> StripedHyena:
    """The model of a checkpoint, in evaluation mode.

    Args:
        path: a folder in our layout or the original's, or a weights file.
        config: the configuration or its path, when it does not lie beside the weights or should be another.
        dtype: of the weights; by default, as the embedding is stored; ``"stored"`` keeps every tensor as it is
            stored. Poles and residues are float32 in any case (float64 with float64).
        device: where the model goes; by default the CPU.

    Raises:
        CheckpointError: naming every tensor that is missing, unexpected, misshapen or not finite, all at once; or a
            file that is missing, truncated, corrupt or unsafe.
        ConfigError: the configuration cannot be used.
    """
    checkpoint = find(path, config)
    with torch.device("meta"):
        model = StripedHyena(checkpoint.config)
    wanted = None if dtype == STORED else as_dtype(dtype) or survey(checkpoint).dtype
    _Loading(checkpoint, model, as_device(device), wanted).run()
    return model.eval()


def read_tensors(checkpoint: Checkpoint, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Some tensors of a checkpoint, under our names and in our layout, as they are stored; nothing else is read."""
    found = {}
    for path in checkpoint.shards:
        with open_shard(path) as shard:
            for key in shard.keys():  # noqa: SIM118  a shard is not a mapping
                name = original.our_name(key)
                if name is not None and wanted(name):
                    item = original.to_ours(key, shard.tensor(key), checkpoint.config)
                    assert item is not None
                    found[name] = item[1].clone()  # out of the mapped file
    return found


@dataclass(frozen=True)
class Survey:
    """What the names in a checkpoint's files say: whose names they are, and in which dtype the embedding is stored."""

    in_original_names: bool
    dtype: torch.dtype


def survey(checkpoint: Checkpoint) -> Survey:
    """Look at names and dtypes alone.

    Raises:
        CheckpointError: there is nothing of a StripedHyena model in the files.
    """
    dtypes: dict[str, torch.dtype | None] = {}
    for path in checkpoint.shards:
        with open_shard(path) as shard:
            dtypes |= {key: shard.dtype(key) for key in shard.keys()}  # noqa: SIM118
    names = {original.our_name(key): dtype for key, dtype in dtypes.items()}
    if "embed_tokens.weight" not in names and not any(name and name.startswith("layers.") for name in names):
        raise CheckpointError(f"{checkpoint.path}: holds no tensor of a StripedHyena model: check the path")
    return Survey(original.matches_tensors(dtypes), names.get("embed_tokens.weight") or torch.float32)


def as_device(device: str | torch.device | None) -> torch.device:
    """A device that is there, from its name; by default the CPU.

    Raises:
        InputError: this machine or this build of torch has no such device.
    """
    try:
        return torch.empty(0, device=device or "cpu").device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device} cannot be used ({reason}): choose another, such as cpu") from None


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype from its name.

    Raises:
        InputError: the name is not that of a floating-point dtype that a model can have.
    """
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in _DTYPES.values():
        raise InputError(f"dtype {dtype} cannot hold a model: choose one of {', '.join(_DTYPES)}")
    return found


def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of one of our parameters in a model of that dtype: poles and residues are never below float32."""
    return torch.promote_types(dtype, torch.float32) if name.endswith((".poles", ".residues")) else dtype


class _Loading:
    """The work of one ``load_model``: fill a meta model, and remember everything that does not fit."""

    def __init__(
        self, checkpoint: Checkpoint, model: StripedHyena, device: torch.device, dtype: torch.dtype | None
    ) -> None:
        self.checkpoint, self.model, self.device, self.dtype = checkpoint, model, device, dtype
        self.awaited = dict(model.named_parameters())
        self.expected = dict(self.awaited)
        self.in_original_names = survey(checkpoint).in_original_names
        self.problems: dict[str, list[str]] = {"unexpected": [], "twice": [], "wrong shape": [], "not finite": []}
        self.tied_head: Tensor | None = None

    def run(self) -> None:
        for path in self.checkpoint.shards:
            with open_shard(path) as shard:
                for key in shard.keys():  # noqa: SIM118  a shard is not a mapping
                    self._take(key, shard.tensor(key))
        if self.tied_head is not None and not self.awaited:
            original.check_tied(self.model.embed_tokens.weight.detach(), self.tied_head)
        missing = [self._shown(name) for name in self.awaited]
        told = {"missing": missing, **self.problems}
        if any(told.values()):
            words = "; ".join(f"{what}: {', '.join(names)}" for what, names in told.items() if names)
            raise CheckpointError(
                f"{self.checkpoint.path}: {words}; do the configuration and the weights belong together?"
            )

    def _take(self, key: str, stored: Tensor) -> None:
        item = original.to_ours(key, stored, self.checkpoint.config)
        if item is None:
            return
        name, tensor = item
        if name == "lm_head.weight" and self.checkpoint.config.tie_embeddings:
            self.tied_head = self._placed(name, tensor, stored)
            return
        if name not in self.expected:
            self.problems["unexpected"].append(key)
            return
        if name not in self.awaited:
            self.problems["twice"].append(key)
            return
        parameter = self.awaited.pop(name)
        if tensor.shape != parameter.shape or tensor.dtype not in _DTYPES.values():
            self.problems["wrong shape"].append(self._shapes(key, name, tensor))
            return
        kept = self._placed(name, tensor, stored)
        if not _all_finite(kept):
            lost = _all_finite(tensor)
            self.problems["not finite"].append(f"{key} (as {kept.dtype}: choose a wider dtype)" if lost else key)
            return
        owner, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(owner), leaf, nn.Parameter(kept, requires_grad=parameter.requires_grad))

    def _placed(self, name: str, tensor: Tensor, stored: Tensor) -> Tensor:
        """The tensor where and as it is to be, in memory of its own: ``stored`` lies in the mapped file."""
        in_file = tensor.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
        return tensor.to(self.device, dtype_of(name, self.dtype or tensor.dtype), copy=in_file)

    def _shown(self, name: str) -> str:
        """A parameter in the words of the file: the original's name where the file is the original's."""
        if not self.in_original_names:
            return name
        return original.to_theirs(name, self.expected[name], self.checkpoint.config)[0]

    def _shapes(self, key: str, name: str, tensor: Tensor) -> str:
        found, expected = tensor, self.expected[name]
        if self.in_original_names:
            expected = original.to_theirs(name, expected, self.checkpoint.config)[1]
            found = original.to_theirs(name, found, self.checkpoint.config)[1]
        kind = "" if tensor.dtype in _DTYPES.values() else f" of {tensor.dtype}"
        return f"{key} is {list(found.shape)}{kind}, expected {list(expected.shape)}"


def _all_finite(tensor: Tensor) -> bool:
    # NaN and infinity survive a sum, which is one pass without a mask the size of the tensor, and many times faster.
    # A sum may also overflow by itself, so one that is not finite is looked at again.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
