"""All weights of a checkpoint, opened once: what the files name, and the tensors one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hyaena.checkpoints.files import Checkpoint, listed
from hyaena.checkpoints.parts import grouped
from hyaena.checkpoints.shards import FLOATING, Shard, open_shard
from hyaena.errors import CheckpointError
from hyaena.formats.tensors import format_of, matches_tensors
from hyaena.formats.transformers import tensors as transformers
from hyaena.tensor_files.stored import StoredTensor

_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
"""What wrappers of a model put before every name; taken off where all names have it."""
_INFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
"""What wrappers of single modules put into a name."""
_OURS = re.compile(r"layers\.\d+\.(mixer|mixer_norm|mlp|mlp_norm)\.")


@dataclass(frozen=True)
class Item:
    """One tensor of an open checkpoint.

    Attributes:
        name: its name, without the prefixes of wrappers.
        key: its name in the file.
        shard: the file.
    """

    name: str
    key: str
    shard: Shard

    @property
    def stored(self) -> StoredTensor:
        """What the file says about it."""
        return self.shard.tensors[self.key]

    def read(self) -> Tensor:
        """The tensor, as it is stored."""
        return self.shard.read(self.key)


@dataclass(frozen=True)
class Weights:
    """The tensors of an open checkpoint.

    Attributes:
        items: in the order of the files.
        in_original_names: whether the names are the original implementation's.
        dtype: of the embedding.
    """

    items: Sequence[Item]
    in_original_names: bool
    dtype: torch.dtype


@contextmanager
def open_weights(checkpoint: Checkpoint) -> Iterator[Weights]:
    """Open every file of a checkpoint once, and read their tables of contents.

    Raises:
        CheckpointError: a file is damaged, names differ from those of the index, or nothing in the files belongs to a
            StripedHyena model.
    """
    with ExitStack() as stack:
        shards = [stack.enter_context(open_shard(*paths)) for paths in grouped(checkpoint.shards)]
        keys = [(key, shard) for shard in shards for key in shard.tensors]
        names = plain_names([key for key, _ in keys])
        items = [Item(name, key, shard) for name, (key, shard) in zip(names, keys, strict=True)]
        _check_index(checkpoint, items)
        our_name = format_of(checkpoint.config).our_name
        dtypes = {our_name(item.name): item.stored.dtype for item in items}
        if "embed_tokens.weight" not in dtypes and not any(name and _OURS.match(name) for name in dtypes):
            raise CheckpointError(f"{checkpoint.path}: holds no tensor of a StripedHyena model: check the path")
        dtype = dtypes.get("embed_tokens.weight")
        yield Weights(items, matches_tensors(names), dtype if dtype in FLOATING else torch.float32)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Inspection:
    """What the tables of contents of a checkpoint say.

    Attributes:
        in_original_names: whether the names are the original implementation's.
        dtype: in which the embedding is stored.
    """

    in_original_names: bool
    dtype: torch.dtype


def inspect(checkpoint: Checkpoint) -> Inspection:
    """Look at the names and dtypes of a checkpoint; no tensor is read.

    Raises:
        CheckpointError: as :func:`open_weights`.
    """
    with open_weights(checkpoint) as weights:
        return Inspection(weights.in_original_names, weights.dtype)


def plain_names(keys: Sequence[str]) -> list[str]:
    """Names without the prefixes that all of them have, one within the other, and without those of inner wrappers."""
    names = [transformers.our_name(key) for key in keys] if transformers.matches_tensors(keys) else list(keys)
    while prefix := next((p for p in _PREFIXES if names and all(name.startswith(p) for name in names)), None):
        names = [name.removeprefix(prefix) for name in names]
    for infix in _INFIXES:
        names = [name.replace(infix, "") for name in names]
    return names


def _check_index(checkpoint: Checkpoint, items: Sequence[Item]) -> None:
    """Refuse an index that names other tensors than its files have, or has them in other files."""
    if checkpoint.weight_map is None:
        return
    our_name = format_of(checkpoint.config).our_name
    keys = list(checkpoint.weight_map)
    places = zip(map(our_name, plain_names(keys)), checkpoint.weight_map.values(), strict=True)
    stated = {(name, file) for name, file in places if name is not None}
    found = {(our_name(item.name), item.shard.path.name) for item in items}
    found = {(name, file) for name, file in found if name is not None}
    if different := sorted({str(name) for name, _ in stated ^ found}):
        names = listed(different, most=6)
        raise CheckpointError(f"{checkpoint.path}: its index and its files disagree about {names}: download them again")
