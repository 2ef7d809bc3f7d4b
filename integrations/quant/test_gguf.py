"""GGUF as a storage format: written and read through gguf-py, exact, and whole files only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import hyaena
from hyaena import checkpoints, ops
from hyaena.cli import main
from hyaena.errors import HyaenaError
from hyaena.quant import quantized_layers, round_weight
from hyaena.schemes import SCHEMES

IDS = torch.arange(40)[None]


@pytest.mark.parametrize("weights", ["q8_0", "q4_0", None])
def test_a_model_goes_through_gguf_unchanged(weights: str | None, tmp_path: Path) -> None:
    model = hyaena.load_model("cub", weights=weights, dtype="stored")
    checkpoints.save_model(model, tmp_path / "ours")
    assert main(["convert", f"{tmp_path}/ours", f"{tmp_path}/gguf", "--layout", "gguf"]) == 0
    (tmp_path / "gguf/model.gguf").rename(tmp_path / "x.gguf")
    again, tokenizer = hyaena.load(tmp_path / "x.gguf", dtype="stored")
    assert again.config == model.config and tokenizer.encode("a") is not None
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(t, state[k]) and t.dtype == state[k].dtype for k, t in model.state_dict().items())
    assert main(["info", f"{tmp_path}/x.gguf"]) == 0
    assert main(["convert", f"{tmp_path}/x.gguf", f"{tmp_path}/back"]) == 0
    assert torch.equal(hyaena.load_model(tmp_path / "back")(IDS), hyaena.load_model(tmp_path / "ours")(IDS))


@pytest.mark.parametrize("weights", ["q8_0", "q4_0"])
def test_gguf_py_reads_our_blocks(weights: str, tmp_path: Path) -> None:
    model = hyaena.load_model("cub", weights=weights)
    checkpoints.save_model(model, tmp_path, layout="gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, layer in quantized_layers(model).items():
        tensor = tensors[f"{name}.weight"]
        assert tensor.tensor_type.name == weights.upper()
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(values, ops.widen(layer.record(), torch.float32).numpy())


@pytest.mark.parametrize("weights", ["q8_0", "q4_0"])
def test_blocks_of_other_programs_are_read_exactly(weights: str, tmp_path: Path) -> None:
    """gguf-py's own rounding of a weight, in a file of ours: the same numbers, and errors no smaller than ours."""
    model = hyaena.load_model("cub", weights=weights)
    checkpoints.save_model(model, tmp_path, layout="gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    kind = gguf.GGMLQuantizationType[weights.upper()]
    weight = hyaena.load_model("cub").layers[0].mlp.up_proj.weight.detach()  # type: ignore[union-attr]
    theirs = gguf.quantize(weight.numpy(), kind)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "hyaena-stripedhyena")
    writer.add_string("hyaena.config", reader.fields["hyaena.config"].contents())
    for tensor in reader.tensors:
        data = theirs if tensor.name == "layers.0.mlp.up_proj.weight" else tensor.data
        raw = data if data.dtype == np.uint8 else data.view(np.uint8)
        writer.add_tensor(tensor.name, raw, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = hyaena.load_model(tmp_path / "other.gguf").layers[0].mlp.up_proj  # type: ignore[union-attr]
    values = gguf.dequantize(theirs, kind)
    np.testing.assert_array_equal(values, ops.widen(found.record(), torch.float32).numpy())  # type: ignore[operator]
    ours = ops.widen(round_weight(weight, SCHEMES[weights]), torch.float32)
    assert (ours - weight).square().sum() < (torch.from_numpy(values) - weight).square().sum()


def test_what_is_no_file_of_ours_is_refused(tmp_path: Path) -> None:
    model = hyaena.load_model("cub", weights="int8")
    with pytest.raises(HyaenaError, match="GGUF has no blocks of int8 weights: quantize the model to q8_0 or q4_0"):
        checkpoints.save_model(model, tmp_path, layout="gguf")
    writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(HyaenaError, match="holds no configuration of hyaena"):
        hyaena.load(tmp_path / "llama.gguf")
    checkpoints.save_model(hyaena.load_model("cub", weights="q4_0"), tmp_path / "whole", layout="gguf")
    content = (tmp_path / "whole/model.gguf").read_bytes()
    for cut in (0, 3, 100, 5_000, len(content) // 2):
        (tmp_path / "cut.gguf").write_bytes(content[:cut])
        with pytest.raises(HyaenaError, match=r"cut.gguf: "):
            hyaena.load(tmp_path / "cut.gguf")


def test_other_blocks_are_refused(tmp_path: Path) -> None:
    config = hyaena.load_model("cub").config
    checkpoints.save_model(hyaena.StripedHyena(replace(config, layer_types=("hyena",))), tmp_path, layout="gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "hyaena-stripedhyena")
    writer.add_string("hyaena.config", reader.fields["hyaena.config"].contents())
    for tensor in reader.tensors:
        if tensor.name == "layers.0.mlp.up_proj.weight":
            kind = gguf.GGMLQuantizationType.Q5_0
            writer.add_tensor(tensor.name, gguf.quantize(np.array(tensor.data), kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data.view(np.uint8), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(HyaenaError, match=r"quantized weights .*layers.0.mlp.up_proj.weight is Q5_0"):
        hyaena.load(tmp_path / "other.gguf")
