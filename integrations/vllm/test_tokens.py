"""Tokens of vLLM's engine on a CPU, in float32 and greedy, against those of hyaena itself: equal, one by one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.vllm import cases
from integrations.vllm.cases import (
    CUB,
    engine,
    folder_of,
    make,
    metric,
    own_tokens,
    random_prompts,
    tokens,
    write_adapter,
)
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

import hyaena
from hyaena import ops
from hyaena.adapters import merge_adapter
from hyaena.fp8 import set_fp8


def run(program: str, *arguments: object) -> dict[str, Any]:
    """What a program of this folder prints last."""
    command = [sys.executable, "-m", f"integrations.vllm.{program}", *map(str, arguments)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def rows_of_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of the operator over prompts reads from now on."""
    rows = []
    for name in ("hyena", "hyena_states"):
        call = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda z, *rest, call=call, **more: (rows.append(len(z)), call(z, *rest, **more))[1]
        )
    return rows


SCALE = 1.25
"""Of weights with which some drafts are right and some wrong."""


@pytest.mark.parametrize("family", ["cub", "sh", "evo1", "evo2"])
def test_many_sequences_with_chunked_prompts_and_prefix_hits(family: str, tmp_path: Path) -> None:
    model = make(family)
    prompts = random_prompts(model)
    expected = own_tokens(model, prompts, 16)
    assert len({tuple(row) for row in expected}) > 8  # they tell the prompts apart
    with engine(folder_of(family, tmp_path), enable_prefix_caching=True) as llm:
        assert tokens(llm, prompts, 16)[0] == expected
        again, cached = tokens(llm, prompts, 16)
        assert again == expected
        assert cached > 0


@pytest.mark.parametrize("family", ["cub", "evo2"])
def test_prompts_that_go_on_are_read_together(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows what the prefix cache holds of them, of different lengths, is one call of the operator in a layer.

    Their beginnings differ: of prompts that share a state, vLLM begins one in a step.
    """
    model, rows = make(family), rows_of_calls(monkeypatch)
    beginnings = [[first, *rest] for first, rest in enumerate(random_prompts(model, [200] * 4), 10)]
    prompts = [begin + row for begin, row in zip(beginnings, random_prompts(model, [35, 40, 45, 50]), strict=True)]
    with engine(folder_of(family, tmp_path), enable_prefix_caching=True, max_num_batched_tokens=1024) as llm:
        tokens(llm, beginnings, 1)
        rows.clear()
        found, cached = tokens(llm, prompts, 8)
    assert cached >= 4 * 64
    assert rows == [4] * sum(kind != "attention" for kind in model.config.layer_types)
    assert found == own_tokens(model, prompts, 8)


@pytest.mark.parametrize("family", ["sh", "evo2"])
def test_sequences_that_lost_their_pages_begin_again(family: str, tmp_path: Path) -> None:
    model = make(family)
    prompts = random_prompts(model, [120, 121, 122, 123])
    expected = own_tokens(model, prompts, 80)
    blocks = {"sh": 20, "evo2": 10}[family]
    with engine(folder_of(family, tmp_path), num_gpu_blocks_override=blocks, max_model_len=256) as llm:
        assert tokens(llm, prompts, 80)[0] == expected
        assert metric(llm, "preemptions") > 0


@pytest.mark.parametrize(("family", "scale"), [("cub", 1), ("evo2", SCALE)])
def test_speculation_with_drafts_that_are_wrong(family: str, scale: float, tmp_path: Path) -> None:
    """In a process of its own: after vLLM's n-gram drafts, no second engine starts in one."""
    folder = folder_of(family, tmp_path, scale=scale)
    found = run("speculation", family, folder, scale)
    assert found["equal"]
    assert 0 < found["accepted"] < found["drafted"]


@pytest.mark.parametrize(("family", "layout"), [("sh", "original"), ("evo2", "original"), ("evo1", "transformers")])
def test_folders_in_other_layouts_are_read_as_they_are(family: str, layout: str, tmp_path: Path) -> None:
    model = make(family)
    prompts = random_prompts(model, [5, 70])
    with engine(folder_of(family, tmp_path, layout), enable_prefix_caching=False) as llm:
        assert tokens(llm, prompts, 8)[0] == own_tokens(model, prompts, 8)


def test_the_model_runner_of_gpus(tmp_path: Path) -> None:
    found = run("runner", folder_of("kinds", tmp_path))
    assert "vllm.v1.worker.gpu.model_runner" in found["runner"]
    assert found["equal"]
    assert all(count > 5 for count in found["steps in place"])


def test_two_ranks(tmp_path: Path) -> None:
    """Thirds of the input projection, FP8 products, channels, and groups of shared taps are split."""
    model = make("evo2")
    prompts = random_prompts(model, [1, 40, 100])
    plain = own_tokens(model, prompts, 12)
    set_fp8(model, "exact")
    expected = own_tokens(model, prompts, 12)
    assert expected != plain
    folder = folder_of("evo2", tmp_path)
    with engine(folder, tensor_parallel_size=2, hf_overrides={"fp8": "exact"}) as llm:
        assert tokens(llm, prompts, 12)[0] == expected


def test_two_stages(tmp_path: Path) -> None:
    """Each has its own layers and their pages. A worker of ours, see there."""
    model = make("evo2 twice")
    prompts = random_prompts(model, [1, 40, 100])
    options = {"pipeline_parallel_size": 2, "worker_cls": "integrations.vllm.stages.StageWorker"}
    with engine(folder_of("evo2 twice", tmp_path), **options) as llm:
        assert tokens(llm, prompts, 12)[0] == own_tokens(model, prompts, 12)


def test_linear_layers_in_fp8() -> None:
    """vLLM's own quantisation: of linear layers alone, and the loss on a text of cub's kind hardly changes."""
    model, tokenizer = hyaena.load("cub")
    ids = tokenizer.encode(Path(cases.__file__).read_text())[:96]
    with torch.inference_mode():
        own = torch.nn.functional.cross_entropy(model(torch.tensor([ids]))[0, :-1], torch.tensor(ids[1:]))
    options = {"dtype": "bfloat16", "quantization": "fp8_per_channel", "max_num_batched_tokens": 1024}
    with engine(CUB, enable_prefix_caching=False, **options) as llm:
        (out,) = llm.generate(
            [{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False
        )
        found = -sum(here[token].logprob for here, token in zip(out.prompt_logprobs[1:], ids[1:], strict=True))
        (dtypes,) = llm.apply_model(lambda model: {name: p.dtype for name, p in model.named_parameters()})
    assert abs(found / (len(ids) - 1) - float(own)) < 0.05
    narrow = {name.split(".", 3)[-1] for name, dtype in dtypes.items() if dtype == torch.float8_e4m3fn}
    layers = {"mixer.in_proj", "mixer.out_proj", "mixer.qkv_proj", "mixer.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}
    assert narrow == {f"{name}.weight" for name in layers}
    filters = {dtype for name, dtype in dtypes.items() if "long_filter" in name and "skip" not in name}
    assert filters == {torch.float32}


def test_an_adapter_on_every_kind_of_layer(tmp_path: Path) -> None:
    """LoRA on fused projections too, as ``hyaena.adapters`` writes it; without it the model is what it was."""
    model = make("evo2")
    prompts = random_prompts(model, [5, 70])
    plain = own_tokens(model, prompts, 8)
    folder = folder_of("evo2", tmp_path)
    adapter = write_adapter(model, tmp_path / "adapter")
    merge_adapter(model, adapter)
    expected = own_tokens(model, prompts, 8)
    assert expected != plain
    request = LoRARequest("adapter", 1, str(adapter))
    with engine(folder, enable_lora=True, max_lora_rank=8, max_loras=1, enable_prefix_caching=False) as llm:
        assert tokens(llm, prompts, 8, lora_request=request)[0] == expected
        assert tokens(llm, prompts, 8)[0] == plain


def test_embeddings_are_means_of_what_the_norm_returns(tmp_path: Path) -> None:
    """1e-4: float32, and sums in another order; numbers are up to 3."""
    model = make("evo2")
    prompts, outputs = random_prompts(model, [5, 70]), []
    model.norm.register_forward_hook(lambda *call: outputs.append(call[2][0]))
    with torch.inference_mode():
        for prompt in prompts:
            model(torch.tensor([prompt]))
    pooling = {"pooling_type": "MEAN", "use_activation": False}
    options = {"runner": "pooling", "pooler_config": pooling, "max_num_batched_tokens": 1024}
    with engine(folder_of("evo2", tmp_path), enable_prefix_caching=False, **options) as llm:
        found = llm.embed([{"prompt_token_ids": prompt} for prompt in prompts], use_tqdm=False)
    for one, expected in zip(found, outputs, strict=True):
        torch.testing.assert_close(torch.tensor(one.outputs.embedding), expected.mean(0), atol=1e-4, rtol=0)
