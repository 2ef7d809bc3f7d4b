"""What a run starts from: architecture, tokenizer and weights, fresh ones or those of a published model."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyaena import hub
from hyaena.checkpoints import COMPANIONS, files_of_tokenizer
from hyaena.config import ModelConfig
from hyaena.errors import ConfigError
from hyaena.files import expanded
from hyaena.model import StripedHyena
from hyaena.tokenizers import Tokenizer, load_tokenizer
from hyaena.train.config import TrainConfig
from hyaena.train.storage import saved_description


@dataclass(frozen=True)
class Start:
    """What is known before any weight is read or downloaded.

    Attributes:
        config: the architecture.
        tokenizer: of the model.
        tokenizer_files: name -> content; they go with every export.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    tokenizer_files: dict[str, bytes]


def find_start(config: TrainConfig) -> Start:
    """Read the architecture and the tokenizer of a run, and check that they fit together.

    Of a hub id, only these small files are downloaded.

    Raises:
        CheckpointError: the model to start from, or the tokenizer, is missing or cannot be used.
        ConfigError: the window is longer than the model's maximum, or the vocabulary too small for the tokenizer.
    """
    if config.model is not None:
        model_config, folder = config.model, Path(config.data.tokenizer or "")
    else:
        assert config.init_from is not None
        model_config, folder = _described(config.init_from)
    if model_config.weights is not None:
        raise ConfigError(
            f"{config.init_from or 'the model'} has {model_config.weights} weights, which are not trained: start from "
            "the model that was quantized, or train an adapter over them (adapters.add_adapter)"
        )
    if config.window > model_config.max_length:
        raise ConfigError(f"window {config.window} is longer than the model's maximum of {model_config.max_length}")
    tokenizer = load_tokenizer(folder, model_config)
    if tokenizer.vocab_size > model_config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model only {model_config.vocab_size}: "
            "raise model.vocab_size"
        )
    return Start(model_config, tokenizer, files_of_tokenizer(tokenizer))


def saved_start(state: dict[str, Any]) -> Start:
    """What a run began with, from its saved state: nothing that it was made of needs to be there still.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is not the saved state of a run.
    """
    config, files = saved_description(state)
    with tempfile.TemporaryDirectory() as folder:
        for name in files.keys() & set(COMPANIONS):  # names of any other form are not written anywhere
            (Path(folder) / name).write_bytes(files[name])
        return Start(config, load_tokenizer(folder, config), files)


def _described(source: str) -> tuple[ModelConfig, Path]:
    """Return the architecture of a model, and the folder of its tokenizer."""
    if source not in hub.BUNDLED and not expanded(source).exists() and hub.is_hub_id(source):
        return hub.describe(source)
    checkpoint = hub.locate(source)
    return checkpoint.config, checkpoint.folder


def initial_model(config: TrainConfig, start: Start) -> StripedHyena:
    """Make the model of step 0 on the CPU, in float32: fresh weights, or those of ``init_from``.

    Raises:
        CheckpointError: the weights cannot be read.
    """
    if config.init_from is None:
        return StripedHyena(start.config)
    return hub.load_model(config.init_from, dtype="float32", device="cpu")
