"""LoRA adapters: read from PEFT's files, merged, attached, trained, written; and files that cannot be used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hyaena
from configs import TINY, TINY_EVO, TINY_EVO2
from hyaena import adapters
from hyaena.adapters import (
    LoRALinear,
    add_adapter,
    merge_adapter,
    read_adapter,
    remove_adapter,
    save_adapter,
    with_adapter,
)
from hyaena.adapters import peft as peft_files
from hyaena.adapters.peft import CONFIG, WEIGHTS
from hyaena.config import ModelConfig
from hyaena.errors import CheckpointError, HyaenaError, InputError, UnsupportedError
from hyaena.filters import LongFilter
from hyaena.formats.stripedhyena import tensors as original
from hyaena.model import StripedHyena
from hyaena.tokenizers import load_tokenizer

IDS = torch.arange(18).reshape(2, 9)
CONFIGS = pytest.mark.parametrize("config", [TINY, TINY_EVO, TINY_EVO2], ids=["untied", "tied", "evo2"])


def adapted(config: ModelConfig = TINY, **options: Any) -> StripedHyena:
    """A model with an adapter that changes something."""
    torch.manual_seed(0)
    model = StripedHyena(config).eval()
    add_adapter(model, **{"rank": 2, **options})
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_B)
    return model


def plain(config: ModelConfig = TINY) -> StripedHyena:
    """The model below the adapter."""
    torch.manual_seed(0)
    return StripedHyena(config).eval()


def close(got: Tensor, expected: Tensor) -> None:
    """Sums in another order, through three layers of float32: some 100 roundings of the largest logit."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(adapted(), tmp_path / "adapter")


# --- the law: merged and attached compute the same -------------------------------------------------------------------


@CONFIGS
@torch.no_grad()
def test_merged_equals_attached_equals_trained(config: ModelConfig, tmp_path: Path) -> None:
    trained, base = adapted(config), plain(config)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    save_adapter(trained, tmp_path / "a")
    view = with_adapter(base, tmp_path / "a")
    assert torch.equal(view(IDS), trained(IDS))
    assert (view(IDS) - base(IDS)).abs().max() > 0.01
    assert all(torch.equal(t, before[name]) for name, t in base.state_dict().items())
    merge_adapter(base, tmp_path / "a")
    close(base(IDS), trained(IDS))


@CONFIGS
@torch.no_grad()
def test_a_merge_equals_its_equation(config: ModelConfig, tmp_path: Path) -> None:
    base, adapter = plain(config), read_adapter(save_adapter(adapted(config), tmp_path / "a"))
    before = {name: t.clone() for name, t in base.state_dict().items()}
    merge_adapter(base, adapter)
    changed = {f"{name}.weight" for name in adapter.updates}
    for name, weight in base.state_dict().items():
        old = before.get(name, before["embed_tokens.weight"])
        if name in changed:
            a, b, scale = adapter.updates[name.removesuffix(".weight")]
            assert scale == 2.0
            torch.testing.assert_close(weight, old + scale * b @ a)
        else:
            assert torch.equal(weight, old)
    assert "lm_head.weight" in base.state_dict() and not base.config.tie_embeddings


@torch.no_grad()
def test_a_merge_into_bfloat16_rounds_once(folder: Path) -> None:
    base, wide = plain().bfloat16(), plain().bfloat16().float()
    merge_adapter(base, folder)
    merge_adapter(wide, folder)
    for (name, got), expected in zip(base.named_parameters(), wide.parameters(), strict=True):
        assert torch.equal(got, expected.to(got.dtype)), name
    poles = [p for name, p in base.named_parameters() if "poles" in name]
    assert poles and all(p.dtype == torch.float32 for p in poles)


@torch.no_grad()
def test_one_model_serves_several_adapters(tmp_path: Path) -> None:
    base = plain()
    expected = []
    for seed in range(2):
        torch.manual_seed(10 + seed)
        trained = adapted()
        torch.manual_seed(10 + seed)
        for module in trained.modules():
            if isinstance(module, LoRALinear):
                nn.init.normal_(module.lora_B)
        save_adapter(trained, tmp_path / str(seed))
        expected.append(trained(IDS))
    views = [with_adapter(base, tmp_path / str(seed)) for seed in range(2)]
    base_tables = [m._tables for m in base.modules() if isinstance(m, LongFilter)]
    for view, want in zip(views, expected, strict=True):
        assert torch.equal(view(IDS), want)
        own = [p for name, p in view.named_parameters() if "lora" not in name]
        known = {p.data_ptr() for p in base.parameters()}
        assert all(p.data_ptr() in known for p in own)
        tables = [m._tables for m in view.modules() if isinstance(m, LongFilter)]
        assert tables and all(a is b for a, b in zip(tables, base_tables, strict=True))
    assert not torch.equal(expected[0], expected[1])
    with pytest.raises(InputError, match="another model"):
        views[0](IDS[:1], cache=views[1].make_cache())


@CONFIGS
@torch.no_grad()
def test_the_splitting_law_holds_with_an_adapter(config: ModelConfig) -> None:
    model = adapted(config)
    logits = model(IDS)
    cache = model.make_cache(2)
    parts = [model(IDS[:, :4], cache=cache), model(IDS[:, 4:], cache=cache)]
    close(torch.cat(parts, dim=1), logits)


@CONFIGS
def test_static_decoding_computes_with_the_adapter(config: ModelConfig) -> None:
    model = adapted(replace(config, vocab_size=264, tokenizer="bytes"))
    tokenizer = load_tokenizer("", model.config)
    tokens = [
        hyaena.generate(model, tokenizer, "abc", max_new_tokens=8, decoding=way).tokens for way in ("eager", "static")
    ]
    assert tokens[0] == tokens[1]
    remove_adapter(model)
    assert hyaena.generate(model, tokenizer, "abc", max_new_tokens=8).tokens != tokens[0]


@torch.no_grad()
def test_without_its_adapter_a_model_is_as_before() -> None:
    for config in (TINY, TINY_EVO):
        model, base = adapted(config), plain(config)
        remove_adapter(model)
        assert torch.equal(model(IDS), base(IDS))
        assert model.state_dict().keys() == base.state_dict().keys()
        with pytest.raises(InputError, match="no adapter"):
            save_adapter(model, "nowhere")


# --- training --------------------------------------------------------------------------------------------------------


def test_training_changes_the_adapter_alone() -> None:
    model = StripedHyena(TINY_EVO)
    before = {name: t.clone() for name, t in model.named_parameters()}
    expected = model(IDS)
    trained = add_adapter(model, rank=2)
    torch.testing.assert_close(model(IDS), expected, rtol=0, atol=1e-6)
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert all(torch.equal(after[name], t) and after[name].grad is None for name, t in before.items())
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in trained)


def test_a_narrow_model_trains_a_float32_adapter() -> None:
    model = StripedHyena(TINY).bfloat16()
    trained = add_adapter(model, rank=2, targets=["in_proj", "lm_head"])
    model(IDS).float().sum().backward()
    assert [p.dtype for p in trained] == [torch.float32] * 6
    assert trained[-1].grad is not None and trained[-1].grad.dtype == torch.float32
    assert {n for n, m in model.named_modules() if isinstance(m, LoRALinear)} == {
        "layers.0.mixer.in_proj", "layers.2.mixer.in_proj", "lm_head",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": True}, "rank is True"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"targets": ["Wqkv"]}, "no linear layer Wqkv"),
        ({"alpha": 0}, "alpha is 0, with which nothing is learned"),
        ({"targets": []}, "targets is empty: choose from qkv_proj"),
        ({"targets": None}, "targets must be names of linear layers, such as qkv_proj, .*, not None"),
        ({"targets": ["o_proj", 5]}, "a target is 5: choose"),
        ({"targets": ""}, "a target is '': choose"),
    ],
)
def test_what_cannot_be_trained_leaves_the_model_alone(options: dict[str, Any], words: str) -> None:
    model = plain()
    with pytest.raises(InputError, match=words):
        add_adapter(model, **options)
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_adapter_is_refused(folder: Path) -> None:
    model = adapted()
    for call in (lambda: add_adapter(model), lambda: merge_adapter(model, folder), lambda: with_adapter(model, folder)):
        with pytest.raises(InputError, match="has an adapter already"):
            call()


def test_a_model_with_an_adapter_is_not_saved_as_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="merge the adapter"):
        hyaena.save_model(adapted(), tmp_path / "out")


# --- PEFT ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_an_adapter_that_peft_trained_over_the_native_model(tmp_path: Path, rank_stabilised: bool) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=list(adapters.TARGETS),
        rank_pattern={"layers.1.mixer.qkv_proj": 2},
        alpha_pattern={"o_proj": 3},
        use_rslora=rank_stabilised,
        init_lora_weights=False,
    )
    model = peft.get_peft_model(plain(), config).eval()
    expected = model(IDS)
    model.save_pretrained(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    assert {len(u.a) for u in adapter.updates.values()} == {2, 4}
    close(with_adapter(plain(), adapter)(IDS), expected)
    merged = plain()
    merge_adapter(merged, adapter)
    close(merged(IDS), expected)


@torch.no_grad()
def test_peft_reads_an_adapter_of_ours(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    trained = adapted()
    save_adapter(trained, tmp_path / "a", base="tiny")
    edit(tmp_path / "a", task_type=None)  # PEFT wants methods of transformers' for any task
    weights = load_file(tmp_path / "a" / WEIGHTS)  # PEFT is given the native module, without the names of hyaena.hf
    save_file(
        {k.replace("model.model.layers", "model.layers"): t for k, t in weights.items()}, tmp_path / "a" / WEIGHTS
    )
    close(peft.PeftModel.from_pretrained(plain(), tmp_path / "a").eval()(IDS), trained(IDS))


@torch.no_grad()
def test_an_adapter_with_the_names_of_the_original(tmp_path: Path, folder: Path) -> None:
    """Its projections are interleaved, and so are the rows of B."""
    expected = with_adapter(plain(), folder)(IDS)
    theirs = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        name, _, factor = key.removeprefix("base_model.model.").removeprefix("model.").partition(".lora_")
        their_name, rows = original.to_theirs(f"{name}.weight", tensor, TINY)
        moved = rows if factor.startswith("B") else tensor
        theirs[f"base_model.model.backbone.{their_name.removesuffix('.weight')}.lora_{factor}"] = moved.contiguous()
    assert "base_model.model.backbone.blocks.0.projections.lora_B.weight" in theirs
    save_file(theirs, folder / WEIGHTS)
    assert torch.equal(with_adapter(plain(), folder)(IDS), expected)


# --- the interfaces --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_load_merges(tmp_path: Path, folder: Path) -> None:
    hyaena.save_model(plain(), tmp_path / "base")
    close(hyaena.load_model(tmp_path / "base", adapter=folder)(IDS), adapted()(IDS))
    with pytest.raises(CheckpointError, match="no such folder"):
        hyaena.load_model("someone/of-no-interest", adapter=tmp_path / "nothing")


# --- what cannot be used ---------------------------------------------------------------------------------------------


def edit(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **changes}))


def swap(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


KEY = "base_model.model.model.layers.0.mixer.in_proj.lora_A.weight"


def _name(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors.pop(KEY)


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (lambda f: (f / CONFIG).unlink(), CheckpointError, "an adapter without its adapter_config.json"),
        (lambda f: (f / WEIGHTS).unlink(), CheckpointError, "no adapter_model.safetensors"),
        (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), CheckpointError, "safe_serialization"),
        (lambda f: (f / CONFIG).write_text("{"), CheckpointError, "not valid JSON"),
        (lambda f: (f / CONFIG).write_text("[]"), CheckpointError, "does not map names to values"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), CheckpointError, "truncated or corrupt"),
        (lambda f: edit(f, peft_type="LOHA"), UnsupportedError, "type 'LOHA'"),
        (lambda f: edit(f, peft_type=None), UnsupportedError, "type None"),
        (lambda f: edit(f, use_dora=True), UnsupportedError, "DoRA"),
        (lambda f: edit(f, modules_to_save=["score"]), UnsupportedError, "whole modules"),
        (lambda f: edit(f, bias="all"), UnsupportedError, "biases"),
        (lambda f: edit(f, init_lora_weights="pissa"), UnsupportedError, "begun with 'pissa'"),
        (lambda f: edit(f, fan_in_fan_out=True), UnsupportedError, "fan_in_fan_out"),
        (lambda f: edit(f, a_key_of_tomorrow=1), UnsupportedError, "a_key_of_tomorrow"),
        (lambda f: edit(f, rank_pattern={"(a+)+$": 2}), UnsupportedError, "regular expression"),
        (lambda f: edit(f, rank_pattern=["x"]), CheckpointError, "rank_pattern"),
        (lambda f: edit(f, r=3), CheckpointError, "ranks 2 and 2"),
        (lambda f: edit(f, r="2"), CheckpointError, "r is '2'"),
        (lambda f: edit(f, r=10**9), CheckpointError, "from 1 to 1024"),
        (lambda f: edit(f, lora_alpha=None), CheckpointError, "lora_alpha is None"),
        (lambda f: swap(f, lambda t: t.pop(KEY)), CheckpointError, "has no lora_A"),
        (lambda f: swap(f, lambda t: t[KEY].fill_(torch.nan)), CheckpointError, "not finite"),
        (lambda f: swap(f, lambda t: t.update({KEY: t[KEY].int()})), CheckpointError, "int32"),
        (lambda f: swap(f, lambda t: t.update({KEY: t[KEY][0]})), CheckpointError, r"float32 \[16\]"),
        (lambda f: swap(f, lambda t: _name(t, "model.score.weight")), UnsupportedError, "no factor of a linear layer"),
        (lambda f: swap(f, lambda t: t.clear() or t.update(x=torch.ones(1))), UnsupportedError, "no factor"),
    ],
)
def test_files_that_cannot_be_used(folder: Path, damage: Any, kind: type[HyaenaError], words: str) -> None:
    damage(folder)
    with pytest.raises(kind, match=words) as refused:
        read_adapter(folder)
    assert str(refused.value).startswith(str(folder)) and "\n" not in str(refused.value)


@pytest.mark.parametrize("way", [merge_adapter, with_adapter])
def test_adapters_of_other_models(folder: Path, way: Any) -> None:
    other = plain(TINY_EVO)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"another shape \(layers.1.mixer.qkv_proj is \[32, 16\], expected"):
        way(other, folder)
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())
    swap(folder, lambda t: t.update({k.replace("qkv_proj", "q_proj"): t.pop(k) for k in list(t) if "qkv_proj" in k}))
    with pytest.raises(CheckpointError, match=r"does not have \(layers.1.mixer.q_proj\)"):
        way(plain(), folder)


def test_neither_a_model_nor_an_empty_folder_is_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json here"):
        read_adapter(tmp_path)
    hyaena.save_model(plain(), tmp_path)
    with pytest.raises(CheckpointError, match="a model, not an adapter"):
        read_adapter(tmp_path)


@torch.no_grad()
def test_copies_of_the_embedding_must_be_those_of_the_model(folder: Path) -> None:
    """PEFT writes them beside an adapter of the head."""
    expected = with_adapter(plain(), folder)(IDS)
    copies = {
        "base_model.model.model.embed_tokens.weight": plain().embed_tokens.weight.detach(),
        "base_model.model.lm_head.base_layer.weight": plain().lm_head.weight.detach(),  # type: ignore[union-attr]
    }
    swap(folder, lambda t: t.update(copies))
    assert torch.equal(with_adapter(plain(), folder)(IDS), expected)
    for name, tensor in copies.items():
        swap(folder, lambda t, name=name, tensor=tensor: t.update({**copies, name: tensor + 1}))
        with pytest.raises(CheckpointError, match=r"\.weight, which differs from this model's"):
            with_adapter(plain(), folder)


def test_an_update_beyond_the_range_of_the_weights_is_refused(folder: Path) -> None:
    edit(folder, lora_alpha=1e8)
    model = plain().half()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="wider dtype"):
        merge_adapter(model, folder)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_save_is_the_old_or_the_new(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    reason = "No space left on device"
    for error in (OSError(28, reason), SafetensorError(f"I/O error: {reason}")):  # either, by where it happens
        monkeypatch.setattr(peft_files, "save_file", Mock(side_effect=error))
        with pytest.raises(CheckpointError, match=f"{reason}.*nothing there is lost"):
            save_adapter(adapted(), folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the name is not UTF-8, which safetensors needs"):
        save_adapter(adapted(), tmp_path / os.fsdecode(b"a\xff"))
    assert not [*tmp_path.iterdir()]
