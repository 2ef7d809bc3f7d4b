"""The parameters of the two filters of a Hyena block, one module per kind of long filter.

Calling the module of a long filter gives the filter itself, as ``ops.hyena`` takes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from hyaena.errors import UnsupportedError
from hyaena.ops import ExplicitFilter, ModalFilter, RealModalFilter, TableStore


class ShortFilter(nn.Module):
    """The parameters of the short depthwise filter: weight [3D,K], bias [3D] or none."""

    def __init__(self, channels: int, taps: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias: what loads or gathers parameters at a call of their module sees this one called, too."""
        return self.weight, self.bias

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Uniform taps within ±1/√K; no bias."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Float32Parameters(nn.Module):
    """A module most of whose parameters and buffers are never narrower than float32.

    They ignore ``.to(bfloat16)``, ``.half()`` and whatever else casts a model, because a pole of 0.999 has no neighbour
    in bfloat16 below 1. The declaration goes by exclusion, so that parameters under which training stores the same
    numbers are covered.

    Attributes:
        narrow: names of the parameters that follow the dtype of the model.
    """

    narrow: ClassVar[frozenset[str]] = frozenset({"skip"})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Parameters:
        wide = self.wide_tensors().values()
        precise = {id(t) for p in wide for t in (p, p.grad) if t is not None}

        def apply(t: Tensor) -> Tensor:
            out = fn(t)
            if id(t) in precise and out.dtype.is_floating_point and out.dtype.itemsize < 4:
                return t.to(out.device)
            return out

        return super()._apply(apply, recurse)

    def wide_tensors(self) -> dict[str, Tensor]:
        """The parameters and buffers that are never narrower, by name."""
        tensors = [*self.named_parameters(), *self.named_buffers()]
        return {name: tensor for name, tensor in tensors if name not in self.narrow}

    def _float32(self, *names: str) -> tuple[Tensor, ...]:
        """These parameters; refuses them where something that is no cast of the module has narrowed them."""
        tensors = tuple(getattr(self, name) for name in names)
        for name, tensor in zip(names, tensors, strict=True):
            if tensor.dtype.itemsize < 4:
                raise UnsupportedError(
                    f"the {name} of a {type(self).__name__} are {str(tensor.dtype).removeprefix('torch.')} and must be "
                    "float32 or wider: under FSDP, make every long filter a unit of its own without mixed precision "
                    "(docs/training.md)"
                )
        return tensors


class LongFilter(Float32Parameters):
    """Complex modes: poles and residues as real pairs [F,N,2], always float32 or wider; skip [D].

    Filter f of F serves the D/F neighbouring channels from f·D/F on.
    """

    def __init__(self, channels: int, modes: int, *, groups: int | None = None) -> None:
        super().__init__()
        filters = groups or channels
        self.poles = nn.Parameter(torch.empty(filters, modes, 2, dtype=torch.float32))
        self.residues = nn.Parameter(torch.empty(filters, modes, 2, dtype=torch.float32))
        self.skip = nn.Parameter(torch.empty(channels))
        self._tables = TableStore()

    def forward(self) -> ModalFilter:
        """The filter in tensors that own their memory: FSDP frees the storage of parameters before backward."""
        poles, residues = (torch.complex(*pair.unbind(-1)) for pair in self._float32("poles", "residues"))
        return self._tables.attach(ModalFilter(poles, residues, self.skip.clone()))

    def view(self) -> ModalFilter:
        """The filter over the storage of the parameters, for inference: nothing is copied."""
        poles, residues = self._float32("poles", "residues")
        return ModalFilter(torch.view_as_complex(poles), torch.view_as_complex(residues), self.skip)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Poles after S4D-Lin (Gu et al. 2022): ``p = exp(dt·(-1/2 + iπn))``, dt log-uniform in [1e-3, 0.1] per filter.

        So time constants are 20 to 2,000 steps. Residues are random with ``E|R|² = (1-|p|²)/N``, so that white noise
        keeps its power (the normalisation of Orvieto et al. 2023, "Resurrecting Recurrent Neural Networks").
        """
        modes = self.poles.shape[1]
        nn.init.ones_(self.skip)
        nn.init.uniform_(self.poles, math.log(1e-3), math.log(0.1), generator=generator)
        dt = self.poles[:, :1, 0].exp()  # one draw per filter
        phase = torch.arange(modes, dtype=dt.dtype, device=dt.device) * torch.pi
        poles = torch.polar(torch.exp(-0.5 * dt).expand(-1, modes), dt * phase)
        self.poles.copy_(torch.view_as_real(poles))
        nn.init.normal_(self.residues, std=(0.5 / modes) ** 0.5, generator=generator)
        self.residues.mul_((1 - torch.exp(-dt)).sqrt().unsqueeze(-1))


class RealLongFilter(Float32Parameters):
    """Real modes: log_poles and residues [F,N], always float32 or wider; skip [D]. The poles are ``exp(log_poles)``."""

    def __init__(self, channels: int, modes: int, *, groups: int | None = None) -> None:
        super().__init__()
        filters = groups or channels
        self.log_poles = nn.Parameter(torch.empty(filters, modes, dtype=torch.float32))
        self.residues = nn.Parameter(torch.empty(filters, modes, dtype=torch.float32))
        self.skip = nn.Parameter(torch.empty(channels))
        self._tables = TableStore()

    def forward(self) -> RealModalFilter:
        log_poles, residues = self._float32("log_poles", "residues")
        return self._tables.attach(RealModalFilter(log_poles.clone(), residues.clone(), self.skip.clone()))

    def view(self) -> RealModalFilter:
        log_poles, residues = self._float32("log_poles", "residues")
        return RealModalFilter(log_poles, residues, self.skip)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Rates log-uniform in [1e-3, 0.1], so time constants of 10 to 1,000 steps; residues that keep the power."""
        nn.init.ones_(self.skip)
        nn.init.uniform_(self.log_poles, math.log(1e-3), math.log(0.1), generator=generator)
        self.log_poles.copy_(-self.log_poles.exp())
        nn.init.normal_(self.residues, std=self.residues.shape[1] ** -0.5, generator=generator)
        self.residues.mul_((1 - torch.exp(2 * self.log_poles)).sqrt())


class ExplicitLongFilter(nn.Module):
    """Explicit taps [F,W], the first for the current step; skip [D] or none."""

    def __init__(self, channels: int, taps: int, *, groups: int | None = None, skip: bool) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.empty(groups or channels, taps))
        self.skip = nn.Parameter(torch.empty(channels)) if skip else None

    def forward(self) -> ExplicitFilter:
        return ExplicitFilter(self.taps.clone(), None if self.skip is None else self.skip.clone())

    def view(self) -> ExplicitFilter:
        return ExplicitFilter(self.taps, self.skip)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal taps of standard deviation 1/√W, so that white noise keeps its power."""
        nn.init.normal_(self.taps, std=self.taps.shape[1] ** -0.5, generator=generator)
        if self.skip is not None:
            nn.init.ones_(self.skip)
