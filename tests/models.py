"""Models for tests whose logits differ: fresh weights give nearly equal ones."""

from __future__ import annotations

import torch
from torch import nn

from hyaena.config import ModelConfig
from hyaena.layers import MIXERS, Mixers
from hyaena.model import StripedHyena


@torch.no_grad()
def spread(config: ModelConfig, *, mixers: Mixers = MIXERS, std: float = 0.3) -> StripedHyena:
    """A model with large random weights, in evaluation mode; its filters are as they are initialised."""
    model = StripedHyena(config, mixers=mixers).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=std)
    return model
