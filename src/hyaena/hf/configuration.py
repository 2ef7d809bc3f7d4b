"""``StripedHyenaConfig``: the configuration of a model in the words of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from hyaena import formats, hub
from hyaena.config import MODEL_TYPE, ModelConfig
from hyaena.formats.transformers import config as keys
from hyaena.formats.transformers.code import AUTO_MAP

SPECIAL_IDS = {
    "bytes": {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258},
    "characters": {"eos_token_id": 0, "pad_token_id": 1},
}
"""The special tokens of tokenizers without a file (``hyaena.tokenizers``)."""


class StripedHyenaConfig(PreTrainedConfig):
    """The architecture of a StripedHyena model.

    The defaults are those of StripedHyena-Hessian-7B. What the fields mean is told by ``hyaena.ModelConfig``, under
    these names there: ``layer_kinds`` is ``layer_types``, ``hidden_act`` ``activation``, ``first_hidden_act``
    ``first_activation``, ``rms_norm_eps`` ``norm_eps``,
    ``rms_norm_eps_inside_root`` ``norm_eps_inside_root``, ``tie_word_embeddings`` ``tie_embeddings``,
    ``max_position_embeddings`` ``max_length``, and ``rope_parameters`` holds ``rope_theta`` and, as ``factor``,
    ``rope_scaling_factor``. Without ``layer_kinds``, ``num_hidden_layers`` layers alternate, a Hyena block first.

    Raises:
        ConfigError: naming every value that cannot be used, and what it should be.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    default_theta = 500_000.0

    vocab_size: int = 32_000
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    layer_kinds: list[str] | None = None
    intermediate_size: int = 14_336
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    state_size: int = 2
    short_filter_length: int = 3
    se_filter_length: int = 7
    se_filter_groups: int | None = None
    mr_filter_length: int = 128
    mr_filter_groups: int | None = None
    se_filter_skip: bool = False
    mr_filter_skip: bool = True
    hyena_in_bias: bool = True
    short_filter_bias: bool = True
    hyena_out_bias: bool = True
    fp8_input_projections: bool = False
    hidden_act: str = "silu"
    first_hidden_act: str | None = None
    rms_norm_eps: float = 1e-5
    rms_norm_eps_inside_root: bool = True
    tie_word_embeddings: bool = False
    attention_qkv_bias: bool = False
    attention_out_bias: bool = False
    rope_parameters: dict | None = None
    rope_frequencies_stored: bool = False
    rope_tables_rounded: bool = False
    max_position_embeddings: int = 32_768
    column_split_hyena: bool = True
    prefill_style: str = "auto"
    tokenizer: str = "hf"
    vocab_file: str | None = None
    name: str = "striped-hyena"
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_kinds is None:
            self.layer_kinds = ["attention" if i % 2 else "hyena" for i in range(self.num_hidden_layers)]
        self.layer_kinds = list(self.layer_kinds)
        self.num_hidden_layers = len(self.layer_kinds)
        if self.bos_token_id is self.eos_token_id is self.pad_token_id is None:
            for name, token in SPECIAL_IDS.get(self.tokenizer, {}).items():
                setattr(self, name, token)
        super().__post_init__(**kwargs)
        self.to_native()

    @property
    def layer_types(self) -> list[str]:
        """The kinds of layers as transformers tells them apart: with keys and values, or with a state."""
        kinds = self.layer_kinds or ()
        return ["full_attention" if kind == "attention" else "linear_attention" for kind in kinds]

    def to_native(self) -> ModelConfig:
        """The same architecture as a configuration of this package.

        Raises:
            ConfigError: a value cannot be used.
        """
        values = {key: getattr(self, key) for key in (*keys.RENAMED, "rope_parameters")}
        return keys.read_config(values)

    @classmethod
    def from_native(cls, config: ModelConfig, **options: Any) -> StripedHyenaConfig:
        """A configuration of this package in the words of transformers; options are further fields of this class."""
        return cls(**{**keys.write_config(config), **options})

    def to_dict(self) -> dict[str, Any]:
        """All keys of ``config.json``, with those that name the classes where ``hyaena.hf`` is not imported."""
        return super().to_dict() | {"auto_map": dict(AUTO_MAP)}

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: transformers would copy the source of this class into each folder that is saved."""

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """A configuration from its keys: those of this class, of this package, or of the original's hub checkpoints.

        What the published configurations leave out is filled in where ``name_or_path`` is the id of such a model.

        Raises:
            ConfigError: keys that are unknown, missing, ill-typed, contradictory or unsupported, each with its fix.
        """
        values = dict(config_dict)
        if is_foreign(values):
            native = formats.config_from_dict(values)
            name = str(kwargs.get("name_or_path", ""))
            if hub.is_hub_id(name):
                native = hub.corrected(name, native)
            kept = ("num_labels", "id2label", "label2id", "problem_type", "dtype", "torch_dtype")
            values = keys.write_config(native) | {key: values[key] for key in kept if key in values}
        return super().from_dict(values, **kwargs)


def is_foreign(values: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is in the keys of another layout: this package's own, or the original's."""
    return "format" in values or (not keys.matches_config(values) and formats.is_original(values))
