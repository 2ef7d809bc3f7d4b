"""Weights for vLLM: any checkpoint that ``hyaena.load`` takes, one tensor at a time, under our names."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from vllm.config import ModelConfig as EngineModelConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from hyaena import hub
from hyaena.checkpoints import check_names_and_shapes, stream_tensors
from hyaena.vllm.config import given_name


class HyaenaLoader(DefaultModelLoader):
    """``--load-format hyaena``, which the plugin sets in place of ``auto``."""

    def __init__(self, load_config) -> None:  # type: ignore[no-untyped-def]
        super().__init__(load_config)

    def download_model(self, model_config: EngineModelConfig) -> None:
        hub.locate(given_name(model_config.model), revision=model_config.revision)

    def get_all_weights(self, model_config: EngineModelConfig, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Our name and tensor of everything that the checkpoint has; names and shapes are compared first."""
        checkpoint = hub.locate(given_name(model_config.model), revision=model_config.revision)
        check_names_and_shapes(checkpoint)
        yield from stream_tensors(checkpoint)
