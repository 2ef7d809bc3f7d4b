"""Models with narrow weights: what they compute, how they are decoded, saved, quantized on disk, adapted; refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hyaena
from configs import TINY, TINY_EVO, TINY_EVO2
from hyaena import checkpoints, ops
from hyaena.adapters import add_adapter, merge_adapter, save_adapter, with_adapter
from hyaena.cli import main
from hyaena.config import ModelConfig
from hyaena.errors import CheckpointError, ConfigError, HyaenaError, InputError
from hyaena.layers import record
from hyaena.model import StripedHyena
from hyaena.quant import QuantizedLinear, collect_moments, quantized_layers, round_weight
from hyaena.quant.moments import expected_moments
from hyaena.schemes import SCHEMES
from hyaena.sizes import ModelSizes
from hyaena.train.config import TrainConfig
from hyaena.train.start import find_start

WIDE = {"hidden_size": 64, "intermediate_size": 96, "tokenizer": "bytes", "vocab_size": 264}
CONFIGS = [replace(config, **WIDE) for config in (TINY, TINY_EVO, TINY_EVO2)]
IDS = torch.arange(18).reshape(2, 9)
ALL = pytest.mark.parametrize("name", [name for name in SCHEMES if name != "int4-128"])
KINDS = pytest.mark.parametrize("config", CONFIGS, ids=["untied", "tied", "evo2"])


def saved(folder: Path, config: ModelConfig = CONFIGS[0], **options: str) -> Path:
    torch.manual_seed(0)
    return checkpoints.save_model(StripedHyena(config), folder / "wide", **options)  # type: ignore[arg-type]


def widened(model: StripedHyena, path: Path) -> StripedHyena:
    """The model of a checkpoint with the numbers of a narrow one in its linear layers."""
    wide = checkpoints.load_model(path)
    with torch.no_grad():
        for name, layer in quantized_layers(model).items():
            wide.get_submodule(name).weight.copy_(ops.widen(layer.record(), torch.float32))  # type: ignore[union-attr]
    return wide


@ALL
@KINDS
def test_a_model_computes_with_the_widened_weights(name: str, config: ModelConfig, tmp_path: Path) -> None:
    path = saved(tmp_path, config)
    model = checkpoints.load_model(path, weights=name)
    layers = quantized_layers(model)
    assert model.config.weights == name and len(layers) == sum(
        type(m) is torch.nn.Linear for m in widened(model, path).modules()
    )
    expected = widened(model, path)(IDS)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-5)
    distance = (expected - checkpoints.load_model(path)(IDS)).norm() / expected.norm()
    assert 0 < distance < (0.4 if SCHEMES[name].bits == 4 else 0.12 if name == "float8" else 0.06)


@ALL
@KINDS
def test_steps_equal_forward(name: str, config: ModelConfig, tmp_path: Path) -> None:
    model, tokenizer = hyaena.load(saved(tmp_path, config), weights=name)
    prompts = ["abcdefghijkl", "xyz"]
    ways = [
        hyaena.generate(model, tokenizer, prompts, max_new_tokens=6, temperature=0, logprobs=1, decoding=way)
        for way in ("eager", "static")
    ]
    for eager, static in zip(*ways, strict=True):
        assert eager.tokens == static.tokens
        assert eager.logprobs == pytest.approx(static.logprobs, abs=1e-4)


@ALL
@KINDS
def test_a_saved_model_is_the_same_model(name: str, config: ModelConfig, tmp_path: Path) -> None:
    path = saved(tmp_path, config)
    model = checkpoints.load_model(path, weights=name)
    again = checkpoints.load_model(checkpoints.save_model(model, tmp_path / "narrow", max_shard_size=9_000))
    assert json.loads((tmp_path / "narrow/config.json").read_text())["weights"] == name
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    copied = StripedHyena(model.config)
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied.eval()(IDS), model(IDS))


@ALL
@pytest.mark.parametrize("layout", ["hyaena", "original", "transformers"])
def test_quantizing_on_disk_is_quantizing_while_loading(name: str, layout: str, tmp_path: Path) -> None:
    path = saved(tmp_path, layout=layout)
    assert (
        main(["quantize", str(path), "--weights", name, "--output", f"{tmp_path}/a", "--max-shard-size", "20KB"]) == 0
    )
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    streamed, loaded = checkpoints.load_model(tmp_path / "a"), checkpoints.load_model(path, weights=name)
    assert all(torch.equal(t, loaded.state_dict()[key]) for key, t in streamed.state_dict().items())
    assert main(["convert", f"{tmp_path}/a", f"{tmp_path}/b"]) == 0
    assert torch.equal(checkpoints.load_model(tmp_path / "b")(IDS), loaded(IDS))


def test_the_bundled_model_in_8_and_4_bits(tmp_path: Path) -> None:
    model, _ = hyaena.load("cub")
    ids = torch.tensor([list(b"def __init__(self, name):\n    self.name = ")])
    wide = model(ids).log_softmax(-1)
    for weights, limit in (("int8", 0.001), ("int4", 0.1)):
        narrow = hyaena.load_model("cub", weights=weights)(ids).log_softmax(-1)
        assert (wide.exp() * (wide - narrow)).sum(-1).mean() < limit


def test_casts_leave_codes_and_scales_alone(tmp_path: Path) -> None:
    model = checkpoints.load_model(saved(tmp_path, CONFIGS[1]), weights="int4")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    model.bfloat16()
    assert model.dtype == torch.bfloat16 and model(IDS).dtype == torch.bfloat16
    for key, t in model.float().state_dict().items():
        if key.endswith((".codes", ".scale", ".minimum")):
            assert t.dtype == before[key].dtype and torch.equal(t, before[key])


def test_dtypes_are_those_asked_for(tmp_path: Path) -> None:
    path = checkpoints.save_model(
        checkpoints.load_model(saved(tmp_path), weights="int8"), tmp_path / "n", dtype="bfloat16"
    )
    stored = load_file(path / "model.safetensors")
    assert stored["layers.0.mixer.in_proj.codes"].dtype == torch.int8
    assert stored["layers.0.mixer.in_proj.scale"].dtype == torch.float32
    assert stored["embed_tokens.weight"].dtype == stored["norm.weight"].dtype == torch.bfloat16
    assert stored["layers.0.mixer.long_filter.poles"].dtype == torch.float32


def test_filters_norms_and_embedding_stay(tmp_path: Path) -> None:
    path = saved(tmp_path, CONFIGS[2])
    model, wide = checkpoints.load_model(path, weights="q4_0"), checkpoints.load_model(path)
    state = model.state_dict()
    kept = [name for name in wide.state_dict() if name in state]
    assert all(torch.equal(state[name], wide.state_dict()[name]) for name in kept)
    assert any("long_filter" in name for name in kept) and any("short_filter" in name for name in kept)


def test_a_head_of_its_own_has_8_bits() -> None:
    heads = {
        name: quantized_layers(StripedHyena(replace(CONFIGS[0], weights=name)))["lm_head"] for name in ("int4", "q4_0")
    }
    assert {name: head.scheme.name for name, head in heads.items()} == {"int4": "int8", "q4_0": "q8_0"}


@KINDS
def test_sizes_count_the_bytes_that_are_stored(config: ModelConfig) -> None:
    for name in (None, "int8", "int4", "q8_0", "q4_0"):
        config = replace(config, weights=name)
        model = StripedHyena(config)
        stored = sum(t.nbytes for t in model.state_dict().values())
        rotary = 0 if model.rotary.frequencies is None else model.rotary.frequencies.nbytes
        assert ModelSizes(config).weight_bytes(4) == stored - rotary


def test_kernels_get_the_record_and_hooks_the_module(tmp_path: Path) -> None:
    layer = QuantizedLinear(64, 32, SCHEMES["int4"])
    assert isinstance(record(layer), ops.Narrow)
    layer.register_forward_hook(lambda *_: None)
    assert record(layer) is layer


def test_moments_are_those_of_the_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = checkpoints.load_model(saved(tmp_path))
    found, seen = collect_moments(model, torch.arange(40)), []
    hook = model.layers[0].mixer.in_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr]
    model(torch.arange(40)[None])
    hook.remove()
    x, weight = seen[0][0], model.get_parameter("layers.0.mixer.in_proj.weight")
    known = 64 * x.square().mean() * expected_moments(weight)  # as of 64 tokens beside the 40 of the text
    torch.testing.assert_close(found["layers.0.mixer.in_proj"], (x.T @ x + known) / (40 + 64))
    assert len(found) == len(quantized_layers(checkpoints.load_model(saved(tmp_path), weights="int8")))
    arguments = ["quantize", str(tmp_path / "wide"), "--weights", "int4", "--output", f"{tmp_path}/o", "--force"]
    line = "has 11 tokens, fewer than the 96 inputs of a layer"
    for text, told in (("some text", True), ("some text to read " * 20, False)):
        (tmp_path / "text.txt").write_text(text)
        assert main([*arguments, "--calibrate", f"{tmp_path}/text.txt"]) == 0
        assert (line in capsys.readouterr().err) == told
    plain = checkpoints.load_model(tmp_path / "wide", weights="int4").state_dict()
    assert not all(torch.equal(t, plain[k]) for k, t in checkpoints.load_model(tmp_path / "o").state_dict().items())


def test_moments_of_wide_inputs_are_those_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = checkpoints.load_model(saved(tmp_path)), torch.arange(40)
    monkeypatch.setattr("hyaena.quant.calibrate.expected_moments", lambda _: torch.zeros(()))
    whole = collect_moments(model, ids)
    monkeypatch.setattr("hyaena.quant.moments.BLOCK", 30)  # 64 inputs are blocks of 22, 22 and 20, 96 are four of 24
    for name, blocks in collect_moments(model, ids).items():
        inputs = whole[name].shape[1]
        size = {64: 22, 96: 24}[inputs]
        assert blocks.shape == (-(-inputs // size), size, size)
        for i, block in enumerate(blocks):
            part = slice(size * i, min(size * (i + 1), inputs))
            length = part.stop - part.start
            torch.testing.assert_close(block[:length, :length], whole[name][0, part, part])
            assert not block[length:].any() and not block[:, length:].any()
    checkpoints.load_model(tmp_path / "wide", weights="int4", moments=collect_moments(model, ids))


def test_moments_of_other_inputs_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    for shape in ((64,), (1, 32, 32), (1, 64, 3)):
        with pytest.raises(InputError, match=r"in_proj.weight: moments .* are not those of 64 inputs: take them from"):
            checkpoints.load_model(path, weights="int8", moments={"layers.0.mixer.in_proj": torch.ones(*shape)})
    with pytest.raises(InputError, match=r"moments \[3\] are not those of 64 inputs: give one for each"):
        round_weight(torch.ones(2, 64), SCHEMES["int8"], torch.ones(3))


def test_moments_of_other_layers_are_refused(tmp_path: Path) -> None:
    path, moments = saved(tmp_path), torch.eye(64)[None]
    for name, weights in (("model.layers.0.mixer.in_proj", "int8"), ("layers.0.mixer.in_proj", None)):
        with pytest.raises(InputError, match=rf"moments of {name}, whose weights do not become narrow: "):
            checkpoints.load_model(path, weights=weights, moments={name: moments})
    with pytest.raises(InputError, match=r"moments of lm_heed, whose"):
        checkpoints.quantize_checkpoint(checkpoints.find(path), tmp_path / "o", "int8", moments={"lm_heed": moments})
    assert not (tmp_path / "o").exists()


def test_a_calibration_text_without_characters_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("")
    arguments = ["quantize", "cub", "--weights", "int4", "--output", f"{tmp_path}/o"]
    assert main([*arguments, "--calibrate", f"{tmp_path}/text.txt"]) != 0
    assert f"--calibrate {tmp_path}/text.txt: " in capsys.readouterr().err and not (tmp_path / "o").exists()


# --- adapters ---------------------------------------------------------------------------------------------------------


@KINDS
def test_an_adapter_over_narrow_weights_trains_and_serves(config: ModelConfig, tmp_path: Path) -> None:
    path = saved(tmp_path, config)
    model = checkpoints.load_model(path, weights="int4").train()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    parameters = add_adapter(model, rank=4)
    optimizer, losses = torch.optim.AdamW(parameters, lr=0.02), []
    for _ in range(6):
        loss = torch.nn.functional.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    state = model.state_dict()
    base = {key.replace(".base_layer", ""): t for key, t in state.items() if ".lora_" not in key}
    assert all(torch.equal(base[key], t) for key, t in before.items())
    save_adapter(model, tmp_path / "adapter")
    served = with_adapter(checkpoints.load_model(path, weights="int4"), tmp_path / "adapter")
    torch.testing.assert_close(served(IDS), model.eval()(IDS))


def test_what_cannot_be_done_with_narrow_weights_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    adapted = checkpoints.load_model(path)
    add_adapter(adapted, rank=2)
    save_adapter(adapted, tmp_path / "adapter")
    model = checkpoints.load_model(path, weights="int8")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(InputError, match=r"has int8 weights, into which no adapter is merged: .*with_adapter"):
        merge_adapter(model, tmp_path / "adapter")
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    with pytest.raises(InputError, match="cannot be merged into int8 weights: load the model without it"):
        hyaena.load(path, weights="int8", adapter=tmp_path / "adapter")
    narrow = checkpoints.save_model(model, tmp_path / "narrow")
    for refused in (
        lambda: hyaena.load_model(narrow, weights="int4"),
        lambda: checkpoints.quantize_checkpoint(checkpoints.find(narrow), tmp_path / "x", "int4"),
        lambda: checkpoints.quantize_checkpoint(checkpoints.find(narrow), tmp_path / "x", "int8"),
    ):
        with pytest.raises(InputError, match="has int8 weights already"):
            refused()
    for layout, words in (("transformers", "torchao or bitsandbytes"), ("original", "weights")):
        with pytest.raises(HyaenaError, match=words):
            checkpoints.save_model(model, tmp_path / "x", layout=layout)  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists() or not any((tmp_path / "x").iterdir())
    config = TrainConfig.from_file("configs/train/finetune.yml", [f"init_from={narrow}"])
    with pytest.raises(ConfigError, match="int8 weights, which are not trained: start from the model"):
        find_start(config)


def test_widths_that_are_no_whole_groups_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, replace(TINY, hidden_size=48))
    with pytest.raises(InputError, match=r"layers.0.mixer.in_proj has 48 inputs.*groups of 32 of int4: choose int8"):
        checkpoints.load_model(path, weights="int4")
    with pytest.raises(InputError, match="choose int8"):
        checkpoints.quantize_checkpoint(checkpoints.find(path), tmp_path / "x", "q4_0")
    assert not (tmp_path / "x").exists() or not any((tmp_path / "x").iterdir())
    with pytest.raises(ConfigError, match="weights is 'int3': choose one of int8"):
        replace(TINY, weights="int3")


def test_a_weight_too_large_for_its_scales_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, layout="original")
    state = load_file(path / "model.safetensors")
    state["blocks.1.mlp.l2.weight"][3, 4] = 1e9
    save_file(state, path / "model.safetensors")
    with pytest.raises(InputError, match=r"wide, blocks\.1\.mlp\.l2\.weight: a weight is too large .*: choose int8"):
        hyaena.load_model(path, weights="int4")
    hyaena.load_model(path, weights="int8")


def test_checkpoints_of_other_tools_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ConfigError, match="quantization_config: quantized checkpoints cannot be read"):
        hyaena.load_model(path)
    (path / "config.json").write_text(json.dumps(config))
    state = load_file(path / "model.safetensors")
    poles = "layers.0.mixer.long_filter.poles"
    save_file(state | {poles: state[poles].to(torch.int8)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"quantized weights .*{poles} is int8"):
        hyaena.load_model(path, weights="int8")
    narrow = checkpoints.save_model(checkpoints.load_model(saved(tmp_path), weights="int4"), tmp_path / "n")
    state, codes = load_file(narrow / "model.safetensors"), "layers.0.mixer.in_proj.codes"
    save_file(state | {codes: state[codes].view(torch.int8)}, narrow / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{codes} is int8"):
        hyaena.load_model(narrow)
