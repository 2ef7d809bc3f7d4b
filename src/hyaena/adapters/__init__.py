"""LoRA adapters: small trained updates of a model's linear layers, read, merged, attached, trained and written.

An adapter is a folder in PEFT's format (``adapter_config.json``, ``adapter_model.safetensors``). For a linear layer of
weight W [E,D] it holds A [r,D], B [E,r] and a scale: ``y = W·x + scale·B·(A·x)``. There are two ways to use it:

- :func:`merge_adapter` adds it to the weights, in place. Nothing is slower afterwards. The sum is rounded to the dtype
  of the weights, so it cannot be undone exactly: load the model again for the weights without it.
- :func:`with_adapter` gives a second model over the same weights, whose linear layers compute their update beside
  them. One model in memory serves any number of adapters, each a model of its own.

:func:`add_adapter` begins a new one for training, and :func:`save_adapter` writes it.
"""

from hyaena.adapters.lora import (
    TARGETS,
    LoRALinear,
    adapter_of,
    add_adapter,
    check_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
    with_adapter,
)
from hyaena.adapters.peft import Adapter, Update, read_adapter

__all__ = [
    "TARGETS",
    "Adapter",
    "LoRALinear",
    "Update",
    "adapter_of",
    "add_adapter",
    "check_adapter",
    "merge_adapter",
    "read_adapter",
    "remove_adapter",
    "save_adapter",
    "with_adapter",
]
