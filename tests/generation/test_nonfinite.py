"""The search for the first NaN: exact across chunks, and honest when it finds none."""

from __future__ import annotations

import math

import pytest
import torch

from hyaena.config import ModelConfig
from hyaena.generation import nonfinite
from hyaena.generation.nonfinite import first_non_finite
from hyaena.model import StripedHyena

CONFIG = ModelConfig(
    vocab_size=16,
    hidden_size=16,
    layer_types=("hyena", "attention"),
    intermediate_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    state_size=1,
)


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_the_position_is_that_of_the_whole_sequence(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonfinite, "CHUNK", chunk)
    model = StripedHyena(CONFIG)
    with torch.no_grad():
        model.embed_tokens.weight[9] = math.inf
    assert first_non_finite(model, [1, 2, 3, 4, 9, 5, 9]) == "they first appear in the embedding, at token 4"


@pytest.mark.parametrize("method", ["recurrence", "blocked"])
def test_a_pole_outside_the_unit_circle_is_found_where_it_overflows(method: str) -> None:
    model = StripedHyena(CONFIG)
    with torch.no_grad():
        model.layers[0].mixer.long_filter.poles.fill_(4.0)  # pyright: ignore
    assert first_non_finite(model, [1] * 100, method=method).startswith(
        "they first appear in layer 0 (hyena), at token"
    )


def test_nothing_found_is_said_so() -> None:
    assert "finite when the tokens were read again" in first_non_finite(StripedHyena(CONFIG), [1, 2, 3])
