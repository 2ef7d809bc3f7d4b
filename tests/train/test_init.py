"""The statistics of fresh weights, against their sources; see ``StripedHyena.init_weights``."""

from __future__ import annotations

import math

import pytest
import torch

from hyaena.config import ModelConfig
from hyaena.filters import LongFilter
from hyaena.model import StripedHyena
from hyaena.ops import taps

WIDTH, LAYERS = 256, 4
CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=WIDTH,
    layer_types=("hyena", "attention", "hyena", "attention"),
    intermediate_size=320,
    num_attention_heads=8,
    num_key_value_heads=2,
    state_size=8,
    short_filter_length=4,
    attention_qkv_bias=True,
    attention_out_bias=True,
    tie_embeddings=False,
)
SMALL = math.sqrt(2 / (5 * WIDTH))
OUTPUT = 2 / (LAYERS * math.sqrt(WIDTH))


@pytest.fixture(scope="module")
def model() -> StripedHyena:
    torch.manual_seed(0)
    return StripedHyena(CONFIG)


def weights(model: StripedHyena, *ends: str) -> dict[str, torch.Tensor]:
    found = {name: p.detach() for name, p in model.named_parameters() if name.endswith(ends)}
    assert len(found) >= len(ends)
    return found


def assert_normal(name: str, weight: torch.Tensor, std: float) -> None:
    # At least 40,000 numbers: the deviation is known to (2·40,000)^-1/2 = 0.4 %, the mean to 0.5 % of it.
    # Five times that.
    assert weight.numel() >= 40_000, name
    assert weight.std().item() == pytest.approx(std, rel=0.02), name
    assert weight.mean().abs().item() < 0.025 * std, name
    # Normal, not uniform or truncated: 4.6 % lie beyond two deviations.
    assert (weight.abs() > 2 * std).float().mean().item() == pytest.approx(0.0455, abs=0.006), name


def test_matrices_that_read_the_residual_stream(model: StripedHyena) -> None:
    """N(0, 2/(5D)): Nguyen & Salazar 2019."""
    ends = ("embed_tokens.weight", "lm_head.weight", "qkv_proj.weight", "in_proj.weight")
    for name, weight in weights(model, *ends, "gate_proj.weight", "up_proj.weight").items():
        assert_normal(name, weight, SMALL)


def test_matrices_that_write_to_the_residual_stream(model: StripedHyena) -> None:
    """N(0, (2/(L·√D))²), L layers: GPT-J."""
    assert abs(OUTPUT / SMALL - 1) > 0.2  # the two can be told apart
    for name, weight in weights(model, ".o_proj.weight", ".out_proj.weight", "down_proj.weight").items():
        assert_normal(name, weight, OUTPUT)


def test_every_matrix_is_of_one_of_the_two_kinds(model: StripedHyena) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "filter" not in name:
            std = parameter.std().item()
            assert min(abs(std / SMALL - 1), abs(std / OUTPUT - 1)) < 0.02, name


def test_depth_shrinks_what_is_written(model: StripedHyena) -> None:
    values = {**CONFIG.__dict__, "layer_types": CONFIG.layer_types * 2}
    deeper = StripedHyena(ModelConfig(**values))
    (name, weight), *_ = weights(deeper, "down_proj.weight").items()
    assert_normal(name, weight, OUTPUT / 2)


def test_biases_norms_and_short_filters(model: StripedHyena) -> None:
    for name, bias in weights(model, "bias").items():
        assert (bias == 0).all(), name
    for name, scale in weights(model, "norm.weight").items():
        assert (scale == 1).all(), name
    for name, skip in weights(model, "long_filter.skip").items():
        assert (skip == 1).all(), name
    for name, taps_ in weights(model, "short_filter.weight").items():
        # Uniform in ±K^-1/2 (torch's conv1d), 3,072 numbers: variance 1/(3K), known to 1.6 %.
        assert taps_.abs().max().item() <= 0.5 and taps_.abs().max().item() > 0.49, name
        assert taps_.square().mean().item() == pytest.approx(1 / 12, rel=0.08), name


def test_fresh_filters_follow_their_source(model: StripedHyena) -> None:
    """S4D-Lin: |p| = exp(-dt/2) with dt in [1e-3, 0.1], phases dt·π·n; the filter keeps the power of white noise."""
    for module in model.modules():
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


def test_time_constants_are_spread_evenly_over_decades(model: StripedHyena) -> None:
    """dt log-uniform in [1e-3, 0.1]: a quarter of the channels lies in each half decade, 512 channels together."""
    exponents = []
    for poles in weights(model, "long_filter.poles").values():
        dt = -2 * torch.view_as_complex(poles)[:, 0].abs().double().log()
        exponents.append(dt.log10())
        radius = torch.view_as_complex(poles).abs()
        torch.testing.assert_close(radius, radius[:, :1].expand_as(radius), rtol=1e-6, atol=0)  # one dt per channel
    shares = torch.histc(torch.cat(exponents).float(), bins=4, min=-3, max=-1) / 512
    # Binomial: the deviation of a share is (0.25·0.75/512)^1/2 = 0.019; four times that.
    torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=0.077)


def test_residues_are_random_in_both_parts(model: StripedHyena) -> None:
    """``E|R|² = (1-|p|²)/N``, half of it in each part, 4,096 residues."""
    for name, residues in weights(model, "long_filter.residues").items():
        poles = dict(model.named_parameters())[name.replace("residues", "poles")].detach()
        power = (1 - poles.double().square().sum(-1)) / CONFIG.state_size
        scaled = residues.double() / power.sqrt().unsqueeze(-1)
        # The mean of 2,048 squares of a normal number of variance 1/2 is known to (2/2,048)^1/2 = 3 %; four times that.
        torch.testing.assert_close(
            scaled.square().mean((0, 1)), torch.full((2,), 0.5, dtype=torch.float64), rtol=0.13, atol=0
        )
        assert scaled.mean().abs() < 0.06, name


def test_a_generator_decides_every_weight() -> None:
    first, second, other = (StripedHyena(CONFIG) for _ in range(3))
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        model.init_weights(torch.Generator().manual_seed(seed))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, dict(second.named_parameters())[name]), name
    assert not torch.equal(first.embed_tokens.weight, other.embed_tokens.weight)
