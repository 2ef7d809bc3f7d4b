"""The presets say what the configurations of evo2's package say, for every model that it names."""

from __future__ import annotations

import pkgutil
from dataclasses import replace

import pytest
import yaml
from evo2.utils import CONFIG_MAP, HF_MODEL_NAME_MAP, MODEL_NAMES

from hyaena import hub
from hyaena.config import ModelConfig
from hyaena.formats import config_from_dict


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_presets_are_the_published_configurations(name: str) -> None:
    values = yaml.safe_load(pkgutil.get_data("evo2", CONFIG_MAP[name]) or b"")
    preset = ModelConfig.from_name(name.replace("_", "-"))
    assert replace(config_from_dict(values), name=preset.name) == preset


def test_the_hub_ids_are_known() -> None:
    known = {hub_id: known.preset for hub_id, known in hub.PUBLISHED.items() if known.preset is not None}
    assert known == {HF_MODEL_NAME_MAP[name]: name.replace("_", "-") for name in MODEL_NAMES}
