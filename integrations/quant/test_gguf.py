"""GGUF as a storage format: written and read through gguf-py, exact, and whole files only."""

from __future__ import annotations

import random
import resource
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


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of one layer, most of which is header and tensor table for its size."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = replace(hyaena.load_model("cub").config, layer_types=("hyena",), weights="q4_0", vocab_size=264, **sizes)
    checkpoints.save_model(hyaena.StripedHyena(config), folder, layout="gguf")
    return (folder / "model.gguf").read_bytes()


@pytest.mark.parametrize("seed", range(8))
def test_damaged_headers_are_one_line_and_take_no_memory(seed: int, small: bytes, tmp_path: Path) -> None:
    """Bytes changed, counts and offsets of 64 bits replaced, and files cut: none loads forever or fills memory."""
    rng, header, path = random.Random(seed), 4000, tmp_path / "damaged.gguf"
    counts = [n.to_bytes(8, "little") for n in (0, 1, 10**9, 2**31, 2**40, 2**62, 2**64 - 1)]
    for _ in range(60):
        content, kind = bytearray(small), rng.randrange(3)
        place = rng.randrange(header)
        if kind == 0:
            content[place] = rng.randrange(256)
        elif kind == 1:
            content[place : place + 8] = rng.choice(counts)
        else:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:  # a byte of a weight may change, and nothing be wrong
            hyaena.load_model(path)
        except HyaenaError as error:
            assert "\n" not in str(error) and "damaged.gguf" in str(error)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


@pytest.mark.parametrize(("dtype", "kind"), [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32")])
def test_plain_numbers_are_those_that_gguf_py_reads(dtype: str, kind: str, tmp_path: Path) -> None:
    model = hyaena.load_model("cub", dtype=dtype)
    checkpoints.save_model(model, tmp_path, layout="gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    again = hyaena.load_model(tmp_path / "model.gguf", dtype="stored").state_dict()
    for name, weight in model.state_dict().items():
        tensor = tensors[name]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape)
        np.testing.assert_array_equal(values, weight.float().numpy())
        assert torch.equal(again[name], weight)
        if name.endswith("mlp.up_proj.weight"):
            assert tensor.tensor_type.name == kind
