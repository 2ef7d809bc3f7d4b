"""StripedHyena models in vLLM, as a plugin: vLLM finds ``register`` by the entry point ``vllm.general_plugins``.

    vllm serve FOLDER --config-format hyaena --tokenizer-mode hyaena

vLLM calls ``register`` in every process (front end, engine, workers, and the process that inspects model classes), so
it can be called again, and imports no model: it names the model's class by a text.
"""

from __future__ import annotations

import logging

from hyaena.vllm.versions import check_versions, supported

ARCHITECTURE = "HyaenaForCausalLM"
OPERATOR = "vllm::hyaena_mixer"

__all__ = ["ARCHITECTURE", "check_versions", "register"]

logger = logging.getLogger(__name__)


def register() -> None:
    """Make vLLM know StripedHyena models: configurations, weights, tokenizers, and the model's class.

    In a vLLM of another version only the class is registered, which then says what is wrong in one line: vLLM calls
    this function whatever model it serves, and others must not suffer.

    Raises:
        UnsupportedError: vLLM is not installed.
    """
    if not supported():
        check_versions(missing_only=True)
        from vllm import ModelRegistry

        ModelRegistry.register_model(ARCHITECTURE, "hyaena.vllm.model:HyaenaForCausalLM")
        return
    from vllm import ModelRegistry
    from vllm.config import CompilationConfig
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.transformers_utils.config import register_config_parser

    from hyaena.vllm.config import EngineCheck, HyaenaConfigParser, register_configs
    from hyaena.vllm.loader import HyaenaLoader

    if ARCHITECTURE in MODELS_CONFIG_MAP:
        return
    register_configs()
    register_config_parser("hyaena")(HyaenaConfigParser)
    register_model_loader("hyaena")(HyaenaLoader)
    TokenizerRegistry.register("hyaena", "hyaena.vllm.tokenizer", "HyaenaTokenizer")
    RENDERER_REGISTRY.register("hyaena", "vllm.renderers.hf", "HfRenderer")
    ModelRegistry.register_model(ARCHITECTURE, "hyaena.vllm.model:HyaenaForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = EngineCheck
    # Piecewise CUDA graphs are cut at these operators. The list is copied when an engine starts.
    if OPERATOR not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(OPERATOR)
