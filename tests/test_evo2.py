"""StripedHyena 2 against a float64 oracle, over everything in which its configurations can differ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from configs import TINY_EVO2
from evo2_reference import forward, random_state
from hyaena.config import ModelConfig
from hyaena.formats import config_from_dict
from hyaena.model import StripedHyena
from hyaena.ops import DecodeOperators, ExplicitFilter, HyenaState
from hyaena.sizes import ModelSizes
from hyaena.train.config import OptimConfig
from hyaena.train.filters import parametrize_filters, plain_state_dict
from hyaena.train.optim import parameter_groups

BASE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_layers": 4,
    "hcs_layer_idxs": [0],
    "hcm_layer_idxs": [1],
    "hcl_layer_idxs": [2],
    "attn_layer_idxs": [3],
    "num_attention_heads": 3,
    "hcs_filter_length": 7,
    "hcs_filter_groups": 6,
    "hcm_filter_length": 128,
    "hcm_filter_groups": 4,
    "state_size": 5,
    "short_filter_length": 3,
    "short_filter_bias": False,
    "inner_mlp_size": 32,
    "eps": 1e-6,
    "tie_embeddings": True,
    "qkv_proj_bias": False,
    "hyena_out_proj_bias": True,
    "interleave": True,
    "column_split_hyena": False,
    "evo2_style_activations": True,
    "rotary_emb_base": 10_000,
}


def build(config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[StripedHyena, Any]:
    state = random_state(config, seed)
    model = StripedHyena(config_from_dict(config)).to(dtype).requires_grad_(False)
    model.load_state_dict(state)
    return model, state


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).abs().max() / expected.abs().max())


@st.composite
def configs(draw: Any) -> dict[str, Any]:
    layers = draw(st.lists(st.sampled_from(["attn", "hcl", "hcm", "hcs"]), min_size=1, max_size=4))
    lists = {
        f"{kind}_layer_idxs": [i for i, k in enumerate(layers) if k == kind] for kind in ("attn", "hcl", "hcm", "hcs")
    }
    taps = st.sampled_from([1, 2, 7, 31, 127, 128, 129, 150])
    return BASE | lists | {
        "num_layers": len(layers),
        "hcs_filter_length": draw(taps),
        "hcm_filter_length": draw(taps),
        "hcs_filter_groups": draw(st.sampled_from([1, 2, 8, 24])),
        "hcm_filter_groups": draw(st.sampled_from([1, 3, 24])),
        "state_size": draw(st.sampled_from([1, 16])),
        "short_filter_length": draw(st.integers(2, 4)),
        "num_attention_heads": draw(st.sampled_from([1, 3, 6])),
        "eps": draw(st.sampled_from([1e-6, 1e-2])),
        "tie_embeddings": draw(st.booleans()),
        "evo2_style_activations": draw(st.booleans()),
        "use_interpolated_rotary_pos_emb": draw(st.booleans()),
        "rotary_emb_scaling_factor": draw(st.sampled_from([1, 4.0, 128])),
        "rotary_emb_base": draw(st.sampled_from([100, 10_000, 1_000_000])),
    }  # fmt: skip


@settings(max_examples=25)
@given(configs(), st.integers(0, 9))
def test_every_configuration_equals_the_oracle(config: dict[str, Any], seed: int) -> None:
    """In float64; the rotary frequencies of the file are float32, in both."""
    model, state = build(config, seed)
    ids = torch.randint(40, (2, 40))
    assert relative(model(ids), forward(state, config, ids)) < 1e-11


def test_attention_alone_is_of_this_format_too() -> None:
    config = BASE | {key: [] for key in ("hcl_layer_idxs", "hcm_layer_idxs", "hcs_layer_idxs")}
    config |= {"num_layers": 1, "attn_layer_idxs": [0]}
    model, state = build(config)
    ids = torch.randint(40, (1, 30))
    assert relative(model(ids), forward(state, config, ids)) < 1e-11


@pytest.mark.parametrize("length", [1, 2, 6, 127, 128, 200])
def test_float32_at_lengths_around_the_windows(length: int) -> None:
    model, state = build(BASE, dtype=torch.float32)
    ids = torch.randint(40, (1, length))
    assert relative(model(ids), forward(state, BASE, ids)) < 1e-5


@pytest.mark.parametrize("config", [BASE, BASE | {"hcm_filter_length": 31}], ids=["128 taps", "31 taps"])
@settings(max_examples=20)
@given(data=st.data())
def test_splits_equal_one_pass(config: dict[str, Any], data: st.DataObject) -> None:
    """Chunks, continued caches and single tokens, at random places, also before any filter's window is full."""
    length = data.draw(st.integers(2, 150))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=5)))
    model, state = build(config)
    ids = torch.randint(40, (2, length))
    cache = model.make_cache(2)
    parts = [model(part, cache=cache) for part in ids.tensor_split(cuts, dim=1)]
    assert relative(torch.cat(parts, dim=1), forward(state, config, ids)) < 1e-11


def test_every_prompt_of_few_tokens_decodes() -> None:
    """vortex takes the wrong taps after prompts of 1 to 5 tokens (1 to 30 with filters of 31 taps)."""
    config = BASE | {"hcm_filter_length": 31}
    model, state = build(config)
    ids = torch.randint(40, (1, 40))
    expected = forward(state, config, ids)
    for prompt in range(1, 33):
        cache = model.make_cache(1)
        logits = [model(ids[:, :prompt], cache=cache)]
        logits += [model(ids[:, t : t + 1], cache=cache) for t in range(prompt, 40)]
        assert relative(torch.cat(logits, dim=1), expected) < 1e-11, prompt


def test_packed_documents_do_not_see_each_other() -> None:
    model, state = build(BASE)
    lengths = [1, 3, 130, 17]
    ids = torch.randint(40, (1, sum(lengths)))
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    got = model(ids, segment_ids=segments).split(lengths, dim=1)
    for part, document in zip(got, ids.split(lengths, dim=1), strict=True):
        assert relative(part, forward(state, BASE, document)) < 1e-11


def test_rows_of_unequal_lengths_share_a_batch() -> None:
    model, state = build(BASE)
    lengths = [140, 5, 1, 60]
    mask = torch.arange(140) >= 140 - torch.tensor(lengths)[:, None]
    ids = torch.randint(40, mask.shape)
    cache = model.make_cache(4)
    logits = model(ids, mask=mask, cache=cache)
    more = torch.randint(40, (4, 6))
    steps = torch.cat([model(more[:, t : t + 1], cache=cache) for t in range(6)], dim=1)
    for row, length in enumerate(lengths):
        whole = torch.cat([ids[row, 140 - length :], more[row]])[None]
        expected = forward(state, BASE, whole)[0]
        assert relative(logits[row, 140 - length :], expected[:length]) < 1e-11
        assert relative(steps[row], expected[length:]) < 1e-11


def test_bfloat16_rounds_what_the_original_rounds() -> None:
    """Taps, skips and rotary tables are bfloat16; modes, frequencies and the states of long filters are float32."""
    model, _ = build(BASE, dtype=torch.float32)
    model = model.bfloat16()
    long_filters = {i: layer.mixer.long_filter for i, layer in enumerate(model.layers) if i < 3}
    explicit = long_filters[1]()
    assert isinstance(explicit, ExplicitFilter)
    assert explicit.taps.dtype == torch.bfloat16 and explicit.skip is not None and explicit.skip.dtype == torch.bfloat16
    assert long_filters[2].log_poles.dtype == long_filters[2].residues.dtype == torch.float32
    assert model.rotary.frequencies is not None and model.rotary.frequencies.dtype == torch.float32
    cos, sin = model.rotary(torch.arange(1000), torch.bfloat16)
    assert cos.dtype == torch.float32
    assert torch.equal(cos, cos.bfloat16().float()) and torch.equal(sin, sin.bfloat16().float())
    plain = StripedHyena(replace(model.config, rope_tables_rounded=False)).bfloat16()
    assert not torch.equal(plain.rotary(torch.arange(1000), torch.bfloat16)[0], cos)
    cache = model.make_cache(1)
    model(torch.randint(40, (1, 9)), cache=cache)
    states = [state for state in cache.states if isinstance(state, HyenaState)]
    assert {(s.short.dtype, s.long.dtype) for s in states} == {(torch.bfloat16, torch.float32)}


# --- training --------------------------------------------------------------------------------------------------------


def loss_of(model: StripedHyena, ids: Tensor, **options: Any) -> Tensor:
    logits = model(ids, **options)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("trainable", [False, True], ids=["plain", "parametrised"])
def test_gradients_are_those_of_the_step_loop_in_float64(trainable: bool) -> None:
    """Every parameter of every kind of layer: taps, real modes, skips, norms, projections."""
    torch.manual_seed(0)
    model = StripedHyena(config_from_dict(BASE))
    model.load_state_dict(random_state(BASE))
    wide = StripedHyena(model.config).double()
    wide.load_state_dict(model.state_dict())
    for one in (model, wide):
        if trainable:
            parametrize_filters(one)
    ids = torch.randint(40, (2, 150))
    loss_of(model, ids).backward()
    loss_of(wide, ids, method="recurrence").backward()
    expected = {name: parameter.grad for name, parameter in wide.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and expected[name] is not None, name
        largest = float(expected[name].abs().max())
        assert largest > 0, name
        # 150 steps of float32, through four layers
        assert float((parameter.grad.double() - expected[name]).abs().max()) < 1e-4 * largest, name


def test_only_matrices_decay_and_filters_have_a_rate_of_their_own() -> None:
    model = StripedHyena(TINY_EVO2)
    parametrize_filters(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {group["name"]: group for group in parameter_groups(model, OptimConfig(lr=1e-3, weight_decay=0.1))}
    found = {key: {names[p] for p in group["params"]} for key, group in groups.items()}
    assert set().union(*found.values()) == set(names.values())
    assert sum(map(len, found.values())) == len(names)
    assert {name.rpartition(".")[2] for name in found["filters"]} == {"taps", "skip", "residues", "original"}
    assert all(".long_filter." in name for name in found["filters"])
    assert {name.split(".")[-2] for name in found["matrices"]} == {
        "embed_tokens", "qkv_proj", "o_proj", "in_proj", "out_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert groups["matrices"]["weight_decay"] == 0.1
    assert groups["filters"]["weight_decay"] == groups["vectors"]["weight_decay"] == 0


def test_training_keeps_the_frequencies_and_gives_plain_names_back() -> None:
    model = StripedHyena(TINY_EVO2)
    ids = torch.randint(50, (2, 30))
    names, before = set(model.state_dict()), model(ids)
    frequencies = model.rotary.powers()
    parametrize_filters(model)
    assert torch.equal(model(ids), before)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(3):
        loss_of(model, ids).backward()
        optimizer.step()
    plain = plain_state_dict(model)
    assert set(plain) == names
    assert torch.equal(plain["rotary.frequencies"], frequencies)
    assert (plain["layers.3.mixer.long_filter.log_poles"] < 0).all()
    fresh = StripedHyena(TINY_EVO2)
    fresh.load_state_dict(plain)
    assert torch.equal(fresh(ids), model(ids))


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_memory_of_the_7b() -> None:
    """One sequence in float32: windows of 127 and of 6 inputs, 16 modes, and the short filters; keys and values."""
    sizes = ModelSizes(ModelConfig.from_name("evo2-7b"))
    d = 4096
    parts = {"hcl": 9 * d * 16, "hcm": 9 * d * 127, "hcs": 9 * d * 6, "short": 27 * 3 * d * 2}
    assert {name: round(4 * count / 1e6, 1) for name, count in parts.items()} == {
        "hcl": 2.4, "hcm": 18.7, "hcs": 0.9, "short": 2.7
    }  # fmt: skip
    assert sizes.state_bytes(4) == 4 * sum(parts.values()) == 24_625_152
    assert sizes.state_bytes(2) == 24_625_152 - 2 * parts["short"]  # in bfloat16, states of long filters are float32
    assert sizes.kv_bytes_per_token(2) == 81_920


@pytest.mark.parametrize("name", ["evo2-1b-base", "evo2-20b", "evo2-40b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_those_of_the_tensors(name: str, dtype: torch.dtype) -> None:
    config = ModelConfig.from_name(name)
    sizes, itemsize = ModelSizes(config), dtype.itemsize
    with torch.device("meta"):
        model = StripedHyena(config).to(dtype)
        cache = model.make_cache(3, max_length=7)
    assert sum(p.nbytes for p in model.parameters()) == sizes.weight_bytes(itemsize)
    assert cache.nbytes == sizes.cache_bytes(3, 7, itemsize)


# --- a step that can be captured -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_every_filter_looks_at_no_number(dtype: torch.dtype) -> None:
    """What a CUDA graph captures may not wait for the device: fake tensors have no numbers to look at."""
    model = StripedHyena(TINY_EVO2).to(dtype).requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        cache = model.make_cache(3, max_length=50)
        for i, layer in enumerate(model.layers):
            if TINY_EVO2.layer_types[i] == "attention":
                continue
            state, mixer = cache.states[i], layer.mixer
            z = torch.empty(3, 3 * TINY_EVO2.hidden_size, dtype=dtype)
            before = list(state.tensors())
            y = DecodeOperators().hyena(z, mixer.short_filter.weight, None, mixer.long_filter.view(), state)
            assert y.shape == (3, TINY_EVO2.hidden_size) and y.dtype == dtype
            assert all(a is b for a, b in zip(state.tensors(), before, strict=True))
