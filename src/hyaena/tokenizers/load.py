"""Chooses and loads the tokenizer of a model."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Protocol

from hyaena.errors import CheckpointError, InputError, shown
from hyaena.tokenizers.base import Tokenizer
from hyaena.tokenizers.hf import HFTokenizer, eos_ids_beside
from hyaena.tokenizers.simple import ByteTokenizer, CharacterTokenizer


class _Described(Protocol):
    """The two fields of a ModelConfig that choose a tokenizer."""

    @property
    def tokenizer(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...


def load_tokenizer(path: str | PathLike[str], config: _Described) -> Tokenizer:
    """Load the tokenizer of a model.

    Args:
        path: the model's folder, a file in it, or a ``tokenizer.json``, which is read only when ``config.tokenizer`` is
            ``"hf"``. ``generation_config.json`` beside it is read for the ids at which generation ends.
        config: the model's configuration (``tokenizer`` and ``vocab_size`` are read).

    Raises:
        CheckpointError: there is no usable ``tokenizer.json``, or the vocabulary does not fit.
        InputError: the arguments are something else.
    """
    if not isinstance(path, str | PathLike):
        raise InputError(f"path must be a model's folder or file, not {shown(path)}")
    if not (hasattr(config, "tokenizer") and hasattr(config, "vocab_size")):
        raise InputError(f"config must be a ModelConfig, not {shown(config)}")
    path = Path(path)
    try:
        folder = path if path.is_dir() else path.parent
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if config.tokenizer == "hf":
        named = path.name.endswith("tokenizer.json") and path != folder
        return HFTokenizer(path if named else _file_in(folder), config.vocab_size)
    kinds = {"bytes": ByteTokenizer, "characters": CharacterTokenizer}
    if config.tokenizer not in tuple(kinds):
        raise CheckpointError(f"unknown tokenizer {shown(config.tokenizer)}: use 'hf', 'bytes' or 'characters'")
    try:
        tokenizer = kinds[config.tokenizer](config.vocab_size)
    except InputError as error:
        raise CheckpointError(f"the config has tokenizer {config.tokenizer!r}, but {error}") from error
    tokenizer.other_eos_ids = eos_ids_beside(folder, tokenizer.vocab_size)
    return tokenizer


def _file_in(folder: Path) -> Path:
    file = folder / "tokenizer.json"
    if not file.exists():
        raise CheckpointError(f"no tokenizer.json in {folder}: put the model's tokenizer.json there")
    return file
