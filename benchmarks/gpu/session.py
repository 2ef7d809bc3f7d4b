"""A run on a GPU: the model that its benchmarks share, and what later ones need of earlier ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from benchmarks.gpu.sizes import FULL, QUICK, Sizes
from benchmarks.registry import Session
from hyaena.bench.clock import release
from hyaena.bench.measure import Decode, Prefill
from hyaena.bench.rates import Rate, measure_bandwidth, measure_flops
from hyaena.bench.run import random_model
from hyaena.config import ModelConfig
from hyaena.model import StripedHyena


@dataclass
class GpuSession(Session):
    """See ``Session``; on a CPU, for ``--quick``, the same benchmarks run without kernels.

    Attributes:
        device: a CUDA device where there is one.
        prefills, decodes: our figures by length, and by batch and context.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    prefills: dict[int, Prefill] = field(default_factory=dict)
    decodes: dict[tuple[int, int], Decode] = field(default_factory=dict)
    _model: StripedHyena | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the model and the operator; a CPU may be slow in bfloat16."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def sizes(self) -> Sizes:
        return QUICK if self.quick else FULL

    @cached_property
    def bandwidth(self) -> Rate:
        """Of a copy, measured on first use."""
        return measure_bandwidth(self.device)

    @cached_property
    def flops(self) -> Rate:
        """Of a matrix product, measured on first use."""
        return measure_flops(self.device, self.dtype)

    @property
    def model(self) -> StripedHyena:
        """Our model of ``sizes.config`` with random weights."""
        return self.model_of(self.sizes.config)

    def model_of(self, config: ModelConfig) -> StripedHyena:
        """A model with random weights, made on first use; it takes the place of one of another configuration."""
        if self._model is None or self._model.config != config:
            self.forget_model()
            torch.manual_seed(0)
            self._model = random_model(config, self.device, self.dtype)
        return self._model

    def forget_model(self) -> None:
        """Free the model's memory."""
        self._model = None
        self.release()

    def release(self) -> None:
        release()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def fused(self) -> dict[str, str]:
        """Options of ``ops.hyena`` for the kernels, so that nothing else is timed in their place; a CPU has none."""
        return {"backend": "triton"} if self.device.type == "cuda" else {"method": "blocked"}
