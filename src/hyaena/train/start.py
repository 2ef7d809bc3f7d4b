"""What a run starts from: architecture, tokenizer and weights, fresh ones or those of a published model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hyaena import hub
from hyaena.config import ModelConfig
from hyaena.errors import ConfigError
from hyaena.files import expanded
from hyaena.model import StripedHyena
from hyaena.tokenizers import Tokenizer, load_tokenizer
from hyaena.train.config import TrainConfig

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


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
    files: dict[str, bytes] = {}
    if model_config.tokenizer == "hf":
        folder = folder.parent if folder.is_file() else folder
        files = {name: (folder / name).read_bytes() for name in _TOKENIZER_FILES if (folder / name).is_file()}
    return Start(model_config, tokenizer, files)


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
