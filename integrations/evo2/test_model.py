"""``vortex.model.model.StripedHyena``: the original's numbers, names, hooks and inference parameters."""

from __future__ import annotations

import ast
import copy
import importlib
import io
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from integrations.evo2.cases import ROOT, Case, published, random_model, rounded, small_config
from torch import Tensor, nn

import hyaena
from hyaena.errors import CheckpointError, HyaenaError, InputError
from hyaena.formats.tensors import state_to_theirs
from hyaena.fp8 import set_fp8
from vortex.model.generation import Generator, generate
from vortex.model.model import AttentionBlock, HyenaCascade, ParallelGatedConvBlock, StripedHyena
from vortex.model.tokenizer import CharLevelTokenizer
from vortex.model.utils import dotdict, load_checkpoint, print_rank_0

TOLERANCE = 1e-5
"""Of the largest number: what the golden cases allow; the original agrees with itself to 2e-6."""


def relative(value: Tensor, expected: Tensor) -> float:
    return float(((value - expected).abs().max() / expected.abs().max()).detach())


# --- the original's numbers ------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_logits_states_and_greedy_tokens_are_the_original_s(case: Case) -> None:
    model, expected = case.model(), case.expected
    logits, nothing = model(case.ids)
    assert nothing is None and relative(logits, expected["logits"]) < TOLERANCE
    params = model.initialize_inference_params(max_seqlen=200)
    logits, returned = model(case.ids, inference_params_dict=params)
    assert returned is params and relative(logits, expected["logits"]) < TOLERANCE
    check_states(model, params, expected, "prefill")
    chosen, steps = [logits[:, -1:].argmax(-1)], []
    for _ in range(expected["greedy_ids"].shape[1] - 1):
        for part in params.values():  # as the original's callers do
            part.seqlen_offset = part.seqlen_offset + 1 or case.ids.shape[1]
        step, _ = model(chosen[-1].int(), inference_params_dict=params)
        steps.append(step)
        chosen.append(step.argmax(-1))
    assert torch.equal(torch.cat(chosen, dim=1), expected["greedy_ids"])
    assert relative(torch.cat(steps, dim=1), expected["decode_logits"]) < TOLERANCE
    check_states(model, params, expected, "final")


def check_states(model: StripedHyena, params: dict[str, Any], expected: dict[str, Tensor], when: str) -> None:
    for i in range(len(model.blocks)):
        name = model.block_idx_to_name(i)
        if name == "mha":
            if when == "prefill":
                stored = expected[f"prefill.kv.{i}"]
                held = params["mha"].key_value_memory_dict[i][:, : stored.shape[1]]
                assert relative(held, stored) < TOLERANCE
            continue
        short = expected[f"{when}.fir_state.{i}"]
        assert relative(params[name].fir_state_dict[i], short) < TOLERANCE
        if name == "hcl":
            assert params[name].state_dict[i].dtype == torch.float32
            assert relative(params[name].state_dict[i], expected[f"{when}.iir_state.{i}"]) < TOLERANCE
        else:
            window, seen = params[name].fir_inner_state_dict[i], expected[f"{when}.fir_inner_state.{i}"]
            missing = window.shape[2] - seen.shape[2]
            assert relative(window[..., missing:], seen) < TOLERANCE and not window[..., :missing].any()


@torch.inference_mode()
def test_every_block_is_the_original_s(case: Case) -> None:
    model, seen = case.model(), {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _module, _given, out, i=i: seen.update({i: out[0]}))
    model(case.ids)
    for i, out in seen.items():
        assert relative(out, case.expected[f"block_out.{i}"]) < TOLERANCE


def test_it_is_the_native_model(case: Case) -> None:
    """The same numbers, gradients included, from the same checkpoint."""
    model, ours = case.model(), case.native()
    logits, _ = model(case.ids)
    expected = ours(case.ids)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)
    logits.square().mean().backward()
    expected.square().mean().backward()
    grads = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    theirs = state_to_theirs(grads, model.architecture)
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        own = p.grad
        if "Wqkv" in name:  # rows of the checkpoint are in another order
            heads, width = model.architecture.num_attention_heads, model.architecture.head_dim
            own = own.unflatten(0, (3, heads, width)).transpose(0, 1).flatten(0, 2)
        assert relative(own, theirs[name]) < 1e-4, name


# --- names -----------------------------------------------------------------------------------------------------------


def test_parameters_have_the_names_shapes_and_numbers_of_the_checkpoint(case: Case) -> None:
    model = case.model()
    state = model.state_dict()
    dropped = {key for key in case.weights if key.endswith((".t", "_extra_state")) or key == "unembed.weight"}
    assert {key for key in state if not key.endswith("_extra_state")} == case.weights.keys() - dropped
    for key, tensor in state.items():
        if key in case.weights and "Wqkv" not in key:
            assert torch.equal(tensor, case.weights[key]), key
    assert {name for name, _ in model.named_parameters()} == {
        key for key in state if not key.endswith(("_freq", "_state"))
    }


def test_blocks_have_the_original_s_kinds(case: Case) -> None:
    model = case.model()
    assert model.config["hidden_size"] == model.config.hidden_size == model.architecture.hidden_size
    for i, block in enumerate(model.blocks):
        attention = i in case.config["attn_layer_idxs"]
        assert type(block) is (AttentionBlock if attention else ParallelGatedConvBlock)
        name = model.block_idx_to_name(i)
        assert block.layer_idx == i and i in case.config["attn_layer_idxs" if attention else f"{name}_layer_idxs"]
    assert model.block_idx_to_device == dict.fromkeys(range(len(model.blocks)), "cpu")


# --- state dicts and files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_file(tmp_path: Any, suffix: str) -> None:
    """With the keys of older code, extra states among them; in bfloat16, as the original has it then."""
    config = small_config("evo2_7b")
    weights = rounded(random_model(config))
    state, file = published(weights), tmp_path / f"mine{suffix}"
    if suffix == ".pt":
        torch.save(state, file)
    else:
        from safetensors.torch import save_file

        save_file({key: value.clone() for key, value in state.items() if isinstance(value, Tensor)}, file)
    model = StripedHyena(dotdict(config))
    load_checkpoint(model, str(file))
    ids = torch.randint(512, (2, 60))
    with torch.inference_mode():
        assert model(ids)[0].dtype == torch.bfloat16
        assert relative(model.float()(ids)[0], weights(ids)) < TOLERANCE
    dtypes = {key.rsplit(".", 1)[1]: tensor.dtype for key, tensor in model.state_dict().items()}
    assert {dtypes[key] for key in ("log_poles", "residues", "inv_freq")} == {torch.float32}


def test_a_checkpoint_in_parts(tiny: Case, tmp_path: Any) -> None:
    buffer = io.BytesIO()
    torch.save(dict(tiny.weights), buffer)
    content = buffer.getvalue()
    for i in range(3):
        part = content[i * len(content) // 3 : (i + 1) * len(content) // 3]
        (tmp_path / f"mine.pt.part{i}").write_bytes(part)
    model, other = tiny.model(), tiny.model()
    load_checkpoint(model, tmp_path / "mine.pt")
    other.to_bfloat16_except_pr_lc()
    assert torch.equal(model(tiny.ids)[0], other(tiny.ids)[0])


def test_frequencies_are_those_of_the_file_or_of_the_base(tiny: Case) -> None:
    name = next(key for key in tiny.weights if key.endswith("inv_freq"))
    model = tiny.model()
    model.custom_load_state_dict(tiny.weights | {name: tiny.weights[name] * 0.9})
    with torch.no_grad():
        assert relative(model(tiny.ids)[0], tiny.expected["logits"]) > 1e-3
    model.custom_load_state_dict({key: value for key, value in tiny.weights.items() if key != name})
    with torch.no_grad():
        assert relative(model(tiny.ids)[0], tiny.expected["logits"]) < TOLERANCE


def test_no_checkpoint_leaves_random_weights_that_are_stable() -> None:
    model = StripedHyena(dotdict(small_config("evo2_1b_base")))
    load_checkpoint(model, None)
    assert bool(model(torch.randint(512, (1, 500)))[0].isfinite().all())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("blocks.0.filter.h"), r"missing tensors: blocks\.0\.filter\.h"),
        (lambda w: w.update({"blocks.9.mlp.l1.weight": torch.zeros(2)}), r"unknown tensors: blocks\.9\.mlp\.l1"),
        (lambda w: w.update({"norm.scale": torch.zeros(3)}), r"norm\.scale is \[3\], expected \[64\]"),
        (lambda w: w.update({"unembed.weight": w["unembed.weight"] + 1}), "tie_embeddings"),
    ],
)
def test_a_state_dict_of_another_model_is_refused_before_anything_changes(
    tiny: Case, change: Callable[[dict[str, Tensor]], Any], words: str
) -> None:
    weights, model = dict(tiny.weights), tiny.model()
    change(weights)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=words) as caught:
        model.custom_load_state_dict(weights)
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_files_that_cannot_be_read_are_one_line(tiny: Case, tmp_path: Any) -> None:
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    other = small_config("evo2_7b")
    torch.save(published(random_model(other)), tmp_path / "other.pt")
    for name in ("missing.pt", "cut.pt", "other.pt"):
        with pytest.raises(HyaenaError, match=name) as caught:
            load_checkpoint(tiny.model(), tmp_path / name)
        assert "\n" not in str(caught.value)


# --- hooks and other modules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True], ids=["uncached", "cached"])
def test_hooks_see_what_the_original_s_modules_returned(tiny: Case, cached: bool) -> None:
    """A tensor, or a tuple whose first element is one: of blocks, of ``filter`` and of ``projections``."""
    model, seen, tuples = tiny.model(), {}, set()
    (batch, steps), width = tiny.ids.shape, 64
    shapes = {"embedding_layer": width, "norm": width, "unembed": 512}
    for i in range(6):
        shapes |= {f"blocks.{i}{part}": width for part in ("", ".pre_norm", ".post_norm", ".mlp", ".mlp.l3")}
        shapes |= {f"blocks.{i}.mlp.l1": 96, f"blocks.{i}.mlp.l2": 96}
        if i == 3:
            parts = {"inner_mha_cls": width, "inner_mha_cls.Wqkv": 3 * width, "inner_mha_cls.out_proj": width}
        else:
            parts = {"projections": 3 * width, "filter": width, "out_filter_dense": width}
        shapes |= {f"blocks.{i}.{name}": size for name, size in parts.items()}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _given: Any, out: Any) -> None:
            seen[name] = out[0] if isinstance(out, tuple) else out
            if isinstance(out, tuple):
                tuples.add(name.rpartition(".")[2])

        return hook

    for name in shapes:
        model.get_submodule(name).register_forward_hook(watch(name))
    logits, _ = model(tiny.ids, inference_params_dict=model.initialize_inference_params() if cached else None)
    assert {name: tuple(out.shape) for name, out in seen.items()} == {
        name: (batch, steps, size) for name, size in shapes.items()
    }
    assert torch.equal(seen["unembed"], logits)
    assert tuples == {*"012345", "filter", "projections"}
    weight = tiny.weights["blocks.0.projections.weight"]  # channels are in the order of the checkpoint
    torch.testing.assert_close(seen["blocks.0.projections"], seen["blocks.0.pre_norm"] @ weight.T, rtol=1e-5, atol=1e-5)


def test_a_module_that_computes_something_else_calls_no_hooks(tiny: Case) -> None:
    """So evo2 returns no embedding of that name, where the original's would be rotated queries and keys."""
    model, calls = tiny.model(), []
    model.blocks[3].inner_mha_cls.rotary_emb.register_forward_hook(lambda *_: calls.append(1))
    model(tiny.ids)
    assert not calls


def test_a_hook_may_change_the_stream(tiny: Case) -> None:
    model = tiny.model()
    handle = model.blocks[2].mlp.l3.register_forward_hook(lambda _module, _given, out: torch.zeros_like(out))
    changed, _ = model(tiny.ids)
    handle.remove()
    with torch.no_grad():
        model.blocks[2].mlp.l3.weight.zero_()
    assert torch.equal(changed, model(tiny.ids)[0])


def test_embeddings_by_another_unembed(case: Case) -> None:
    model, seen = case.model(), {}
    model.norm.register_forward_hook(lambda _module, _given, out: seen.update(norm=out))
    expected, _ = model(case.ids)
    model.unembed = nn.Identity()
    embeddings, _ = model(case.ids)
    assert torch.equal(embeddings, seen["norm"])
    torch.testing.assert_close(embeddings @ case.weights["embedding_layer.weight"].T, expected, rtol=1e-5, atol=1e-4)


def test_embedded_tokens_go_through_the_blocks(case: Case) -> None:
    """``stateless_forward`` and ``stateful_forward``, and a program's own loop over the blocks."""
    model, params = case.model(), case.model().initialize_inference_params()
    with torch.inference_mode():
        x, expected = model.embedding_layer(case.ids), model(case.ids)[0]
        out, nothing = model.stateless_forward(x)
        assert nothing is None and torch.equal(model.unembed(model.norm(out)), expected)
        for block in model.blocks:
            x, _ = block(x, inference_params=None, padding_mask=None)
        assert torch.equal(x, out)
        x = model.embedding_layer(case.ids)
        parts = [model.stateful_forward(part, params) for part in x.tensor_split((3, 4, 40), dim=1)]
        assert all(returned is params for _, returned in parts)
        together = torch.cat([part for part, _ in parts], dim=1)
        assert relative(together, out) < TOLERANCE
    with pytest.raises(InputError, match="stateful_forward"):
        model.blocks[0](x, inference_params=params["hcs"])


class Adapter(nn.Module):
    """A linear layer with a low-rank addition."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(2, base.in_features) * 0.1)
        self.b = nn.Parameter(torch.randn(base.out_features, 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        return (out[0] if isinstance(out, tuple) else out) + x @ self.a.T @ self.b.T

    def merged(self) -> Tensor:
        return self.base.weight + self.b @ self.a


@torch.inference_mode()
def test_modules_of_the_user_in_the_place_of_linear_layers_compute(case: Case) -> None:
    model, adapters = case.model(), {}
    for name in [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]:
        parent, _, attribute = name.rpartition(".")
        adapters[name] = Adapter(model.get_submodule(name))
        setattr(model.get_submodule(parent), attribute, adapters[name])
    other = case.model()
    for name, adapter in adapters.items():
        other.get_submodule(name).weight.copy_(adapter.merged())
    expected, params = other(case.ids)[0], model.initialize_inference_params()
    parts = [
        model(part, inference_params_dict=params)[0] for part in case.ids.split([30, 1, case.ids.shape[1] - 31], 1)
    ]
    assert relative(model(case.ids)[0], expected) < TOLERANCE
    assert relative(torch.cat(parts, dim=1), expected) < TOLERANCE


def test_adapters_of_peft(tiny: Case) -> None:
    names = ["Wqkv", "out_proj", "out_filter_dense", "l1", "l2", "l3"]
    adapted = peft.get_peft_model(tiny.model(), peft.LoraConfig(r=2, target_modules=names))
    logits, _ = adapted(tiny.ids)
    assert relative(logits, tiny.expected["logits"]) < TOLERANCE  # B of LoRA begins at zero
    logits.square().mean().backward()
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * (2 + 5 + 3 * 6) and all("lora" in name for name in trained)


# --- casts and devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.to_bfloat16_except_pr_lc(),
        lambda model: model.to_bfloat16_except_pr_lc(to_float32=True),
        lambda model: model.half(),
        lambda model: model.apply(lambda module: module.bfloat16()),
    ],
)
def test_no_cast_narrows_modes_or_frequencies(tiny: Case, cast: Any) -> None:
    model = tiny.model()
    cast(model)
    for name, tensor in model.state_dict().items():
        if name.endswith(("log_poles", "residues", "inv_freq")):
            assert tensor.dtype == torch.float32 and torch.equal(tensor, tiny.weights[name])
        elif not name.endswith("_extra_state"):
            assert tensor.dtype.itemsize == 2, name
    assert bool(model(tiny.ids)[0].isfinite().all())


def test_the_meta_device_costs_nothing(tiny: Case) -> None:
    with torch.device("meta"):
        model = StripedHyena(tiny.config)
    assert all(t.is_meta for t in model.parameters())
    model.to_empty(device="cpu").float()
    model.custom_load_state_dict(tiny.weights)
    assert relative(model(tiny.ids)[0], tiny.expected["logits"]) < TOLERANCE


def test_a_deep_copy_is_a_model(tiny: Case) -> None:
    model = tiny.model()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.embedding_layer.weight.zero_()
    assert not other(tiny.ids)[0].any()  # its head is tied to its own embedding
    assert relative(model(tiny.ids)[0], tiny.expected["logits"]) < TOLERANCE


def test_a_model_spreads_over_devices(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As over several GPUs: the blocks in order, with the embedding and the norm on the first."""
    devices = [torch.device("cpu"), torch.device("meta")]
    monkeypatch.setattr("vortex.model.model.default_devices", lambda: devices)
    model = StripedHyena(tiny.config)
    assert model.block_idx_to_device == {i: "cpu" if i < 3 else "meta" for i in range(6)}
    assert model.embedding_layer.weight.device == model.norm.scale.device == torch.device("cpu")
    x = model.cross_device_transfer(torch.zeros(1, 2, 64), 4)
    assert x.is_meta and model.cross_device_transfer(torch.zeros(1, 2, 64), 0).device == torch.device("cpu")


# --- FP8 input projections -------------------------------------------------------------------------------------------


@pytest.fixture
def fp8() -> tuple[StripedHyena, hyaena.StripedHyena]:
    """A model with scales that are not 1, and hyaena's own with the same weights, in float32."""
    config = small_config("evo2_1b_base")
    ours = rounded(random_model(config))
    model = StripedHyena(dotdict(config)).float()
    model.custom_load_state_dict(published(ours))
    return model.eval(), ours.eval()


@torch.inference_mode()
def test_fp8_products_are_those_of_the_scales(fp8: tuple[StripedHyena, hyaena.StripedHyena]) -> None:
    (model, ours), ids = fp8, torch.randint(512, (2, 40))
    plain, expected = model(ids)[0], ours(ids)
    assert relative(plain, expected) < TOLERANCE
    set_fp8(model, "exact")
    set_fp8(ours, "exact")
    exact, expected = model(ids)[0], ours(ids)
    assert relative(exact, expected) < TOLERANCE and relative(exact, plain) > 1e-3
    for block in model.blocks:
        if isinstance(block, ParallelGatedConvBlock):
            assert block.projections.use_fp8_input_projections is True
            block.projections.use_fp8_input_projections = False
    assert torch.equal(model(ids)[0], plain)


def test_scales_go_through_state_dicts(fp8: tuple[StripedHyena, hyaena.StripedHyena], tmp_path: Any) -> None:
    model, ours = fp8
    scales = [block.projections.scales for block in model.blocks if isinstance(block, ParallelGatedConvBlock)]
    expected = [layer.mixer.in_proj.scales for layer in ours.layers if hasattr(layer.mixer, "in_proj")]
    assert len(scales) == 4 and all(map(torch.equal, scales, expected)) and not torch.equal(scales[0], torch.ones(2))
    torch.save(model.state_dict(), tmp_path / "mine.pt")
    stored = torch.load(tmp_path / "mine.pt", weights_only=True)
    name = "blocks.0.projections._extra_state"
    for load in ("load_state_dict", "custom_load_state_dict"):
        other = StripedHyena(model.config)
        getattr(other, load)(stored, strict=True)
        assert torch.equal(other.blocks[0].projections.scales, scales[0])
    del stored[name]
    other.load_state_dict(stored, strict=True)
    other.custom_load_state_dict(stored, strict=True)
    assert torch.equal(other.blocks[0].projections.scales, torch.ones(2))
    stored[name] = torch.frombuffer(bytearray(b"\x80\x04N."), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.projections\._extra_state.*Transformer Engine 2"):
        other.custom_load_state_dict(stored)


def test_without_fp8_in_the_configuration_projections_are_plain(tiny: Case) -> None:
    projections = tiny.model().blocks[0].projections
    assert projections.use_fp8_input_projections is False and isinstance(projections, nn.Linear)


# --- inference parameters --------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_inference_params_are_readable_and_copies_are_independent(tiny: Case) -> None:
    model, ids = tiny.model(), tiny.ids
    params = model.initialize_inference_params()
    assert params["mha"].max_seqlen == model.architecture.max_length and params["hcm"].fir_inner_filter_length == 32
    model(ids[:, :20], inference_params_dict=params)
    assert {i: tuple(t.shape) for i, t in params["hcl"].state_dict.items()} == {2: (2, 64, 16), 5: (2, 64, 16)}
    assert {i: tuple(t.shape) for i, t in params["hcs"].fir_inner_state_dict.items()} == {0: (2, 64, 6), 4: (2, 64, 6)}
    assert {i: tuple(t.shape) for i, t in params["hcm"].fir_state_dict.items()} == {1: (2, 192, 2)}
    assert params["mha"].lengths == [20, 20]
    branch = copy.deepcopy(params)
    a, _ = model(ids[:, 20:], inference_params_dict=params)
    b, _ = model(ids[:, 20:], inference_params_dict=branch)
    assert relative(a, tiny.expected["logits"][:, 20:]) < TOLERANCE and torch.equal(a, b)
    file = io.BytesIO()
    torch.save([params["hcl"].state_dict, params["hcm"].fir_inner_state_dict], file)


@torch.inference_mode()
def test_rows_may_be_chosen_anew(tiny: Case) -> None:
    """As a beam search does: every tensor is indexed by rows."""
    model, ids, rows = tiny.model(), tiny.ids, torch.tensor([1, 1, 0])
    params = model.initialize_inference_params()
    model(ids[:, :20], inference_params_dict=params)
    for name, fields in {
        "mha": ("key_value_memory_dict",), "hcl": ("fir_state_dict", "state_dict"),
        "hcm": ("fir_state_dict", "fir_inner_state_dict"), "hcs": ("fir_state_dict", "fir_inner_state_dict"),
    }.items():  # fmt: skip
        for field in fields:
            held = getattr(params[name], field)
            held.update({key: tensor[rows] for key, tensor in held.items()})
    logits, _ = model(ids[rows, 20:], inference_params_dict=params)
    assert relative(logits, tiny.expected["logits"][rows, 20:]) < TOLERANCE


def test_what_was_read_in_inference_mode_goes_on_outside_of_it(tiny: Case) -> None:
    model, ids = tiny.model(), tiny.ids
    params = model.initialize_inference_params()
    with torch.inference_mode():
        model(ids[:, :20], inference_params_dict=params)
    logits, _ = model(ids[:, 20:], inference_params_dict=params)
    logits.sum().backward()
    assert relative(logits, tiny.expected["logits"][:, 20:]) < TOLERANCE
    assert not any(t.requires_grad for t in params["hcl"].state_dict.values())


@torch.inference_mode()
def test_a_pass_that_fails_changes_nothing(tiny: Case) -> None:
    model, ids = tiny.model(), tiny.ids
    params = model.initialize_inference_params()
    model(ids[:, :20], inference_params_dict=params)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    for place in (model.blocks[4], model.norm):
        handle = place.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 20:30], inference_params_dict=params)
        handle.remove()
    assert params["mha"].lengths == [20, 20]
    logits, _ = model(ids[:, 20:], inference_params_dict=params)
    assert relative(logits, tiny.expected["logits"][:, 20:]) < TOLERANCE


# --- the generator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True], ids=["uncached", "cached"])
def test_generation_is_the_golden_case(case: Case, cached: bool) -> None:
    generator, expected = Generator(case.model(), CharLevelTokenizer(512), top_k=1), case.expected
    count = expected["greedy_ids"].shape[1]
    ids, logits, params = generator.generate(
        "cpu", input_ids=case.ids, num_tokens=count, cached_generation=cached, stop_at_eos=False
    )
    assert torch.equal(ids, expected["greedy_ids"]) and logits.dtype == torch.float32
    assert relative(logits[:, 1:], expected["decode_logits"]) < TOLERANCE
    if cached:
        check_states(generator.model, params, expected, "final")


def test_a_generator_prints_what_it_is_asked_to(tiny: Case, capsys: pytest.CaptureFixture[str]) -> None:
    generator = Generator(tiny.model(), CharLevelTokenizer(512), top_k=1)
    generator.generate(None, "ACGT", num_tokens=3)
    assert capsys.readouterr().out == ""
    generator.generate(None, "ACGT", num_tokens=3, verbose=True)
    assert "Input: ACGT, Output:" in capsys.readouterr().out
    print_rank_0("a line")
    assert capsys.readouterr().out == "a line\n"
    for arguments in ({}, {"input_string": ""}, {"input_string": "A", "num_tokens": 0}):
        with pytest.raises(InputError, match="generate takes"):
            generator.generate("cpu", **arguments)
    with pytest.raises(InputError, match="at least 1, or None"):
        generator.generate("cpu", "ACGT", force_prompt_threshold=-1)
    for prompts, words in (([], "no texts"), (["A", ""], "prepend_bos=True")):
        with pytest.raises(InputError, match=words):
            generate(prompt_seqs=prompts, model=generator.model, tokenizer=generator.tokenizer)


# --- bad input -------------------------------------------------------------------------------------------------------


def _other_batch(model: StripedHyena) -> None:
    params = model.initialize_inference_params()
    model(torch.zeros(2, 3, dtype=torch.int64), params)
    model(torch.zeros(1, 3, dtype=torch.int64), params)


def _some_layers(model: StripedHyena) -> None:
    params = model.initialize_inference_params()
    model(torch.zeros(2, 3, dtype=torch.int64), params)
    del params["hcl"].state_dict[2]
    model(torch.zeros(2, 3, dtype=torch.int64), params)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model(torch.zeros(4, dtype=torch.int64)), r"\[B,T\]"),
        (lambda model: model([[1, 2]]), r"\[B,T\]"),
        (lambda model: model(torch.zeros(1, 3)), "integers"),
        (lambda model: model(torch.zeros(1, 0, dtype=torch.int64)), "T>=1"),
        (lambda model: model(torch.zeros(0, 3).int(), model.initialize_inference_params()), "B>=1"),
        (lambda model: model(torch.full((1, 3), 512)), "token id 512 is outside the vocabulary of 512"),
        (lambda model: model(torch.full((1, 3), -1)), "token id -1"),
        (lambda model: model(torch.zeros(1, 3).int(), {"mha": 1}), "initialize_inference_params"),
        (lambda model: model(torch.zeros(1, 3).int(), [1]), "initialize_inference_params"),
        (lambda model: model(torch.zeros(1, 3).int(), padding_mask=torch.ones(1, 4)), "shape"),
        (lambda model: model(torch.zeros(1, 3).int(), padding_mask=torch.tensor([[1, 0, 1]])), "left or on the right"),
        (
            lambda model: model(
                torch.zeros(1, 2).int(), model.initialize_inference_params(), padding_mask=torch.tensor([[1, 0]])
            ),
            "on the left",
        ),
        (_other_batch, "holds 2 rows and the ids 1"),
        (_some_layers, "some layers only"),
    ],
)
def test_mistakes_are_one_line(tiny: Case, call: Callable[[StripedHyena], Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        call(tiny.model())
    assert "\n" not in str(caught.value)


# --- structure -------------------------------------------------------------------------------------------------------


def test_it_stands_on_these_names_of_hyaena() -> None:
    """A change of one of them is a change of what the two packages agree on."""
    used: dict[str, set[str]] = {}
    for file in (ROOT / "compat" / "vortex" / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.Import) or not any(name.name.startswith("hyaena") for name in node.names)
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hyaena":
                used.setdefault(str(node.module), set()).update(name.name for name in node.names)
    assert used == {
        "hyaena": {"ModelConfig", "layers", "ops"},
        "hyaena.cache": {"Cache"},
        "hyaena.checkpoints.files": {"find", "listed"},
        "hyaena.checkpoints.weights": {"open_weights", "plain_names"},
        "hyaena.compat": {
            "CharLevelTokenizer",
            "ParallelGatedMLP",
            "RMSNorm",
            "Renamed",
            "dotdict",
            "leading_mask",
            "print_rank_0",
            "sample",
            "with_room",
        },
        "hyaena.context": {"ForwardContext"},
        "hyaena.errors": {"CheckpointError", "InputError"},
        "hyaena.filters": {"Float32Parameters"},
        "hyaena.formats": {"config_from_dict"},
        "hyaena.formats.evo2": {"tensors"},
        "hyaena.formats.evo2.config": {"SWITCH"},
        "hyaena.formats.evo2.extra_state": {"read_scales", "write_scales"},
        "hyaena.formats.tensors": {"check_tied"},
        "hyaena.fp8": {"FP8Linear"},
        "hyaena.layers": {"call", "init_module"},
    }


def test_every_module_imports() -> None:
    for name in ("cache", "generation", "layers", "model", "sample", "tokenizer", "utils", "weights"):
        assert importlib.import_module(f"vortex.model.{name}").__doc__
    assert HyenaCascade.__doc__ and isinstance(hyaena.__version__, str)
