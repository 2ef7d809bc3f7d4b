from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hyaena.config import ModelConfig
from hyaena.filters import LongFilter, RealLongFilter
from hyaena.model import StripedHyena
from hyaena.train.filters import Decay, DecayAndPhase, parametrize_filters, plain_state_dict, poles_outside

CONFIG = ModelConfig(
    vocab_size=20,
    hidden_size=8,
    layer_types=("hyena", "attention", "hyena"),
    intermediate_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    state_size=3,
    tie_embeddings=True,
)

wild = st.floats(width=32, allow_nan=False, allow_infinity=False)


def poles_at(radius: float, phases: int = 9) -> torch.Tensor:
    """Poles [1,phases,2] of a radius, in every direction."""
    phase = torch.linspace(-3.1, 3.1, phases, dtype=torch.float64)
    return (radius * torch.stack([phase.cos(), phase.sin()], dim=-1)).unsqueeze(0).float()


@given(wild, wild, st.floats(1e-12, 1 - 2e-6))
def test_no_parameter_takes_a_pole_out_of_the_unit_circle(alpha: float, phase: float, radius: float) -> None:
    mapping = DecayAndPhase(poles_at(radius))
    parameters = [torch.full((1, 9), value, requires_grad=True) for value in (alpha, phase)]
    poles = mapping(*parameters)
    assert (poles.double().norm(dim=-1) < 1).all()
    poles.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in parameters if parameter.grad is not None)


def test_violent_steps_stay_inside_and_finite() -> None:
    model = StripedHyena(CONFIG)
    parametrize_filters(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e3)
    for _ in range(5):
        poles = torch.stack([module.poles for module in model.modules() if isinstance(module, LongFilter)])
        (poles * torch.randn_like(poles)).sum().backward()
        nn.utils.clip_grad_value_(model.parameters(), 1.0)
        optimizer.step()
        for module in model.modules():
            if isinstance(module, LongFilter):
                radius = module.poles.double().norm(dim=-1)
                assert torch.isfinite(radius).all() and (radius < 1).all()


@pytest.mark.parametrize(
    "radius", [0.0, 1e-30, 1e-3, 0.5, 0.999, 1 - 1e-5, 1 - 6e-8, 1.0, 1.0 + 1.2e-7, 1.003, 1.2, 7.0]
)
def test_poles_start_where_they_are_to_the_last_bit(radius: float) -> None:
    poles = poles_at(radius)
    mapping = DecayAndPhase(poles)
    assert torch.equal(mapping(*mapping.right_inverse(poles)), poles)


@pytest.mark.parametrize("radius", [1.0, 1.003, 1.2])
def test_poles_outside_may_come_inside_and_never_go_far(radius: float) -> None:
    mapping = DecayAndPhase(poles_at(radius))
    phase = torch.zeros(1, 9)
    for alpha in (-1e30, -3.0, -0.1, 0.0):
        # exp and its argument round in float32.
        assert (mapping(phase + alpha, phase).double().norm(dim=-1) <= radius**2 * (1 + 3e-6)).all()
    assert (mapping(phase + 12.0, phase).double().norm(dim=-1) < 0.9).all()
    alpha = phase.clone().requires_grad_()
    mapping(alpha, phase).square().sum().backward()
    assert alpha.grad is not None and (alpha.grad < 0).all()  # a smaller radius is a larger alpha


def test_equal_steps_are_equal_relative_steps_in_the_time_constant() -> None:
    for radius in (0.9, 0.99, 0.9999):
        mapping = DecayAndPhase(poles_at(radius))
        moved = mapping(torch.full((1, 9), 0.5), torch.full((1, 9), 0.25))
        rates = -moved.double().norm(dim=-1).log() / -math.log(radius)
        # Near the circle the rate of a float32 pole is known to 6e-8 / 1e-4, and RATE_MIN is 1 % of it.
        torch.testing.assert_close(rates, torch.full_like(rates, math.exp(0.5)), rtol=1.1e-2, atol=0)
        turned = torch.view_as_complex(moved) / torch.view_as_complex(poles_at(radius))
        torch.testing.assert_close(turned.angle(), torch.full((1, 9), 0.25), rtol=1e-5, atol=0)


def test_poles_outside_are_counted() -> None:
    model = StripedHyena(CONFIG)
    assert poles_outside(model).count == 0
    with torch.no_grad():
        model.layers[2].mixer.long_filter.poles[1, 2] = torch.tensor([0.0, -1.003])
        model.layers[2].mixer.long_filter.poles[5, 0] = torch.tensor([1.0, 0.0])
        model.layers[0].mixer.long_filter.poles[0, 0] = torch.tensor([1.0, -1.0])
    found = poles_outside(model)
    assert (found.count, found.total, found.layers) == (3, 48, (0, 2))
    assert found.largest_radius == pytest.approx(math.sqrt(2))
    assert str(found) == "3 of 48 poles start on or outside the unit circle, up to |p| = 1.414214, in layers 0, 2"


def test_the_model_computes_the_same_and_gives_its_own_names_back() -> None:
    model = StripedHyena(CONFIG)
    ids = torch.randint(20, (2, 40))
    names = set(model.state_dict())
    with torch.no_grad():
        before = model(ids)
        parametrize_filters(model)
        assert torch.equal(model(ids), before)
        plain = plain_state_dict(model)
        assert set(plain) == names
        fresh = StripedHyena(CONFIG)
        fresh.load_state_dict(plain)
        assert torch.equal(fresh(ids), model(ids))


def test_parametrised_poles_stay_float32() -> None:
    model = StripedHyena(CONFIG)
    parametrize_filters(model)
    before = plain_state_dict(model)
    model.to(torch.bfloat16)
    for name, tensor in plain_state_dict(model).items():
        if name.endswith("poles"):
            assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name])


def test_real_modes_decay_and_start_where_they_are() -> None:
    log_poles = torch.tensor([[-1e-7, -1e-3, -0.5, -20.0, 0.0, 3e-3]])
    mapping = Decay(log_poles)
    assert torch.equal(mapping(mapping.right_inverse(log_poles)), log_poles)
    for alpha in (-1e30, -3.0, 0.7, 12.0, 1e30):
        moved = mapping(torch.full_like(log_poles, alpha))
        assert (moved[:, :4] <= 0).all() and torch.isfinite(moved).all()
        assert (moved[:, 4:] <= 2 * log_poles[:, 4:] + 1.1e-6).all()  # RATE_MIN, and a rounding
    # Equal relative steps of the rate.
    torch.testing.assert_close(mapping(torch.full((1, 6), 0.5))[:, 1:4], log_poles[:, 1:4] * math.exp(0.5))


def test_real_modes_of_a_model_are_trained_so_too() -> None:
    module = nn.Module()
    module.filter = RealLongFilter(4, 2)
    with torch.no_grad():
        module.filter.init_weights()
    before = module.filter.log_poles.detach().clone()
    parametrize_filters(module)
    assert torch.equal(module.filter.log_poles, before)
    module.to(torch.bfloat16)
    plain = plain_state_dict(module)
    assert set(plain) == {"filter.log_poles", "filter.residues", "filter.skip"}
    assert torch.equal(plain["filter.log_poles"], before) and plain["filter.residues"].dtype == torch.float32
