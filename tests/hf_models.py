"""Small models with every kind of layer, for the tests of ``hyaena.hf``."""

from __future__ import annotations

from dataclasses import replace

import torch

from configs import TINY, TINY_EVO, TINY_EVO2
from hyaena import StripedHyena
from hyaena.config import ModelConfig

ALL_KINDS = replace(
    TINY,
    layer_types=("hyena_se", "attention", "hyena_mr", "hyena_li", "hyena"),
    se_filter_groups=4,
    mr_filter_length=9,
    mr_filter_groups=8,
    name="tiny-kinds",
)
CONFIGS = {"sh": TINY, "evo": TINY_EVO, "evo2": TINY_EVO2, "kinds": ALL_KINDS}


def build(config: ModelConfig) -> StripedHyena:
    torch.manual_seed(0)
    model = StripedHyena(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # they begin at zero, which would hide that one is left out
                parameter.normal_(std=0.1)
    return model.eval()
