"""A forward pass resolves the backend once, whatever the number of layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from configs import TINY
from hyaena.model import StripedHyena
from hyaena.ops import backend


@pytest.mark.parametrize("layers", [2, 12])
def test_one_pass_resolves_once(monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    model = StripedHyena(dataclasses.replace(TINY, layer_types=("hyena", "attention") * (layers // 2)))
    calls: list[str] = []
    resolve = backend.resolve_backend

    def count(choice: str = "auto", **options: object) -> backend.Backend:
        calls.append(choice)
        return resolve(choice, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(backend, "resolve_backend", count)
    monkeypatch.setattr("hyaena.ops.resolve_backend", count)
    with torch.inference_mode():
        model(torch.randint(TINY.vocab_size, (2, 40)))
    assert calls == ["auto"]
