"""PEFT over ``hyaena.hf``: LoRA on every linear layer, read natively, merged, exported; heads that load again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model

import hyaena
import hyaena.hf
from configs import TINY, TINY_EVO, TINY_EVO2
from hyaena.adapters import read_adapter, with_adapter
from hyaena.cli import main
from hyaena.config import ModelConfig
from hyaena.errors import UnsupportedError
from hyaena.hf import LORA_TARGETS, StripedHyenaForCausalLM, StripedHyenaForSequenceClassification
from hyaena.model import StripedHyena

IDS = torch.arange(18).reshape(2, 9)
CONFIGS = pytest.mark.parametrize("config", [TINY, TINY_EVO, TINY_EVO2], ids=["untied", "tied", "evo2"])


def plain(config: ModelConfig) -> StripedHyena:
    torch.manual_seed(0)
    return StripedHyena(config).eval()


def adapted(config: ModelConfig = TINY, model: StripedHyena | None = None, **options: Any) -> PeftModel:
    """Every factor random, so that the adapter changes something."""
    settings = {"r": 4, "target_modules": list(LORA_TARGETS), "task_type": "CAUSAL_LM", "init_lora_weights": False}
    base = StripedHyenaForCausalLM.from_native(plain(config) if model is None else model)
    return get_peft_model(base, LoraConfig(**{**settings, **options})).eval()


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """A merge sums in another order: some 100 roundings of the largest logit."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@CONFIGS
def test_the_targets_are_all_linear_layers(config: ModelConfig) -> None:
    model = StripedHyenaForCausalLM.from_native(plain(config))
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert names == set(LORA_TARGETS)


@CONFIGS
@pytest.mark.parametrize("copies", [True, False], ids=["with embedding", "without"])
@torch.no_grad()
def test_an_adapter_gives_equal_logits_in_peft_and_natively(config: ModelConfig, tmp_path: Path, copies: bool) -> None:
    model = adapted(config)
    expected = model(IDS).logits
    model.save_pretrained(str(tmp_path), save_embedding_layers=copies)
    assert bool(read_adapter(tmp_path).copies) == copies
    assert torch.equal(with_adapter(plain(config), tmp_path)(IDS), expected)
    again = PeftModel.from_pretrained(StripedHyenaForCausalLM.from_native(plain(config)), str(tmp_path)).eval()
    assert torch.equal(again(IDS).logits, expected)
    assert (expected - plain(config)(IDS)).abs().max() > 0.1


@torch.no_grad()
def test_an_adapter_of_ours_loads_in_peft(tmp_path: Path) -> None:
    model = plain(TINY)
    hyaena.adapters.add_adapter(model, rank=3)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    hyaena.adapters.save_adapter(model, tmp_path)
    again = PeftModel.from_pretrained(StripedHyenaForCausalLM.from_native(plain(TINY)), str(tmp_path)).eval()
    close(again(IDS).logits, model(IDS))


@torch.no_grad()
def test_a_merge_by_peft_is_saved_in_every_layout(tmp_path: Path) -> None:
    model = adapted()
    expected = model(IDS).logits
    native = model.merge_and_unload().to_native()
    for layout in ("hyaena", "original"):
        hyaena.save_model(native, tmp_path / layout, layout=layout)
        close(hyaena.load_model(tmp_path / layout)(IDS), expected)


@CONFIGS
@pytest.mark.parametrize("layout", ["hyaena", "original", "transformers"])
@torch.no_grad()
def test_convert_merges_an_adapter(config: ModelConfig, layout: str, tmp_path: Path) -> None:
    """Where the head is tied, PEFT's own merge changes the embedding, too; this one gives the head its own matrix."""
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    hyaena.save_model(plain(config), base)
    model = adapted(config)
    expected = model(IDS).logits
    model.save_pretrained(str(adapter))
    assert main(["convert", str(base), str(out), "--adapter", str(adapter), "--layout", layout]) == 0
    merged = hyaena.load_model(out)
    close(merged(IDS), expected)
    assert torch.equal(merged.embed_tokens.weight, plain(config).embed_tokens.weight)
    close(StripedHyenaForCausalLM.from_pretrained(out)(IDS).logits, expected)


def test_convert_writes_nothing_for_an_adapter_that_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    hyaena.save_model(plain(TINY_EVO), base)
    adapted(TINY).save_pretrained(str(adapter))
    for folder, words in ((adapter, "a model of another shape"), (tmp_path / "none", "no such folder")):
        assert main(["convert", str(base), str(out), "--adapter", str(folder)]) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1
    assert not out.exists()


def test_the_head_of_a_classifier_is_saved_and_loads_again(tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = StripedHyenaForSequenceClassification.from_native(plain(TINY), num_labels=3)
    lora = LoraConfig(r=2, target_modules=["in_proj", "qkv_proj"], task_type="SEQ_CLS", modules_to_save=["score"])
    model = get_peft_model(base, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    for _ in range(3):
        model(IDS, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(tmp_path))
    fresh = StripedHyenaForSequenceClassification.from_native(plain(TINY), num_labels=3)
    with torch.no_grad():
        again = PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
        assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)
    with pytest.raises(UnsupportedError, match="whole modules"):
        read_adapter(tmp_path)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.equal(gradient, gradients[1][name]), name


def test_a_bfloat16_model_keeps_its_poles(tmp_path: Path) -> None:
    model = adapted(model=plain(TINY).bfloat16()).train()
    before = {name: p.clone() for name, p in model.named_parameters() if "long_filter" in name}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.save_pretrained(str(tmp_path))
    merged = model.merge_and_unload()
    for name, parameter in merged.named_parameters():
        if "poles" in name or "residues" in name:
            assert parameter.dtype == torch.float32 and torch.equal(parameter, before[f"base_model.model.{name}"])
        elif "weight" in name:
            assert parameter.dtype == torch.bfloat16
    with torch.no_grad():  # the same weights, each merged and rounded on its own
        native = plain(TINY).bfloat16()
        hyaena.adapters.merge_adapter(native, tmp_path)
        got, expected = native(IDS).float(), merged.eval()(IDS).logits.float()
        torch.testing.assert_close(got, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
