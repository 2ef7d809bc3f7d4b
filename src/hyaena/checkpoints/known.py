"""Which published Evo 2 model a weights file without a configuration is of: the authors publish the weights alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hyaena.checkpoints.parts import whole_name
from hyaena.checkpoints.shards import open_shard
from hyaena.config import ModelConfig, preset_names
from hyaena.errors import ConfigError

_EVO2 = re.compile(r"blocks\.\d+\.filter\.(h|log_poles)")


def recognise(files: Sequence[Path]) -> ModelConfig:
    """The preset that a weights file fits; of several, the one that the file is named after.

    Args:
        files: one weights file, or its parts in order. Its table of contents is read.

    Raises:
        ConfigError: it fits none, or several, or is of another kind of model.
        CheckpointError: it is damaged.
    """
    path = files[0].with_name(whole_name(files[0].name))
    with open_shard(*files) as shard:
        shapes = {key: stored.shape for key, stored in shard.tensors.items()}
    missing = f"{path.parent}: no config.json and no config.yml beside the weights"
    if not any(_EVO2.fullmatch(key) for key in shapes):
        raise ConfigError(f"{missing}: name one with config=")
    presets = {name: ModelConfig.from_name(name) for name in preset_names() if name.startswith("evo2-")}
    fitting = [name for name, config in presets.items() if _fits(config, shapes)]
    if len(fitting) > 1:
        own = path.stem.replace("_", "-").lower()
        fitting = [name for name in fitting if own == name] or fitting
    if not fitting:
        raise ConfigError(
            f"{missing}, and {path.name} fits no published Evo 2 model ({_described(shapes)}): name one with config="
        )
    if len(fitting) > 1:
        raise ConfigError(
            f"{missing}, and {path.name} fits several published models: name the one that it is of with "
            f"config=, {' or '.join(fitting)}"
        )
    return presets[fitting[0]]


def _fits(config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether every layer is of its kind, and the sizes that distinguish models are those of a configuration."""
    width = config.hidden_size
    expected: dict[str, tuple[int, ...]] = {"embedding_layer.weight": (config.vocab_size, width)}
    own = {
        "attention": ("inner_mha_cls.Wqkv.weight", (3 * width, width)),
        "hyena_se": ("filter.h", (config.se_filter_groups or width, 1, config.se_filter_length)),
        "hyena_mr": ("filter.h", (config.mr_filter_groups or width, 1, config.mr_filter_length)),
        "hyena_li": ("filter.log_poles", (width, config.state_size, 1)),
    }
    for i, kind in enumerate(config.layer_types):
        expected[f"blocks.{i}.mlp.l1.weight"] = (config.intermediate_size, width)
        expected[f"blocks.{i}.{own[kind][0]}"] = own[kind][1]
    return _layers(shapes) == config.num_layers and all(shapes.get(key) == shape for key, shape in expected.items())


def _layers(shapes: dict[str, tuple[int, ...]]) -> int:
    return len({key.split(".")[1] for key in shapes if key.startswith("blocks.")})


def _described(shapes: dict[str, tuple[int, ...]]) -> str:
    """The sizes of a model as its weights file has them."""
    embedding, mlp = shapes.get("embedding_layer.weight", ()), shapes.get("blocks.0.mlp.l1.weight", ())
    return (
        f"vocabulary and width {list(embedding) or 'missing'}, {_layers(shapes):,} layers, "
        f"MLP {mlp[0] if mlp else 'missing'}"
    )
