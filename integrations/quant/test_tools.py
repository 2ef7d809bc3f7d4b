"""What torchao, bitsandbytes and PEFT do to linear layers, on models of this package."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import hyaena
from hyaena import checkpoints
from hyaena.errors import HyaenaError
from hyaena.layers import record
from hyaena.model import StripedHyena
from hyaena.quant import quantized_layers

PROMPT = "def __init__(self"
IDS = torch.tensor([list(PROMPT.encode())])


def torchao_int8(model: StripedHyena) -> None:
    quantize_(model, Int8WeightOnlyConfig())


def bitsandbytes_int8(model: StripedHyena) -> None:
    replaced(
        model, lambda old: bnb().nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
    )


def bitsandbytes_nf4(model: StripedHyena) -> None:
    replaced(model, lambda old: bnb().nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4"))


def bnb() -> ModuleType:
    import bitsandbytes

    return bitsandbytes


def replaced(model: StripedHyena, make: Callable[[nn.Linear], nn.Module]) -> None:
    """What transformers does for bitsandbytes: every linear layer becomes one of its modules."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.bias is None:
            owner, _, leaf = name.rpartition(".")
            new = make(module)
            new.load_state_dict(module.state_dict())
            setattr(model.get_submodule(owner), leaf, new.to("cpu"))


TOOLS = pytest.mark.parametrize("tool", [torchao_int8, bitsandbytes_int8, bitsandbytes_nf4])


@TOOLS
def test_a_model_quantized_by_a_tool_computes_and_decodes(tool: Callable[[StripedHyena], None], tmp_path: Path) -> None:
    model, tokenizer = hyaena.load("cub")
    wide = model(IDS).log_softmax(-1)
    tool(model)
    with torch.inference_mode():
        narrow = model(IDS).log_softmax(-1)
    assert 0 < (wide.exp() * (wide - narrow)).sum(-1).mean() < 0.1
    layer = model.layers[0].mlp.up_proj
    assert record(layer) is layer  # called, never read by kernels
    options = {"max_new_tokens": 8, "temperature": 0}
    eager, static = (hyaena.generate(model, tokenizer, PROMPT, decoding=way, **options) for way in ("eager", "static"))
    assert eager.text == static.text and len(static.tokens) == 8
    with pytest.raises(HyaenaError, match=r"cannot save|quantized|split over") as refusal:
        checkpoints.save_model(model, tmp_path / "x")
    assert "\n" not in str(refusal.value) and not list((tmp_path).rglob("*.safetensors"))


@pytest.mark.parametrize("weights", ["int8", "int4", "q8_0", "q4_0"])
def test_torchao_leaves_our_narrow_layers_alone(weights: str) -> None:
    model = hyaena.load_model("cub", weights=weights)
    expected, count = model(IDS), len(quantized_layers(model))
    quantize_(model, Int8WeightOnlyConfig())
    assert torch.equal(model(IDS), expected) and len(quantized_layers(model)) == count


def test_peft_on_plain_layers_of_a_narrow_model() -> None:
    """PEFT knows no foreign narrow layers and says so; our own adapters take them."""
    model = hyaena.load_model("cub", weights="int4")
    with warnings.catch_warnings(), pytest.raises(ValueError, match="QuantizedLinear"):
        warnings.simplefilter("ignore")
        inject_adapter_in_model(LoraConfig(target_modules=["in_proj"]), model)
    hyaena.adapters.add_adapter(model, rank=2)


def test_peft_over_torchao() -> None:
    model = hyaena.load_model("cub")
    quantize_(model, Int8WeightOnlyConfig())
    expected = model(IDS).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(LoraConfig(target_modules=["in_proj", "o_proj"], r=2), model)
    torch.testing.assert_close(model(IDS).detach(), expected)
    model.train()
    model(IDS).square().mean().backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert grads and all(g is not None and bool(g.any()) for g in grads)
