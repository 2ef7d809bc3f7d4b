"""Poles that cannot leave the unit circle while they are trained.

The model stores raw poles (re, im). An optimiser that moves those can step outside the unit circle, where the
filter grows without bound. So a long filter is trained on the decay rate and the phase of each pole,

    p = exp(-rate + iθ),        rate = RATE_MIN + exp(min(a, A_MAX)),

with ``a`` and ``θ`` free: |p| < 1 for every value of the parameters, and equal relative steps in time constants
(1 / rate) for equal steps in ``a``. The form is that of S4D (Gu et al., "On the Parameterization and Initialization
of Diagonal State Space Models", 2022). The model knows nothing of it: this is a ``torch.nn.utils.parametrize``
parametrisation from outside, and ``plain_state_dict`` gives the raw poles back.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hyaena.model import LongFilter

RATE_MIN = 1e-6
"""Slowest decay per step. Far slower than any context (a million steps), and 16 float32 roundings away from 1."""

A_MAX = 3.0
"""``a`` beyond which a pole is not faster: exp(-exp(3)) is 2e-9. So exp and its gradient stay finite."""


class DecayAndPhase(nn.Module):
    """Maps (a, θ), each [D,N], to poles [D,N,2]; ``right_inverse`` maps raw poles back.

    Poles on or outside the unit circle, as some published checkpoints have them, are taken to its inner edge by
    ``right_inverse``, their phase kept.
    """

    def forward(self, a: Tensor, phase: Tensor) -> Tensor:
        radius = torch.exp(-RATE_MIN - torch.exp(a.clamp(max=A_MAX)))
        return torch.stack([radius * torch.cos(phase), radius * torch.sin(phase)], dim=-1)

    def right_inverse(self, poles: Tensor) -> tuple[Tensor, Tensor]:
        real, imaginary = poles.double().unbind(-1)
        # float64: near the circle, log|p| in float32 would lose most digits of the rate.
        rate = -torch.log(torch.hypot(real, imaginary))
        a = torch.log((rate - RATE_MIN).clamp(min=RATE_MIN, max=math.exp(A_MAX)))
        return a.to(poles.dtype), torch.atan2(imaginary, real).to(poles.dtype)


def parametrize_filters(model: nn.Module) -> None:
    """Make every ``LongFilter`` of the model train on decay and phase, starting at its present poles."""
    for module in list(model.modules()):
        if isinstance(module, LongFilter):
            parametrize.register_parametrization(module, "poles", DecayAndPhase())


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model as it was before ``parametrize_filters``, with raw poles."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ".parametrizations." not in name}
    for name, module in model.named_modules():
        if isinstance(module, LongFilter):
            state[f"{name}.poles"] = module.poles.detach()
    return state
