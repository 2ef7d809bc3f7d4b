from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hyaena.config import ModelConfig
from hyaena.model import LongFilter, StripedHyena
from hyaena.ops import taps
from hyaena.train.filters import DecayAndPhase, parametrize_filters, plain_state_dict

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


@given(wild, wild)
def test_no_parameter_leaves_the_unit_circle(a: float, phase: float) -> None:
    parameters = [torch.tensor([[value]], requires_grad=True) for value in (a, phase)]
    poles = DecayAndPhase()(*parameters)
    assert poles.double().norm(dim=-1).item() < 1
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


def test_poles_survive_the_round_trip() -> None:
    phase = torch.linspace(-3.1, 3.1, 9)
    # The rate of a float32 pole at 1 - 1e-5 is known to 6e-8 / 1e-5 only, so the pole is what must agree.
    for radius in (0.0, 1e-3, 0.5, 0.999, 1 - 1e-5):
        poles = radius * torch.stack([phase.cos(), phase.sin()], dim=-1).unsqueeze(0)
        mapping = DecayAndPhase()
        torch.testing.assert_close(mapping(*mapping.right_inverse(poles)), poles, rtol=0, atol=3e-7)


def test_poles_outside_are_taken_to_the_edge_with_their_phase() -> None:
    poles = torch.tensor([[[1.2, 0.5], [-1.0, 0.0], [0.0, 1.0]]])
    mapping = DecayAndPhase()
    inside = mapping(*mapping.right_inverse(poles))
    radius = inside.double().norm(dim=-1)
    assert (radius < 1).all() and (radius > 1 - 1e-5).all()
    directions = poles / poles.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(inside, directions, rtol=0, atol=1e-5)


def test_the_model_computes_the_same_and_gives_its_own_names_back() -> None:
    model = StripedHyena(CONFIG)
    ids = torch.randint(20, (2, 40))
    names = set(model.state_dict())
    with torch.no_grad():
        before = model(ids)
        parametrize_filters(model)
        # Poles move by a few units in the last place.
        torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-5)
        plain = plain_state_dict(model)
        assert set(plain) == names
        fresh = StripedHyena(CONFIG)
        fresh.load_state_dict(plain)
        assert torch.equal(fresh(ids), model(ids))


def test_parametrised_poles_stay_float32() -> None:
    model = StripedHyena(CONFIG)
    parametrize_filters(model)
    model.to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, LongFilter):
            assert module.poles.dtype == torch.float32


def test_fresh_filters_follow_their_source() -> None:
    """S4D-Lin: |p| = exp(-dt/2) with dt in [1e-3, 0.1], phases dt·π·n; the filter keeps the power of white noise."""
    config = ModelConfig(**{**CONFIG.__dict__, "hidden_size": 256, "state_size": 8})
    for module in StripedHyena(config).modules():
        if isinstance(module, LongFilter):
            poles = torch.view_as_complex(module.poles.detach())
            assert (poles.abs() < 1).all()
            time_constants = -1 / poles.abs().double().log()
            assert 19.9 < time_constants.min() < 25 and 1500 < time_constants.max() < 2001
            dt = 2 / time_constants[:, :1]
            torch.testing.assert_close(poles[:, 1].angle().double(), dt[:, 0] * torch.pi, rtol=1e-4, atol=0)
            # A mean over 256 channels of random residues: 256^-1/2 of a relative spread near 1, three times over.
            response = taps(module()._replace(skip=None), 30_000)
            assert response.square().sum(-1).mean().item() == pytest.approx(0.5, rel=0.2)
