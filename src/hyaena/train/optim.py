"""AdamW with the groups that striped models need, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hyaena.filters import ExplicitLongFilter, LongFilter, RealLongFilter
from hyaena.train.config import OptimConfig


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Three groups that together hold every trainable parameter once.

    ``matrices``: the weights of linear layers and embeddings, the only parameters with weight decay. ``filters``:
    everything inside a long filter (poles however they are parametrised, residues, taps, skip), with its own learning
    rate. ``vectors``: all the rest (norms, biases, short filters). What is decayed is chosen by the type of its
    module and everything else is not, so a new kind of parameter is never decayed by accident. Decay of poles and
    residues pulls memory towards zero length, which is no regulariser: published fine-tuning without it did better.
    Each group carries its ``name`` and its ``lr_ratio``, the factor on the scheduled learning rate.
    """
    roles: dict[Tensor, str] = {}
    for module in model.modules():
        if isinstance(module, (LongFilter, RealLongFilter, ExplicitLongFilter)):
            roles.update((parameter, "filters") for parameter in module.parameters())
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            roles[module.weight] = "matrices"
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "filters": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[roles.get(parameter, "vectors")].append(parameter)
    decay = {"matrices": config.weight_decay, "vectors": 0.0, "filters": 0.0}
    ratio = {"matrices": 1.0, "vectors": 1.0, "filters": config.filter_lr_ratio}
    return [
        {"name": name, "params": params, "weight_decay": decay[name], "lr_ratio": ratio[name]}
        for name, params in groups.items()
        if params
    ]


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over ``parameter_groups``; one fused kernel per group where the parameters are on a GPU."""
    fused = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW(
        parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps, fused=fused
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a saved state into an optimizer of the same parameters.

    Raises:
        LookupError, TypeError, ValueError, AttributeError, RuntimeError: it is not the state of such an optimizer.
    """
    options = [group.keys() for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    if [group.keys() for group in optimizer.param_groups] != options:
        raise ValueError("other options of the parameter groups")
    for parameter, values in optimizer.state.items():
        for value in values.values():
            # The first step of a wrong shape would fail, or broadcast.
            if isinstance(value, Tensor) and value.shape not in ((), parameter.shape):
                raise ValueError(f"a moment of shape {list(value.shape)} for a parameter of {list(parameter.shape)}")


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of optimizer step ``step`` (from 0) of ``steps``.

    Linear from ``lr / warmup_steps`` to ``lr``, then half a cosine that reaches ``lr * min_lr_ratio`` at the last step.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine)
