"""``stripedhyena.model.StripedHyena``: the original's numbers, names, hooks and inference parameters."""

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
from integrations.evo.cases import ROOT, Case
from torch import Tensor, nn

import hyaena
from hyaena.errors import CheckpointError, ConfigError, HyaenaError, InputError
from stripedhyena.model import AttentionBlock, ParallelGatedConvBlock, ParallelHyenaFilter, StripedHyena

FLOAT32 = 1e-4
"""Of the largest number: what the golden cases allow; the original agrees with itself to 3e-5."""


def relative(value: Tensor, expected: Tensor) -> float:
    return float(((value - expected).abs().max() / expected.abs().max()).detach())


def native(model: StripedHyena) -> hyaena.StripedHyena:
    ours = hyaena.StripedHyena(model.architecture)
    ours.load_state_dict(model.state_dict())
    return ours.eval()


# --- the original's numbers ------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_logits_and_states_are_the_original_s(case: Case) -> None:
    model, expected = case.model(), case.expected
    logits, nothing = model(case.ids)
    assert nothing is None and relative(logits, expected["logits"]) < FLOAT32
    params = model.initialize_inference_params()
    logits, returned = model(case.ids, inference_params_dict=params)
    assert returned is params and relative(logits, expected["logits"]) < FLOAT32
    fir, iir = params["hyena"].fir_state_dict, params["hyena"].state_dict
    assert set(fir) == set(iir) == {int(key.split(".")[2]) for key in expected if key.startswith("prefill.fir_state")}
    for i in fir:
        assert relative(fir[i], expected[f"prefill.fir_state.{i}"]) < FLOAT32
        assert iir[i].dtype == torch.complex64
        assert relative(torch.view_as_real(iir[i]), expected[f"prefill.iir_state.{i}"]) < FLOAT32
    chosen, steps = [logits[:, -1:].argmax(-1)], []
    for _ in range(expected["greedy_ids"].shape[1] - 1):
        step, _ = model(chosen[-1].int(), inference_params_dict=params)
        steps.append(step)
        chosen.append(step.argmax(-1))
    assert torch.equal(torch.cat(chosen, dim=1), expected["greedy_ids"])
    assert relative(torch.cat(steps, dim=1), expected["decode_logits"]) < FLOAT32
    for i in iir:
        assert relative(torch.view_as_real(iir[i]), expected[f"final.iir_state.{i}"]) < FLOAT32


def test_it_is_the_native_model(case: Case) -> None:
    """The same numbers, gradients included, from the same state dict."""
    model = case.model()
    ours = native(model)
    logits, _ = model(case.ids)
    expected = ours(case.ids)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    logits.square().mean().backward()
    expected.square().mean().backward()
    from hyaena.formats.tensors import state_to_theirs

    grads = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    theirs = state_to_theirs(grads, model.architecture)
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert relative(p.grad, theirs[name]) < FLOAT32, name


# --- names -----------------------------------------------------------------------------------------------------------


def test_parameters_have_the_names_and_shapes_of_the_checkpoint(case: Case) -> None:
    model = case.model()
    stored = {key: tuple(tensor.shape) for key, tensor in case.weights.items()}
    state = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    tied = model.architecture.tie_embeddings
    assert state == stored | ({"unembed.weight": stored["embedding_layer.weight"]} if tied else {})
    parameters = {name for name, _ in model.named_parameters()}
    assert parameters == {key for key in stored if not key.endswith("inv_freq")}
    for key, tensor in model.state_dict().items():
        if key in case.weights:
            torch.testing.assert_close(tensor, case.weights[key], rtol=1e-6, atol=0)


def test_a_state_dict_goes_through_a_file(case: Case) -> None:
    model, file = case.model(), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = StripedHyena(case.config)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(case.ids)[0], model(case.ids)[0])


def test_a_checkpoint_may_hold_what_is_computed_here_and_nothing_else(evo_case: Case) -> None:
    model, weights = StripedHyena(evo_case.config), dict(evo_case.weights)
    extra = {"blocks.0.filter.t": torch.zeros(3), "blocks.0.filter.freq": torch.zeros(3), "norm._extra_state": None}
    model.load_state_dict(weights | extra, strict=True)
    del weights["blocks.2.inner_mha_cls.rotary_emb.inv_freq"]
    model.load_state_dict(weights, strict=True)
    for wrong in ({"blocks.9.mlp.l1.weight": torch.zeros(2)}, {"blocks.0.mlp.l9.weight": torch.zeros(2)}):
        with pytest.raises(RuntimeError, match=next(iter(wrong))):
            model.load_state_dict(weights | wrong, strict=True)
    del weights["blocks.0.filter.poles"]
    with pytest.raises(RuntimeError, match=r"blocks\.0\.filter\.poles"):
        model.load_state_dict(weights, strict=True)


def test_a_tied_head_that_differs_is_refused(evo_case: Case) -> None:
    head = evo_case.weights["embedding_layer.weight"] + 1
    with pytest.raises(CheckpointError, match="tie_embeddings"):
        StripedHyena(evo_case.config).load_state_dict(evo_case.weights | {"unembed.weight": head})


def test_blocks_have_the_original_s_kinds(case: Case) -> None:
    model = case.model()
    assert model.config["hidden_size"] == model.config.hidden_size == model.architecture.hidden_size
    for i, block in enumerate(model.blocks):
        attention = i in case.config["attn_layer_idxs"]
        assert type(block) is (AttentionBlock if attention else ParallelGatedConvBlock)
        assert block.layer_idx == i


# --- hooks and other modules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True], ids=["uncached", "cached"])
def test_hooks_see_what_the_original_s_modules_returned(sh_case: Case, cached: bool) -> None:
    model, seen = sh_case.model(), {}
    (batch, steps), width = sh_case.ids.shape, 64
    shapes = {
        "embedding_layer": width,
        "blocks.0": width,
        "blocks.0.pre_norm": width,
        "blocks.0.projections": 3 * width,
        "blocks.0.filter": width,
        "blocks.0.out_filter_dense": width,
        "blocks.1": width,
        "blocks.1.inner_mha_cls": width,
        "blocks.1.inner_mha_cls.Wqkv": (8 + 2 * 2) * 8,
        "blocks.1.inner_mha_cls.out_proj": width,
        "blocks.3.post_norm": width,
        "blocks.3.mlp": width,
        "blocks.3.mlp.l1": 160,
        "blocks.3.mlp.l3": width,
        "norm": width,
        "unembed": 256,
    }
    for name in shapes:
        model.get_submodule(name).register_forward_hook(
            lambda _module, _given, out, name=name: seen.update({name: out[0] if isinstance(out, tuple) else out})
        )
    logits, _ = model(sh_case.ids, inference_params_dict=model.initialize_inference_params() if cached else None)
    assert {name: tuple(out.shape) for name, out in seen.items()} == {
        name: (batch, steps, size) for name, size in shapes.items()
    }
    assert torch.equal(seen["unembed"], logits)
    # The stream after a block is that of the native model's layer.
    ours = native(model)
    for i in (0, 1):
        ours.layers[i].register_forward_hook(lambda _module, _given, out, i=i: seen.update({f"ours.{i}": out[0]}))
    ours(sh_case.ids)
    for i in (0, 1):
        torch.testing.assert_close(seen[f"blocks.{i}"], seen[f"ours.{i}"], rtol=1e-5, atol=1e-5)


def test_projections_are_in_the_order_of_the_checkpoint(case: Case) -> None:
    """The hook on ``projections`` sees what the checkpoint's matrix gives, and the filter undoes the order."""
    model, seen = case.model(), {}
    block = model.blocks[0]
    block.projections.register_forward_hook(lambda _module, given, out: seen.update(x=given[0], z=out))
    model(case.ids)
    weight, bias = (case.weights[f"blocks.0.projections.{name}"] for name in ("weight", "bias"))
    torch.testing.assert_close(seen["z"], seen["x"] @ weight.T + bias, rtol=1e-5, atol=1e-5)


def test_a_hook_may_change_the_stream(sh_case: Case) -> None:
    model = sh_case.model()
    handle = model.blocks[2].mlp.l3.register_forward_hook(lambda _module, _given, out: torch.zeros_like(out))
    changed, _ = model(sh_case.ids)
    handle.remove()
    with torch.no_grad():
        model.blocks[2].mlp.l3.weight.zero_()
    assert torch.equal(changed, model(sh_case.ids)[0])


def test_embeddings_by_another_unembed(case: Case) -> None:
    """How users of Evo get embeddings."""

    class Embeddings(nn.Module):
        def unembed(self, u: Tensor) -> Tensor:
            return u

    model, seen = case.model(), {}
    model.norm.register_forward_hook(lambda _module, _given, out: seen.update(norm=out))
    expected, _ = model(case.ids)
    model.unembed = Embeddings()
    embeddings, _ = model(case.ids)
    assert torch.equal(embeddings, seen["norm"])
    head = case.weights.get("unembed.weight", case.weights["embedding_layer.weight"])
    torch.testing.assert_close(embeddings @ head.T, expected, rtol=1e-5, atol=1e-5)


class Adapter(nn.Module):
    """A linear layer with a low-rank addition."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(2, base.in_features) * 0.1)
        self.b = nn.Parameter(torch.randn(base.out_features, 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T

    def merged(self) -> Tensor:
        return self.base.weight + self.b @ self.a


@torch.inference_mode()
def test_modules_of_the_user_in_the_place_of_linear_layers_compute(case: Case) -> None:
    model = case.model()
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    adapters = {}
    for name in names:
        parent, _, attribute = name.rpartition(".")
        adapters[name] = Adapter(model.get_submodule(name))
        setattr(model.get_submodule(parent), attribute, adapters[name])
    other = case.model()
    for name, adapter in adapters.items():
        other.get_submodule(name).weight.copy_(adapter.merged())
    expected, _ = other(case.ids)
    params = model.initialize_inference_params()
    parts = [
        model(part, inference_params_dict=params)[0] for part in case.ids.split([30, 1, case.ids.shape[1] - 31], 1)
    ]
    assert relative(model(case.ids)[0], expected) < FLOAT32
    assert relative(torch.cat(parts, dim=1), expected) < FLOAT32


def test_adapters_of_peft(evo_case: Case) -> None:
    model = evo_case.model()
    names = ["Wqkv", "out_proj", "projections", "out_filter_dense", "l1", "l2", "l3"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names))
    logits, _ = adapted(evo_case.ids)
    assert relative(logits, evo_case.expected["logits"]) < FLOAT32  # B of LoRA begins at zero
    logits.square().mean().backward()
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * (2 + 3 * 2 + 4 * 3) and all("lora" in name for name in trained)
    assert all(adapted.get_parameter(name).grad is not None for name in trained)


def test_a_block_runs_by_itself(case: Case) -> None:
    """Programs with a loop of their own over the blocks."""
    model = case.model()
    x = model.embedding_layer.embed(case.ids)
    for block in model.blocks:
        x, _ = block(x, inference_params=None, padding_mask=None)
    assert torch.equal(model.unembed.unembed(model.norm(x)), model(case.ids)[0])
    with pytest.raises(InputError, match="call the model"):
        model.blocks[0](x, inference_params=model.initialize_inference_params()["hyena"])


# --- casts and devices -----------------------------------------------------------------------------------------------


def test_the_meta_device_costs_nothing(evo_case: Case) -> None:
    with torch.device("meta"):
        model = StripedHyena(evo_case.config)
    assert all(t.is_meta for t in model.state_dict().values())
    model.to_empty(device="cpu")
    model.load_state_dict(evo_case.weights, strict=True)
    assert relative(model(evo_case.ids)[0], evo_case.expected["logits"]) < FLOAT32


def test_a_deep_copy_is_a_model(evo_case: Case) -> None:
    model = evo_case.model()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.embedding_layer.weight.zero_()
    assert relative(model(evo_case.ids)[0], evo_case.expected["logits"]) < FLOAT32
    other.load_state_dict(evo_case.weights, strict=True)
    assert torch.equal(model(evo_case.ids)[0], other(evo_case.ids)[0])


def test_a_new_model_is_stable() -> None:
    """The original's initialisation is not usable; here an untrained model is one that can be trained."""
    model = StripedHyena(Case.named("sh-tiny").config)
    for block in model.blocks:
        if isinstance(block, ParallelGatedConvBlock):
            assert bool((torch.view_as_complex(block.filter.poles).abs() < 1).all())
    assert bool(model(torch.randint(256, (1, 500)))[0].isfinite().all())


# --- inference parameters --------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_inference_params_are_readable_and_independent_copies_can_be_made(sh_case: Case) -> None:
    model, ids = sh_case.model(), sh_case.ids
    params = model.initialize_inference_params()
    assert params["mha"].max_seqlen == 256
    for name in ("mha", "hyena"):
        params[name].max_batch_size = 2
        params[name].seqlen_offset = 0
    model(ids[:, :20], inference_params_dict=params)
    assert {i: tuple(t.shape) for i, t in params["hyena"].fir_state_dict.items()} == {0: (2, 192, 2), 2: (2, 192, 2)}
    assert {i: tuple(t.shape) for i, t in params["hyena"].state_dict.items()} == {0: (2, 64, 2), 2: (2, 64, 2)}
    shapes = {i: (t.shape[0], *t.shape[2:]) for i, t in params["mha"].key_value_memory_dict.items()}
    assert shapes == {1: (2, 2, 2, 8), 3: (2, 2, 2, 8)}
    assert params["mha"].lengths == [20, 20]
    branch = copy.deepcopy(params)
    a, _ = model(ids[:, 20:], inference_params_dict=params)
    for dictionary in (branch["mha"].key_value_memory_dict, branch["hyena"].fir_state_dict, branch["hyena"].state_dict):
        for key, data in dictionary.items():  # as evo-model moves them
            dictionary[key] = data.to("cpu", copy=True)
    b, _ = model(ids[:, 20:], inference_params_dict=branch)
    assert relative(a, sh_case.expected["logits"][:, 20:]) < FLOAT32 and torch.equal(a, b)
    file = io.BytesIO()
    torch.save(params["hyena"].state_dict, file)
    params["mha"].reset(256, 2)
    params["hyena"].reset()
    again, _ = model(ids, inference_params_dict=params)
    assert relative(again, sh_case.expected["logits"]) < FLOAT32


def test_what_was_read_in_inference_mode_goes_on_outside_of_it(sh_case: Case) -> None:
    model, ids = sh_case.model(), sh_case.ids
    params = model.initialize_inference_params()
    with torch.inference_mode():
        model(ids[:, :20], inference_params_dict=params)
        kv = params["mha"].key_value_memory_dict
        kv.update({key: data.clone() for key, data in kv.items()})  # moved, so made in inference mode
    logits, _ = model(ids[:, 20:], inference_params_dict=params)
    logits.sum().backward()
    assert relative(logits, sh_case.expected["logits"][:, 20:]) < FLOAT32
    stored = [kv, params["hyena"].fir_state_dict, params["hyena"].state_dict]
    assert not any(data.requires_grad for dictionary in stored for data in dictionary.values())
    with torch.inference_mode():
        step, _ = model(sh_case.expected["greedy_ids"][:, :1], inference_params_dict=params)
    assert relative(step, sh_case.expected["decode_logits"][:, :1]) < FLOAT32


@torch.inference_mode()
def test_a_pass_that_fails_changes_nothing(sh_case: Case) -> None:
    model, ids = sh_case.model(), sh_case.ids
    params = model.initialize_inference_params()
    model(ids[:, :20], inference_params_dict=params)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.blocks[3].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, 20:30], inference_params_dict=params)
    handle.remove()
    assert params["mha"].lengths == [20, 20]
    logits, _ = model(ids[:, 20:], inference_params_dict=params)
    assert relative(logits, sh_case.expected["logits"][:, 20:]) < FLOAT32


# --- analysis of filters ---------------------------------------------------------------------------------------------


def test_filters_can_be_read_and_replaced(sh_case: Case, tmp_path: Any) -> None:
    model = sh_case.model()
    part: ParallelHyenaFilter = model.blocks[0].filter
    h, dtype, log_poles, residues = part.compute_filter(50)
    p, r = (torch.view_as_complex(t.double()).squeeze(2)[..., None] for t in (part.poles, part.residues))
    expected = (r * p ** torch.arange(50)).real.sum(1)[None]
    assert dtype == h.dtype == torch.float32 and relative(h, expected) < 1e-5
    torch.testing.assert_close(log_poles.exp() * 1, torch.view_as_complex(part.poles), rtol=1e-5, atol=1e-6)
    assert torch.equal(residues, torch.view_as_complex(part.residues))
    other = {}
    for i in (0, 2):
        for name in ("poles", "residues"):
            other[i, name] = torch.randn(2, 64, dtype=torch.complex64) / 4
            torch.save(other[i, name], tmp_path / f"approx_{name}_{i + 1}.pt")
    model.load_poles_residues(str(tmp_path))
    assert torch.equal(torch.view_as_complex(part.poles)[:, :, 0], other[0, "poles"].T)
    torch.save(torch.randn(3, 64, dtype=torch.complex64), tmp_path / "approx_poles_1.pt")
    with pytest.raises(CheckpointError, match="approx_poles_1"):
        model.load_poles_residues(str(tmp_path))


# --- bad input -------------------------------------------------------------------------------------------------------


def _other_batch(model: StripedHyena) -> None:
    params = model.initialize_inference_params()
    model(torch.zeros(2, 3, dtype=torch.int64), params)
    model(torch.zeros(1, 3, dtype=torch.int64), params)


def _some_layers(model: StripedHyena) -> None:
    params = model.initialize_inference_params()
    model(torch.zeros(2, 3, dtype=torch.int64), params)
    del params["hyena"].state_dict[0]
    model(torch.zeros(2, 3, dtype=torch.int64), params)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model(torch.zeros(4, dtype=torch.int64)), r"\[B,T\]"),
        (lambda model: model([[1, 2]]), r"\[B,T\]"),
        (lambda model: model(torch.zeros(1, 3)), "integers"),
        (lambda model: model(torch.zeros(1, 0, dtype=torch.int64)), "T>=1"),
        (lambda model: model(torch.zeros(0, 3).int(), model.initialize_inference_params()), "B>=1"),
        (lambda model: model(torch.full((1, 3), 256)), "token id 256 is outside the vocabulary of 256"),
        (lambda model: model(torch.full((1, 3), -1)), "token id -1"),
        (lambda model: model(torch.zeros(1, 3).int(), {"mha": 1}), "initialize_inference_params"),
        (lambda model: model(torch.zeros(1, 3).int(), [1]), "initialize_inference_params"),
        (lambda model: model(torch.zeros(1, 3).int(), padding_mask=torch.ones(1, 4)), "shape"),
        (lambda model: model(torch.zeros(1, 3).int(), padding_mask=[[1, 1, 1]]), "list"),
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
def test_mistakes_are_one_line(sh_case: Case, call: Callable[[StripedHyena], Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        call(sh_case.model())
    assert "\n" not in str(caught.value)


def test_configurations_are_checked(sh_case: Case) -> None:
    with pytest.raises(ConfigError, match="hidden_size"):
        StripedHyena({key: value for key, value in sh_case.config.items() if key != "hidden_size"})
    with pytest.raises(ConfigError, match="rotary_emb_base"):
        StripedHyena(sh_case.config | {"rotary_emb_bse": 3})


# --- structure -------------------------------------------------------------------------------------------------------


def test_it_stands_on_these_names_of_hyaena() -> None:
    """A change of one of them is a change of what the two packages agree on."""
    used: dict[str, set[str]] = {}
    for file in (ROOT / "compat" / "stripedhyena" / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.Import) or not any(name.name.startswith("hyaena") for name in node.names)
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hyaena":
                used.setdefault(str(node.module), set()).update(name.name for name in node.names)
    assert used == {
        "hyaena": {"ModelConfig", "layers", "ops"},
        "hyaena.cache": {"Cache"},
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
        "hyaena.errors": {"CheckpointError", "InputError", "printable"},
        "hyaena.filters": {"Float32Parameters", "LongFilter", "ShortFilter"},
        "hyaena.formats": {"config_from_dict"},
        "hyaena.layers": {"Rotary"},
    }


def test_every_module_imports() -> None:
    for name in ("cache", "generation", "layers", "model", "sample", "tokenizer", "utils"):
        assert importlib.import_module(f"stripedhyena.{name}").__doc__
    assert issubclass(InputError, HyaenaError)
