"""hyaena: run, fine-tune and study StripedHyena models.

The public names below load on first use (PEP 562), so that ``import hyaena`` and ``hyaena --help`` need no torch.
"""

from __future__ import annotations

from importlib import import_module

# What typing's constant is, without importing typing: that takes most of the time until `hyaena` handles a Ctrl-C.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hyaena import ops
    from hyaena.checkpoints import save_model
    from hyaena.config import ModelConfig
    from hyaena.generation import generate, stream
    from hyaena.hub import load, load_model
    from hyaena.model import StripedHyena
    from hyaena.scoring import embed, iter_embeddings, iter_scores, score, score_continuations

__version__ = "0.1.0"

__all__ = [
    "ModelConfig",
    "StripedHyena",
    "__version__",
    "embed",
    "generate",
    "iter_embeddings",
    "iter_scores",
    "load",
    "load_model",
    "ops",
    "save_model",
    "score",
    "score_continuations",
    "stream",
]

_HOMES = {
    "ModelConfig": "hyaena.config",
    "StripedHyena": "hyaena.model",
    "embed": "hyaena.scoring",
    "generate": "hyaena.generation",
    "iter_embeddings": "hyaena.scoring",
    "iter_scores": "hyaena.scoring",
    "load": "hyaena.hub",
    "load_model": "hyaena.hub",
    "save_model": "hyaena.checkpoints",
    "score": "hyaena.scoring",
    "score_continuations": "hyaena.scoring",
    "stream": "hyaena.generation",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("hyaena.ops")
    if name not in _HOMES:
        raise AttributeError(f"module 'hyaena' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
