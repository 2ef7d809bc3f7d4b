"""The other baseline: llama.cpp, through llama-cpp-python's C interface, with the weights of our Mistral.

``write_gguf`` writes them through gguf-py, which also rounds to the blocks of 8 and 4 bits. ``LlamaCpp`` evaluates a
file as llama.cpp does unless told otherwise: passes of 512 tokens, flash attention, keys and values in float16.
"""

from __future__ import annotations

import ctypes
import importlib.util
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.mistral import Mistral
from benchmarks.registry import MissingError

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""Parts of a layer in transformers and in llama.cpp."""
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

PASS = 512
"""Tokens of a pass, llama.cpp's own choice (``n_ubatch``)."""


def require_llama() -> None:
    """Raise MissingError unless llama.cpp and what writes its file are installed."""
    missing = [name for name in ("llama_cpp", "gguf", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingError(f"{' and '.join(missing)} not installed; benchmarks/README.md says how")


def require_survival(path: Path, threads: int) -> None:
    """Raise MissingError if llama.cpp ends the process that reads a prompt by this file; one of its own reads it."""
    command = [sys.executable, "-m", "benchmarks.llama", str(path), str(threads)]
    code = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode
    if code < 0:
        raise MissingError(
            f"llama.cpp ended by {signal.Signals(-code).name} as it read a prompt by {path.name}; benchmarks/README.md "
            "says how to build it without AMX"
        )


def write_gguf(baseline: Mistral, path: Path, kind: str, head: str | None = None) -> None:
    """Write a Mistral for llama.cpp; norms are float32.

    Args:
        baseline: in float32.
        path: of the file.
        kind: of the matrices: ``"F32"``, ``"BF16"``, ``"Q8_0"`` or ``"Q4_0"``.
        head: of the last matrix, if another.
    """
    import gguf  # pyright: ignore[reportMissingImports]

    config = baseline.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("none")
    for name, weight in baseline.model.state_dict().items():
        theirs, kept = _renamed(name, weight, config)
        chosen = "F32" if kept.ndim == 1 else head if head and theirs.startswith("output") else kind
        block = gguf.GGMLQuantizationType[chosen]
        writer.add_tensor(theirs, gguf.quantize(kept.numpy(), block), raw_dtype=block)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _renamed(name: str, weight: Tensor, config: Any) -> tuple[str, Tensor]:
    """A tensor as llama.cpp names it.

    Its rotary positions turn neighbouring rows of a head, 2i and 2i+1, where transformers' turn rows i and i + d/2.
    """
    if (outer := OUTER.get(name.removesuffix(".weight"))) is not None:
        return f"{outer}.weight", weight
    _, _, index, part = name.removesuffix(".weight").split(".", 3)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(NAMES[part])
    if heads is not None:
        weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
    return f"blk.{index}.{NAMES[part]}.weight", weight


@torch.no_grad()
def round_weights(baseline: Mistral, kind: str, head: str | None = None) -> None:
    """Give a Mistral the numbers that ``write_gguf`` stores of it, in place."""
    import gguf  # pyright: ignore[reportMissingImports]

    for name, weight in baseline.model.state_dict().items():
        if weight.ndim > 1:
            block = gguf.GGMLQuantizationType[head if head and name == "lm_head.weight" else kind]
            weight.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), block), block)))


class LlamaCpp:
    """A GGUF file in llama.cpp on a CPU.

    Args:
        path: of the file.
        context: the most tokens that it remembers.
        threads: of prompts and of steps.
        exact: attention in float32, with keys and values in float32; by default both are float16.
    """

    def __init__(self, path: Path, context: int, *, threads: int, exact: bool = False) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self.api: Any = llama_cpp
        self._log = self.api.llama_log_callback(lambda *_: None)
        self.api.llama_log_set(self._log, ctypes.c_void_p(0))
        self.model = self.api.llama_model_load_from_file(str(path).encode(), self.api.llama_model_default_params())
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, PASS, PASS
        params.n_threads = params.n_threads_batch = threads
        if exact:
            params.type_k = params.type_v = 0  # GGML_TYPE_F32
            params.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = self.api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp does not take {path.name}")
        vocab = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        self._row = ctypes.POINTER(ctypes.c_float * vocab)

    def read(self, ids: list[int]) -> Tensor:
        """Read tokens after those that are remembered; logits [V] after the last. Valid until the next call."""
        for start in range(0, len(ids), PASS):
            part = ids[start : start + PASS]
            tokens = (self.api.llama_token * len(part))(*part)
            if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(part))):
                raise RuntimeError("llama.cpp could not read the tokens")
        found = self.api.llama_get_logits_ith(self.context, -1)
        return torch.frombuffer(ctypes.cast(found, self._row).contents, dtype=torch.float32)

    def rewind(self, length: int) -> None:
        """Forget what came after the first ``length`` tokens."""
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.context), 0, length, -1)

    def close(self) -> None:
        """Give back its memory."""
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)


if __name__ == "__main__":  # see require_survival
    LlamaCpp(Path(sys.argv[1]), PASS, threads=int(sys.argv[2])).read([0] * PASS)
