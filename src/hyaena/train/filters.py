"""Trains poles by decay and phase, so that no step of an optimizer takes a stable filter out of the unit circle.

The model stores raw poles (re, im). An optimizer that moves those can step outside the unit circle, where the filter
grows without bound. So each pole p is trained relative to the pole p₀ that it starts at,

    p = p₀ · exp(-s·(exp(α) - 1) + iφ),        s = max(|log|p₀||, RATE_MIN), up to rounding,

with α and φ free and 0 at the start. Equal steps in α are equal relative steps in the time constant, as in S4D (Gu et
al., "On the Parameterization and Initialization of Diagonal State Space Models", 2022). Two things hold exactly:

- at the start p is p₀ to the last bit, so a model that is fine-tuned begins with the checkpoint's own logits;
- a pole that starts inside the unit circle, by RATE_MIN or more, stays inside for every α and φ.

Poles on or outside the circle, as some published checkpoints have them, are kept too. Training may pull them inside;
the logarithm of their radius never grows past twice its start.

The model knows nothing of it: this is a ``torch.nn.utils.parametrize`` parametrization from outside, and
``plain_state_dict`` gives the raw poles back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hyaena.filters import LongFilter, RealLongFilter
from hyaena.model import StripedHyena

RATE_MIN = 1e-6
"""Slowest decay per step. Far slower than any context (a million steps), and 16 float32 roundings away from 1."""

RATE_MAX = math.exp(3.0)
"""Largest decay rate that is a start: exp(-20) is 2e-9, which no output shows."""

_MARGIN = 4e-7
"""Share of s that makes room for the rounding of the exponent, two float32 roundings of 6e-8 and some."""

_ALPHA_MAX = 12.0
"""α beyond which a pole is not faster, so that exp and its gradient stay finite."""


class _Float32Buffers(nn.Module):
    """A parametrization whose buffers stay float32 when a model is cast, like the parameters that they describe."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Float32Buffers:
        def keep_wide(t: Tensor) -> Tensor:
            out = fn(t)
            narrowed = out.dtype.is_floating_point and out.dtype.itemsize < 4
            return t.to(out.device) if narrowed else out

        return super()._apply(keep_wide, recurse)


class DecayAndPhase(_Float32Buffers):
    """Maps (α, φ), each [F,N] and 0 at the start, to complex poles [F,N,2].

    Args:
        poles: [F,N,2], the poles at the start.
    """

    start: Tensor
    scale: Tensor

    def __init__(self, poles: Tensor) -> None:
        super().__init__()
        poles = poles.detach()
        # float64: near the circle, log|p| in float32 would lose most digits of the rate.
        rate = -torch.log(torch.hypot(*poles.double().unbind(-1)))
        inside = (rate * (1 - _MARGIN) - RATE_MIN).clamp(max=RATE_MAX)
        scale = torch.where(inside > 0, inside, rate.abs().clamp(min=RATE_MIN))
        self.register_buffer("start", poles.clone())
        self.register_buffer("scale", scale.to(poles.dtype))

    def forward(self, alpha: Tensor, phase: Tensor) -> Tensor:
        radius = torch.exp(-self.scale * torch.expm1(alpha.clamp(max=_ALPHA_MAX)))
        cos, sin = radius * torch.cos(phase), radius * torch.sin(phase)
        real, imaginary = self.start.unbind(-1)
        return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)

    def right_inverse(self, poles: Tensor) -> tuple[Tensor, Tensor]:
        """Return the parameters of the start, whatever ``poles`` are: a parametrization begins where it was made."""
        return torch.zeros_like(poles[..., 0]), torch.zeros_like(poles[..., 0])


class Decay(_Float32Buffers):
    """Maps α [F,N], 0 at the start, to the logarithms λ = λ₀ - |λ₀|·(exp(α) - 1) of real poles.

    A negative λ₀ (a pole inside) gives λ₀·exp(α), which is never positive.

    Args:
        log_poles: [F,N], λ₀.
    """

    start: Tensor

    def __init__(self, log_poles: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", log_poles.detach().clone())

    def forward(self, alpha: Tensor) -> Tensor:
        grown = torch.expm1(alpha.clamp(max=_ALPHA_MAX))
        scale = torch.where(self.start < 0, -self.start, self.start.clamp(min=RATE_MIN))
        return self.start - scale * grown

    def right_inverse(self, log_poles: Tensor) -> Tensor:
        """Return the parameters of the start: see ``DecayAndPhase``."""
        return torch.zeros_like(log_poles)


@dataclass(frozen=True)
class PolesOutside:
    """The poles of a model on or outside the unit circle.

    Attributes:
        count: how many there are.
        total: poles of the model.
        layers: the layers that have some, by index.
        largest_radius: the largest |p|.
    """

    count: int
    total: int
    layers: tuple[int, ...]
    largest_radius: float

    def __str__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        return (
            f"{self.count:,} of {self.total:,} poles start on or outside the unit circle, up to |p| = "
            f"{self.largest_radius:.7g}, in layer{'s' * (len(self.layers) > 1)} {layers}"
        )


def poles_outside(model: StripedHyena) -> PolesOutside:
    """Find the poles with |p| >= 1."""
    count = total = 0
    layers, largest = [], 0.0
    for index, layer in enumerate(model.layers):
        for module in layer.modules():
            if isinstance(module, LongFilter):
                radius = module.poles.detach().double().norm(dim=-1)
            elif isinstance(module, RealLongFilter):
                radius = module.log_poles.detach().double().exp()
            else:
                continue
            outside = int((radius >= 1).sum())
            count, total = count + outside, total + radius.numel()
            largest = max(largest, float(radius.max()))
            if outside:
                layers.append(index)
    return PolesOutside(count, total, tuple(layers), largest)


def parametrize_filters(model: nn.Module) -> None:
    """Make every long filter of modes train on decay and phase, starting at exactly its present poles."""
    for module in list(model.modules()):
        if isinstance(module, LongFilter):
            parametrize.register_parametrization(module, "poles", DecayAndPhase(module.poles))
        elif isinstance(module, RealLongFilter):
            parametrize.register_parametrization(module, "log_poles", Decay(module.log_poles))


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the model as it was before ``parametrize_filters``, with raw poles."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ".parametrizations." not in name}
    for name, module in model.named_modules():
        if isinstance(module, (LongFilter, RealLongFilter)):
            poles = "poles" if isinstance(module, LongFilter) else "log_poles"
            state[f"{name}.{poles}"] = getattr(module, poles).detach()
    return state
