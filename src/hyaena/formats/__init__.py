"""Foreign formats: the configuration keys and the tensor layouts of other implementations, in both directions.

Each format is a package with two modules: ``config`` (``matches_config``, ``read_config``, ``write_config``; without
torch) and ``tensors`` (``our_name``, ``to_ours``, ``to_theirs``, ``extra_tensors``; ``formats.tensors`` chooses
between them). The functions below read any format.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike
from typing import Any

from hyaena.arguments import as_path
from hyaena.config import ModelConfig, preset_names
from hyaena.errors import ConfigError, nearest, printable
from hyaena.formats.evo2 import config as evo2_config
from hyaena.formats.stripedhyena import config as stripedhyena_config
from hyaena.formats.transformers import config as transformers_config
from hyaena.mappings import read_mapping

__all__ = ["config_from_dict", "is_original", "read_config", "write_original"]

_ORIGINALS = (evo2_config, stripedhyena_config)
_FORMATS = (transformers_config, *_ORIGINALS)
_OF_A_RUN = {"data", "optim", "output", "steps"}
"""Keys of every configuration of a training run, which runs keep as ``config.yml``."""


def read_config(path: str | PathLike[str]) -> ModelConfig:
    """Read a configuration file, known by its keys: our ``config.json``, that of ``hyaena.hf``, or an original one.

    An original configuration is a YAML file or the ``config.json`` of a hub checkpoint. The name of a preset, where no
    file has it, means that preset.

    Raises:
        ConfigError: the file is missing or is not a configuration; the message begins with its path.
        InputError: this is no path.
    """
    path = as_path("the configuration", path)
    if str(path) in preset_names() and not path.exists():
        return ModelConfig.from_name(str(path))
    try:
        values = read_mapping(path)
        if (name := transformers_config.classifier(values)) is not None:
            folder = printable(repr(str(path.parent)))
            raise ConfigError(
                f"it is a classifier, no language model: load it with hyaena.hf.{name}.from_pretrained({folder})"
            )
        return config_from_dict(values)
    except ConfigError as error:
        near = None if os.path.exists(path) else nearest(str(path), preset_names())
        hint = f", or the name of a preset: did you mean {near}?" if near else ""
        raise ConfigError(f"{printable(str(path))}: {error}{hint}") from None


def config_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a mapping describes, in our keys or in those of a foreign format.

    Raises:
        ConfigError: unknown, missing, ill-typed, contradictory or unsupported keys, each with its fix.
    """
    for form in _FORMATS:
        if form.matches_config(values):
            return form.read_config(values)
    if values.keys() >= _OF_A_RUN:
        raise ConfigError("it is of a training run, for `hyaena train`: name the configuration of a model")
    return ModelConfig.from_dict(values)


def is_original(values: Mapping[str, Any]) -> bool:
    """Whether a mapping is written in the keys of an original implementation, of StripedHyena 1 or 2.

    Raises:
        ConfigError: it has keys of both an original and this package.
    """
    return any(form.matches_config(values) for form in _ORIGINALS)


def write_original(config: ModelConfig) -> dict[str, Any]:
    """A configuration in the keys of the original that has such models, StripedHyena 1 or 2.

    Raises:
        ConfigError: neither has them.
    """
    return (evo2_config if evo2_config.is_of(config) else stripedhyena_config).write_config(config)
