"""A tiny model of each family, and engines to compare with it."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

import hyaena
from hyaena import checkpoints
from hyaena.config import ModelConfig
from hyaena.fp8 import FP8Linear

SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}
EVO1: dict[str, Any] = {
    "layer_types": ("hyena", "hyena", "attention", "hyena"),
    "num_key_value_heads": 4,
    "state_size": 8,
    "norm_eps": 1e-6,
    "norm_eps_inside_root": False,
    "rope_scaling_factor": 16.0,
    "attention_qkv_bias": True,
    "attention_out_bias": True,
    "activation": "gelu",
    "tie_embeddings": True,
    "tokenizer": "characters",
}
EVO2: dict[str, Any] = {
    "layer_types": ("hyena_se", "hyena_mr", "hyena_li", "attention", "hyena_se", "hyena_mr", "hyena_li"),
    "num_key_value_heads": 4,
    "state_size": 16,
    "se_filter_groups": 16,
    "mr_filter_groups": 16,
    "norm_eps": 1e-6,
    "norm_eps_inside_root": False,
    "activation": "identity",
    "first_activation": "gelu",
    "tie_embeddings": True,
    "hyena_in_bias": False,
    "short_filter_bias": False,
    "fp8_input_projections": True,
    "attention_out_bias": True,
    "rope_frequencies_stored": True,
    "rope_tables_rounded": True,
    "rope_scaling_factor": 2.0,
    "tokenizer": "characters",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "sh": {"layer_types": ("hyena", "attention") * 2, "num_key_value_heads": 2, "state_size": 2},
    "evo1": EVO1,
    "evo2": EVO2,
    "kinds": EVO2 | {"layer_types": ("hyena", "hyena_se", "hyena_mr", "hyena_li", "attention")},
    "evo2 twice": EVO2 | {"layer_types": ("hyena_se", "hyena_mr", "hyena_li", "attention") * 2},
}
CUB = Path(hyaena.__file__).parent / "cub"
LENGTHS = (1, 2, 5, 63, 64, 65, 200, 17, 130, 3, 33)


def config(family: str, **changes: Any) -> ModelConfig:
    return ModelConfig(**SIZES | {"max_length": 2048, "tokenizer": "bytes"} | FAMILIES[family] | changes)


def make(family: str, scale: float = 3.0) -> hyaena.StripedHyena:
    """A model whose most probable tokens depend on all that it read: large weights, biases that are not zero.

    With a smaller ``scale`` it soon says the same again and again.
    """
    if family == "cub":
        return hyaena.load("cub")[0]
    model = hyaena.StripedHyena(config(family))
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name or "embed" in name:
                parameter.mul_(scale)
            if name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=generator)
        for module in model.modules():
            if isinstance(module, FP8Linear):
                module.fit_scale()
        if model.rotary.frequencies is not None:
            model.rotary.frequencies.mul_(1.25)  # those of the file, and no others, give the tokens
    return model.eval()


def folder_of(family: str, place: Path, layout: str = "hyaena", scale: float = 3.0) -> Path:
    if family == "cub":
        return CUB
    return checkpoints.save_model(make(family, scale), place / f"{family}-{layout}".replace(" ", "-"), layout=layout)  # type: ignore[arg-type]


def random_prompts(model: hyaena.StripedHyena, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, min(256, model.config.vocab_size), (n,), generator=generator).tolist() for n in lengths]


@torch.inference_mode()
def own_tokens(model: hyaena.StripedHyena, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Greedy tokens of hyaena itself, one prompt at a time."""
    found = []
    for prompt in prompts:
        cache, ids, tokens = model.make_cache(1), torch.tensor([prompt]), []
        for _ in range(count):
            ids = model(ids, cache=cache, logits_to_keep=1)[0, -1].argmax().view(1, 1)
            tokens.append(int(ids))
        found.append(tokens)
    return found


def write_adapter(model: hyaena.StripedHyena, folder: Path) -> Path:
    """Write a LoRA adapter of rank 8 for every linear layer, of random numbers, in PEFT's format."""
    generator, tensors = torch.Generator().manual_seed(3), dict[str, torch.Tensor]()
    targets = ("qkv_proj", "o_proj", "in_proj", "out_proj", "gate_proj", "up_proj", "down_proj")
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        if layer.endswith(targets):
            for letter, shape in (("A", (8, parameter.shape[1])), ("B", (parameter.shape[0], 8))):
                number = torch.randn(shape, generator=generator) * 0.2
                tensors[f"base_model.model.model.{layer}.lora_{letter}.weight"] = number
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": list(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@contextmanager
def engine(folder: Path | str, **changes: Any) -> Iterator[LLM]:
    """An engine on the CPU, closed at the end. Prompts are read 64 tokens at a time, of all sequences together."""
    options: dict[str, Any] = {
        "config_format": "hyaena",
        "tokenizer_mode": "hyaena",
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "max_model_len": 1024,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "kv_cache_memory_bytes": 64 * 2**20,
        "disable_log_stats": False,
    }
    made = [LLM(str(folder), **options | changes)]
    try:
        yield made[0]
    finally:
        close(made)


def close(engines: list[LLM]) -> None:
    """Close an engine, which the list must hold alone, so that another can start in this process."""
    engines.pop().llm_engine.engine_core.shutdown()
    gc.collect()
    cleanup_dist_env_and_memory()


def tokens(llm: LLM, prompts: Sequence[Sequence[int]], count: int, **options: Any) -> tuple[list[list[int]], int]:
    """Greedy tokens of an engine, and how many tokens of the prompts it found in its prefix cache."""
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    out = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], sampling, use_tqdm=False, **options)
    return [list(o.outputs[0].token_ids) for o in out], sum(o.num_cached_tokens or 0 for o in out)


def metric(llm: LLM, name: str) -> float:
    return sum(getattr(m, "value", 0) for m in llm.get_metrics() if name in m.name)
