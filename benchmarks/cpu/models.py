"""The models under test: 129M parameters of SH-7B's pattern, and the bundled one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hyaena.config import ModelConfig

if TYPE_CHECKING:
    from hyaena.model import StripedHyena
    from hyaena.tokenizers import Tokenizer

STRIPED = ModelConfig(
    vocab_size=32_000,
    hidden_size=768,
    layer_types=("hyena", "attention") * 6,
    intermediate_size=2048,
    num_attention_heads=12,
    num_key_value_heads=3,
    state_size=2,
    rope_theta=500_000.0,
    max_length=16_384,
    name="129M",
)
"""SH-7B's pattern, 128,912,640 parameters: the widths, the stripes and the MLP in its proportions."""

TINY = replace(
    STRIPED,
    vocab_size=320,
    hidden_size=96,
    layer_types=("hyena", "attention") * 2,
    intermediate_size=128,
    num_attention_heads=6,
    name="tiny",
)
"""For ``--quick``: shows that a benchmark works, and nothing about speed."""


EVO = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    layer_types=("hyena", "hyena", "attention", "hyena"),
    intermediate_size=192,
    num_attention_heads=2,
    num_key_value_heads=2,
    state_size=8,
    activation="gelu",
    norm_eps=1e-6,
    norm_eps_inside_root=False,
    tie_embeddings=True,
    attention_qkv_bias=True,
    attention_out_bias=True,
    max_length=131_072,
    tokenizer="characters",
    name="small Evo",
)
"""Evo's kind of model, small: attention in one layer of four, eight modes, characters."""


def evo2(quick: bool) -> StripedHyena:
    """The shape of Evo 2's 1B, in float32, with fresh weights; the same ones each time."""
    import torch

    from hyaena.model import StripedHyena

    config = ModelConfig.from_name("evo2-1b-base")
    if quick:
        sizes = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 128}
        groups = {"se_filter_groups": 8, "mr_filter_groups": 8}
        config = replace(config, layer_types=config.layer_types[:4], **sizes, **groups)
    torch.manual_seed(0)
    return StripedHyena(config).eval()


def size_of(model: StripedHyena) -> str:
    """The number of a model's parameters, for the name of a row."""
    from hyaena.sizes import ModelSizes

    return f"{ModelSizes(model.config).parameters / 1e6:.1f}M parameters"


def small_evo() -> StripedHyena:
    """The model of ``EVO`` with fresh weights."""
    from hyaena.model import StripedHyena

    return StripedHyena(EVO).eval()


def striped(quick: bool) -> StripedHyena:
    """The 129M model with fresh weights; the same ones each time."""
    import torch

    from hyaena.model import StripedHyena

    torch.manual_seed(0)
    return StripedHyena(TINY if quick else STRIPED).eval()


def cub() -> tuple[StripedHyena, Tokenizer]:
    """The bundled model, in float32, and its tokenizer."""
    import hyaena

    return hyaena.load("cub", dtype="float32")
