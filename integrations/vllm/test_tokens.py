"""Tokens of vLLM's engine on a CPU, in float32 and greedy, against those of hyaena itself: equal, one by one."""

from __future__ import annotations

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
    blocks = {"sh": 20, "evo2": 12}[family]
    with engine(folder_of(family, tmp_path), num_gpu_blocks_override=blocks, enable_prefix_caching=False) as llm:
        assert tokens(llm, prompts, 80)[0] == expected
        assert metric(llm, "preemptions") > 0


@pytest.mark.parametrize("family", ["cub", "evo2"])
def test_speculation_with_drafts_that_are_wrong(family: str, tmp_path: Path) -> None:
    """Prompts repeat a few random tokens, so that there always is a draft, and the model does not go on like that."""
    model = make(family)
    prompts = [row * 12 for row in random_prompts(model, [5, 6, 7])]
    expected = own_tokens(model, prompts, 24)
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    with engine(folder_of(family, tmp_path), speculative_config=drafts, enable_prefix_caching=False) as llm:
        assert tokens(llm, prompts, 24)[0] == expected
        drafted, accepted = metric(llm, "spec_decode_num_draft_tokens"), metric(llm, "spec_decode_num_accepted_tokens")
        assert 0 < accepted < drafted


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
