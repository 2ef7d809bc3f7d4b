"""hyaena's configuration in the words that vLLM reads, and what an engine must be able to do with a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.config_parser_base import ConfigParserBase

from hyaena import hub
from hyaena.config import MODEL_TYPE, ModelConfig, unknown_layer_kind
from hyaena.errors import ConfigError, UnsupportedError
from hyaena.formats import config_from_dict
from hyaena.fp8 import check_fp8
from hyaena.ops.fp8 import check_fp8_sizes
from hyaena.sizes import LAYER_SIZES


class HyaenaConfig(PretrainedConfig):
    """The record of ``hyaena.ModelConfig`` under ``hyaena``, and beside it the fields that vLLM asks for.

    The stripes are ``layers_block_type``, "attention" or "mamba": transformers checks ``layer_types`` against a list of
    its own. What vLLM calls mamba is any layer with a state of constant size.
    """

    model_type = "hyaena"

    def __init__(self, hyaena: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.hyaena = hyaena
        if hyaena is not None:
            c = ModelConfig.from_dict(hyaena)
            self.vocab_size = c.vocab_size
            self.hidden_size = c.hidden_size
            self.intermediate_size = c.intermediate_size
            self.num_hidden_layers = c.num_layers
            self.num_attention_heads = c.num_attention_heads
            self.num_key_value_heads = c.num_key_value_heads
            self.head_dim = c.head_dim
            self.max_position_embeddings = c.max_length
            self.layers_block_type = ["attention" if kind == "attention" else "mamba" for kind in c.layer_types]
            kwargs.setdefault("architectures", ["HyaenaForCausalLM"])
            kwargs["tie_word_embeddings"] = c.tie_embeddings
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As for any class of transformers; keys of this package, an original or ``hyaena.hf`` are taken as well."""
        if "hyaena" not in config_dict:
            dtype = config_dict.get("dtype") or config_dict.get("torch_dtype")
            config_dict = {"hyaena": config_from_dict(config_dict).to_dict()} | ({"dtype": dtype} if dtype else {})
        return super().from_dict(config_dict, **kwargs)

    def record(self) -> ModelConfig:
        """The model's own configuration."""
        assert self.hyaena is not None
        return ModelConfig.from_dict(self.hyaena)


class FolderConfig(HyaenaConfig):
    """The same for a ``config.json`` as it is, whose ``model_type`` is ``stripedhyena``."""

    model_type = MODEL_TYPE
    __init__ = HyaenaConfig.__init__  # transformers makes one for a class without its own


def register_configs() -> None:
    """Make transformers know the two classes, unless ``hyaena.hf`` has its own for the second."""
    AutoConfig.register(HyaenaConfig.model_type, HyaenaConfig, exist_ok=True)
    if MODEL_TYPE not in CONFIG_MAPPING:
        AutoConfig.register(MODEL_TYPE, FolderConfig)


class HyaenaConfigParser(ConfigParserBase):
    """``--config-format hyaena``: whatever ``hyaena.load`` takes, without a change to its files.

    Folders of this package, of the originals (``config.json``, YAML) and of transformers, weights files, and hub ids;
    what the files of published models leave out is known here (``hub.PUBLISHED``).
    """

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], PretrainedConfig]:
        record, dtype = read(str(model), revision)
        config = HyaenaConfig(hyaena=record.to_dict(), dtype=dtype)
        return config.to_dict(), config


def read(model: str, revision: str | None) -> tuple[ModelConfig, str]:
    """The configuration of anything that ``hyaena.load`` takes, and the dtype of its weights.

    Raises:
        HyaenaError: in one line, what is wrong; a layer of a kind that is not known among it.
    """
    model = given_name(model)
    if hub.is_hub_id(model) and not Path(model).exists():
        record, _ = hub.describe(model, revision=revision)
        dtype = "bfloat16"  # weights are not downloaded yet
    else:
        checkpoint = hub.locate(model, revision=revision)
        record, dtype = checkpoint.config, str(hub.checkpoints.inspect(checkpoint).dtype).removeprefix("torch.")
    for i, kind in enumerate(record.layer_types):
        if kind not in LAYER_SIZES:
            raise unknown_layer_kind(kind, i, LAYER_SIZES)
    return record, dtype


def given_name(model: str) -> str:
    """What was given for a model, where vLLM replaced a hub id by a folder of the hub's cache.

    It does so under ``HF_HUB_OFFLINE``. What is known about published models is known by their ids, the revision to
    take among it.
    """
    found = re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\][^/\\]+$", model)
    return f"{found[1]}/{found[2]}" if found and constants.HF_HUB_OFFLINE else model


class EngineCheck(VerifyAndUpdateConfig):
    """What vLLM calls before it builds an engine: refuses what cannot be computed, and chooses our loader."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        model = vllm_config.model_config
        c = model.hf_config.record()
        name, ranks = given_name(model.model), vllm_config.parallel_config.tensor_parallel_size
        if name in hub.PUBLISHED and model.config_format != "hyaena":
            raise ConfigError(f"{name}: its files leave out what hyaena knows: add --config-format hyaena")
        check_weights(c, name)
        check_ranks(c, ranks)
        check_length(c, model.max_model_len)
        check_products(c, getattr(model.hf_config, "fp8", "auto"), ranks)
        if vllm_config.load_config.load_format == "auto":
            vllm_config.load_config.load_format = "hyaena"


def check_weights(config: ModelConfig, name: str) -> None:
    """Refuse a model whose linear layers ``hyaena quantize`` made narrow.

    Raises:
        UnsupportedError: they are.
    """
    if config.weights is not None:
        raise UnsupportedError(
            f"{name}: has {config.weights} weights, which vLLM's layers do not read: serve it by `hyaena serve`, or "
            "give vLLM the model that it was made of, and --quantization"
        )


def check_products(config: ModelConfig, mode: str, ranks: int) -> None:
    """Refuse a way to compute FP8 input projections that is unknown or impossible.

    Raises:
        InputError: an unknown mode, or ``"exact"`` for a model without such projections.
        UnsupportedError: ``"exact"``, and a rank's share of a projection has no size of FP8 products.
    """
    check_fp8(mode, config.fp8_input_projections)
    if mode == "exact":
        check_fp8_sizes(3 * config.hidden_size // ranks, config.hidden_size)


def check_ranks(config: ModelConfig, ranks: int) -> None:
    """Refuse a number of tensor-parallel ranks that does not divide heads, channels and filters.

    Raises:
        UnsupportedError: it does not.
    """
    heads = config.num_key_value_heads
    divided = {
        "attention heads": config.num_attention_heads,
        "channels": config.hidden_size,
        "channels of the MLP": config.intermediate_size,
    }
    for kind, filters in (("hyena_se", config.se_filter_groups), ("hyena_mr", config.mr_filter_groups)):
        if kind in config.layer_types and filters is not None:
            divided[f"filters of {kind} layers"] = filters
    wrong = [f"{number} {what}" for what, number in divided.items() if number % ranks]
    if heads % ranks and ranks % heads:
        wrong.append(f"{heads} key/value heads")
    if wrong:
        raise UnsupportedError(
            f"tensor_parallel_size {ranks} does not divide {', '.join(wrong)}: choose a divisor, or "
            "pipeline_parallel_size for more GPUs"
        )


def check_length(config: ModelConfig, length: int) -> None:
    """Refuse a context that is longer than the model's.

    Raises:
        ConfigError: it is.
    """
    if length > config.max_length:
        raise ConfigError(
            f"max_model_len {length:,} is past the model's {config.max_length:,} tokens: set it to at most that"
        )
