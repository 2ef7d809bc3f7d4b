from __future__ import annotations

import itertools
import re

import pytest
import torch

from hyaena.config import ModelConfig
from hyaena.model import StripedHyena
from hyaena.train.config import OptimConfig
from hyaena.train.filters import parametrize_filters
from hyaena.train.optim import learning_rate, make_optimizer, parameter_groups

OPTIM = OptimConfig(lr=1e-3, warmup_steps=10, weight_decay=0.1, filter_lr_ratio=0.25)
DECAYED = re.compile(
    r"embed_tokens\.weight|lm_head\.weight"
    r"|layers\.\d+\.mlp\.(gate|up|down)_proj\.weight"
    r"|layers\.\d+\.mixer\.(qkv|o|in|out)_proj\.weight"
)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest) -> StripedHyena:
    config = ModelConfig(
        vocab_size=20,
        hidden_size=8,
        layer_types=("hyena", "attention"),
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        state_size=3,
        tie_embeddings=request.param,
        attention_qkv_bias=True,
        attention_out_bias=True,
    )
    return StripedHyena(config)


@pytest.mark.parametrize("parametrised", [True, False])
def test_only_matrices_decay_and_every_parameter_is_trained_once(model: StripedHyena, parametrised: bool) -> None:
    if parametrised:
        parametrize_filters(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, OPTIM).param_groups
    seen = [names[parameter] for group in groups for parameter in group["params"]]
    assert sorted(seen) == sorted(names.values())
    for group in groups:
        for parameter in group["params"]:
            name = names[parameter]
            decays = DECAYED.fullmatch(name) is not None
            assert group["weight_decay"] == (0.1 if decays else 0.0), name
            assert group["lr_ratio"] == (0.25 if "long_filter" in name else 1.0), name
    kept = " ".join(names[p] for group in groups if group["weight_decay"] == 0 for p in group["params"])
    for part in ("poles", "residues", "skip", "norm.weight", "short_filter.weight", "qkv_proj.bias", "in_proj.bias"):
        assert part in kept


def test_frozen_parameters_are_left_out(model: StripedHyena) -> None:
    model.embed_tokens.weight.requires_grad_(False)
    trained = [parameter for group in parameter_groups(model, OPTIM) for parameter in group["params"]]
    assert all(parameter is not model.embed_tokens.weight for parameter in trained)


def test_a_step_without_gradient_moves_what_decays_and_nothing_else(model: StripedHyena) -> None:
    parametrize_filters(model)
    optimizer = make_optimizer(model, OPTIM)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (DECAYED.fullmatch(name) is not None), name


def test_the_schedule_warms_up_and_ends_at_its_floor() -> None:
    rates = [learning_rate(step, 100, OPTIM) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4)
    assert rates[55 - 1] == pytest.approx(0.55e-3, rel=0.02)  # half-way down the cosine
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_a_run_shorter_than_its_warm_up_is_possible() -> None:
    assert [learning_rate(step, 2, OPTIM) for step in range(2)] == pytest.approx([1e-4, 2e-4])
    assert learning_rate(0, 1, OptimConfig(lr=1e-3, warmup_steps=0)) == pytest.approx(1e-3)
