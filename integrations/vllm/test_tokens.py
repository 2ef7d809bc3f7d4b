"""Tokens of vLLM's engine on a CPU, in float32 and greedy, against those of hyaena itself: equal, one by one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from integrations.vllm.cases import engine, folder_of, make, metric, own_tokens, random_prompts, tokens


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


@pytest.mark.parametrize("family", ["sh", "evo2"])
def test_sequences_that_lost_their_pages_begin_again(family: str, tmp_path: Path) -> None:
    model = make(family)
    prompts = random_prompts(model, [120, 121, 122, 123])
    expected = own_tokens(model, prompts, 80)
    blocks = {"sh": 20, "evo2": 10}[family]
    with engine(folder_of(family, tmp_path), num_gpu_blocks_override=blocks, max_model_len=256) as llm:
        assert tokens(llm, prompts, 80)[0] == expected
        assert metric(llm, "preemptions") > 0


@pytest.mark.parametrize("family", ["cub", "evo2"])
def test_speculation_with_drafts_that_are_wrong(family: str, tmp_path: Path) -> None:
    """In a process of its own: after vLLM's n-gram drafts, no second engine starts in one."""
    command = [sys.executable, "-m", "integrations.vllm.speculation", family, str(folder_of(family, tmp_path))]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["equal"]
    assert 0 < found["accepted"] < found["drafted"]


@pytest.mark.parametrize(("family", "layout"), [("sh", "original"), ("evo2", "original"), ("evo1", "transformers")])
def test_folders_in_other_layouts_are_read_as_they_are(family: str, layout: str, tmp_path: Path) -> None:
    model = make(family)
    prompts = random_prompts(model, [5, 70])
    with engine(folder_of(family, tmp_path, layout), enable_prefix_caching=False) as llm:
        assert tokens(llm, prompts, 8)[0] == own_tokens(model, prompts, 8)


def test_two_ranks(tmp_path: Path) -> None:
    """Thirds of the input projection, channels, and groups of shared taps are split."""
    model = make("evo2")
    prompts = random_prompts(model, [1, 40, 100])
    with engine(folder_of("evo2", tmp_path), tensor_parallel_size=2) as llm:
        assert tokens(llm, prompts, 12)[0] == own_tokens(model, prompts, 12)
