"""Names of modules, in both directions, against the table of tensors and over all modules of models."""

from __future__ import annotations

import pytest
import torch

from configs import TINY, TINY_EVO
from hyaena.config import ModelConfig
from hyaena.formats.stripedhyena.modules import INPUT, original_module, our_module
from hyaena.formats.stripedhyena.tensors import our_name
from hyaena.formats.tensors import state_to_theirs
from hyaena.model import StripedHyena


def model(config: ModelConfig) -> StripedHyena:
    with torch.device("meta"):
        return StripedHyena(config)


@pytest.mark.parametrize("config", [TINY, TINY_EVO])
def test_a_module_has_the_name_that_its_tensors_have(config: ModelConfig) -> None:
    theirs = [key for key in state_to_theirs(StripedHyena(config).state_dict(), config) if our_name(key)]
    checked = 0
    for key in theirs:
        ours, module = our_name(key), key.rpartition(".")[0]
        assert ours is not None
        if module.endswith(".filter"):  # one module there, two here
            continue
        assert our_module(module) == ours.rpartition(".")[0] and original_module(ours.rpartition(".")[0]) == module
        checked += 1
    assert checked > 20


@pytest.mark.parametrize("config", [TINY, TINY_EVO])
def test_every_module_that_the_original_has_comes_back(config: ModelConfig) -> None:
    names = [name for name, _ in model(config).named_modules() if name]
    missing = set()
    for name in names:
        theirs = original_module(name)
        if theirs is None:
            missing.add(name.removeprefix("layers.").lstrip("0123456789.") or name)
        elif not name.endswith("mixer"):
            assert our_module(theirs) == name
    # lists, and what the original keeps inside its filter and its attention
    assert missing == {"layers", "rotary", "mixer.short_filter", "mixer.long_filter"}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("blocks.20.mlp.l3", "layers.20.mlp.down_proj"),
        ("blocks.3", "layers.3"),
        ("blocks.3.filter", "layers.3.mixer.out_proj.input"),
        ("blocks.3.inner_mha_cls.inner_attn", "layers.3.mixer.o_proj.input"),
        ("blocks.3.inner_mha_cls", "layers.3.mixer"),
        ("blocks.3.mlp.input", "layers.3.mlp.input"),
        ("norm", "norm"),
        ("norm.input", "norm.input"),
        ("unembed", "lm_head"),
        ("embedding_layer", "embed_tokens"),
    ],
)
def test_names(theirs: str, ours: str) -> None:
    assert our_module(theirs) == ours and original_module(ours) == theirs


@pytest.mark.parametrize("name", ["", "blocks", "blocks.x", "blocks.3.", "layers.3", "blocks.3.mlp.l4", "norm.scale"])
def test_other_names_are_not_translated(name: str) -> None:
    assert our_module(name) is None


def test_there_is_no_input_of_an_input() -> None:
    assert our_module("blocks.3.filter" + INPUT) is None
