"""A model with FP8 input projections: files in and out, scales, laws, modes. The model is the golden tiny Evo 2."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import hyaena
from hyaena.adapters import Adapter, Update, merge_adapter, with_adapter
from hyaena.checkpoints import load_model, save_model
from hyaena.cli import main
from hyaena.config import ModelConfig
from hyaena.errors import CheckpointError, ConfigError, InputError
from hyaena.formats.evo2.extra_state import read_scales, write_scales
from hyaena.fp8 import FP8Linear, set_fp8
from hyaena.layers import MIXERS
from hyaena.model import StripedHyena

FP8_LAYERS = (0, 1, 2, 4, 5)


def written(folder: Path, golden: Path, *, pickled: bool = True, fp8: bool = True, **states: Any) -> Path:
    """The golden model with scales, each for its weights and all different, as an original file.

    Args:
        states: extra states by layer, ``l2=...``, in the place of these; None for none.
    """
    config = yaml.safe_load((golden / "evo2-tiny/config.yml").read_text())
    state: dict[str, Any] = load_file(golden / "evo2-tiny/model.safetensors")
    state = {key: tensor for key, tensor in state.items() if "_extra_state" not in key}
    for i in FP8_LAYERS:
        content = write_scales(30.0 + i, 448 / float(state[f"blocks.{i}.projections.weight"].abs().max()))
        content = states.get(f"l{i}", content)
        if content is not None:
            whole = torch.tensor(list(content), dtype=torch.uint8)
            state[f"blocks.{i}.projections._extra_state"] = io.BytesIO(content) if pickled else whole
    state["blocks.3.mixer.attn._extra_state"] = io.BytesIO(b"x") if pickled else torch.ones(2)
    folder.mkdir()
    (folder / "config.yml").write_text(yaml.safe_dump(config | {"use_fp8_input_projections": fp8}))
    if pickled:
        torch.save(state, folder / "model.pt")
    else:
        save_file(state, folder / "model.safetensors")
    return folder


def scales(model: torch.nn.Module) -> list[list[float]]:
    return [module.scales.tolist() for module in model.modules() if isinstance(module, FP8Linear)]


@pytest.fixture
def folder(tmp_path: Path, golden: Path) -> Path:
    return written(tmp_path / "model", golden)


@pytest.fixture
def ids(golden: Path) -> Tensor:
    return load_file(golden / "evo2-tiny/expected.safetensors")["input_ids"]


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "stored"])
def test_scales_come_from_the_extra_states(tmp_path: Path, golden: Path, pickled: bool, dtype: str) -> None:
    model = load_model(written(tmp_path / "model", golden, pickled=pickled), dtype=dtype)
    found = scales(model)
    assert [pair[0] for pair in found] == [30.0 + i for i in FP8_LAYERS]
    layers = [module for module in model.modules() if isinstance(module, FP8Linear)]
    assert all(layer.scales.dtype == torch.float32 for layer in layers)
    for layer in layers:
        torch.testing.assert_close(
            float(layer.scales[1]), 448 / float(layer.weight.detach().abs().max()), rtol=1e-2, atol=0
        )


@torch.no_grad()
def test_plain_and_exact(folder: Path, golden: Path, ids: Tensor) -> None:
    logits = load_file(golden / "evo2-tiny/expected.safetensors")["logits"]
    exact = hyaena.load_model(folder, fp8="exact")(ids)
    for mode in ("auto", "off"):  # the golden numbers were made without FP8
        assert float((hyaena.load_model(folder, fp8=mode)(ids) - logits).abs().max()) < 1e-5 * float(logits.abs().max())
    # e4m3 keeps 3 fraction bits: five layers of it move the logits of random weights far, and keep them related.
    assert 1e-2 < float((exact - logits).norm() / logits.norm()) < 0.5


@torch.no_grad()
def test_the_splitting_law_in_exact_mode(folder: Path, ids: Tensor) -> None:
    """In float64, since a rounding of float32 may carry an input over to the next e4m3 number."""
    model = hyaena.load_model(folder, dtype="float64", fp8="exact")
    whole = model(ids)
    cache = model.make_cache(len(ids), max_length=ids.shape[1])
    parts = [model(part, cache=cache) for part in ids.split([17, 1, 1, ids.shape[1] - 19], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    other = hyaena.load_model(folder, dtype="float64", fp8="off")(ids)
    assert float((other - whole).abs().max()) > 1e-3


def test_static_decoding_calls_the_layer(folder: Path) -> None:
    model, tokenizer = hyaena.load(folder, dtype="float64", fp8="exact")
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0, "logprobs": 1}
    static, eager = (
        hyaena.generate(model, tokenizer, "ACGTACGGT", decoding=decoding, **options) for decoding in ("static", "eager")
    )
    assert static.tokens == eager.tokens
    torch.testing.assert_close(static.logprobs, eager.logprobs)


@pytest.mark.parametrize("layout", ["hyaena", "original", "transformers"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_saving_keeps_the_scales(folder: Path, tmp_path: Path, ids: Tensor, layout: Any, dtype: str | None) -> None:
    model = load_model(folder)
    save_model(model, tmp_path / "saved", layout=layout, dtype=dtype)
    again = load_model(tmp_path / "saved", dtype="float32")
    assert scales(again) == scales(model)
    if dtype is None:
        for loaded in (model, again):
            set_fp8(loaded, "exact")
        with torch.no_grad():
            assert torch.equal(again(ids), model(ids))


def test_the_original_layout_has_states_that_transformer_engine_reads(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    save_model(model, tmp_path / "saved", layout="original")
    with torch.serialization.safe_globals([io.BytesIO]):  # as the original loads it
        state = torch.load(tmp_path / "saved/model.pt", weights_only=True, mmap=True)
    for i, pair in zip(FP8_LAYERS, scales(model), strict=True):
        content = state[f"blocks.{i}.projections._extra_state"]
        assert list(read_scales(content.getvalue())) == pair
        assert torch.load(content, weights_only=True)["scale_fwd"][:2].tolist() == pair
    given = torch.load(folder / "model.pt", weights_only=False)
    for key in state.keys() | given.keys():
        if "_extra_state" not in key and not key.endswith(".filter.t"):  # ours carry these no further
            assert torch.equal(state[key], given[key]), key


def test_a_state_dict_of_the_original(folder: Path) -> None:
    state = torch.load(folder / "model.pt", weights_only=False)
    model = StripedHyena(load_model(folder).config)
    model.load_state_dict(state)
    assert scales(model) == scales(load_model(folder))
    lacking = {key: None if "_extra_state" in key else value for key, value in state.items()}
    model.load_state_dict(lacking)
    assert scales(model) == [[1.0, 1.0]] * 5


def test_scales_are_1_where_the_original_has_none(tmp_path: Path, golden: Path, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        found = scales(load_model(written(tmp_path / "model", golden, l1=None, l4=b"")))
    assert found[1] == found[3] == [1.0, 1.0] and found[0][0] == 30.0
    assert "no FP8 scales of 1 of 5 input projections: they are 1" in caplog.text
    model = load_model(tmp_path / "model")
    save_model(model, tmp_path / "ours")
    file = tmp_path / "ours/model.safetensors"
    state = load_file(file)
    del state["layers.2.mixer.in_proj.scales"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: layers\.2\.mixer\.in_proj\.scales"):
        load_model(tmp_path / "ours")


@pytest.mark.parametrize("pickled", [True, False])
def test_states_are_dropped_where_the_configuration_has_no_fp8(tmp_path: Path, golden: Path, pickled: bool) -> None:
    folder = written(tmp_path / "model", golden, pickled=pickled, fp8=False, l2=b"anything")
    assert scales(load_model(folder)) == []


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize(
    ("content", "words"), [(b"\x80\x04}.", "Transformer Engine 2"), (b"rubbish", "is damaged: download the file again")]
)
def test_a_state_that_cannot_be_read_is_named(
    tmp_path: Path, golden: Path, pickled: bool, content: bytes, words: str
) -> None:
    folder = written(tmp_path / "model", golden, pickled=pickled, l2=content)
    with pytest.raises(CheckpointError, match=rf"{folder}.*blocks\.2\.projections\._extra_state.*{words}") as error:
        load_model(folder)
    assert str(error.value).isprintable()


def test_fp8_of_a_model_without_is_refused_before_its_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hyaena.hub.checkpoints, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    for load in (hyaena.load, hyaena.load_model):
        with pytest.raises(InputError, match="the configuration of this one has none"):
            load("cub", fp8="exact")
        with pytest.raises(InputError, match="fp8 is 'on': choose one of auto, exact, off"):
            load("cub", fp8="on")
    assert main(["generate", "ACGT", "--fp8", "exact"]) == 2
    assert "the configuration of this one has none" in capsys.readouterr().err


def test_the_command_line_computes_in_the_mode(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(mode: str) -> str:
        call = ["generate", "ACGTACGGT", "--model", str(folder), "--fp8", mode, "--device", "cpu", "--json"]
        assert main([*call, "--temperature", "0", "--max-new-tokens", "16"]) == 0
        return json.loads(capsys.readouterr().out)["text"]

    assert text("off") == text("auto") != text("exact")


@torch.no_grad()
def test_adapters(folder: Path, ids: Tensor) -> None:
    model = hyaena.load_model(folder, fp8="exact")
    layer = model.layers[1].mixer.in_proj
    scale = float(layer.scales[1])
    b = torch.zeros(192, 4)
    b[7] = float(layer.weight.abs().max())
    adapter = Adapter("test", {"layers.1.mixer.in_proj": Update(torch.eye(4, 64), b, 2.0)})
    beside = with_adapter(model, adapter)
    before = model(ids)
    assert not torch.equal(beside(ids), before)
    merge_adapter(model, adapter)
    largest = float(layer.weight.abs().max())
    assert largest * scale > 448 * 1.5  # the old scale would have cut it off
    torch.testing.assert_close(float(layer.scales[1]), 448 / largest)
    assert not torch.equal(model(ids), before)


def test_training_changes_the_weights_and_not_the_scales(folder: Path, ids: Tensor) -> None:
    model = hyaena.load_model(folder, fp8="exact").train()
    before = scales(model)
    loss = model(ids).float().logsumexp(-1).mean()
    loss.backward()
    grads = [layer.mixer.in_proj.weight.grad for i, layer in enumerate(model.layers) if i in FP8_LAYERS]
    assert all(grad is not None and bool(grad.isfinite().all()) and bool(grad.any()) for grad in grads)
    torch.optim.AdamW(model.parameters(), 1e-3).step()
    with torch.no_grad():
        assert float(model(ids).float().logsumexp(-1).mean()) < float(loss)
    assert scales(model) == before


def test_a_fresh_model_has_scales_that_fit(golden: Path) -> None:
    config = ModelConfig.from_name("evo2-1b-base")
    assert config.fp8_input_projections
    small = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96}
    groups = {"se_filter_groups": 8, "mr_filter_groups": 8, "layer_types": ("hyena_se", "attention", "hyena_li")}
    made = ModelConfig.from_dict(config.to_dict() | small | groups)
    model = StripedHyena(made, mixers=MIXERS)
    assert all(x == 32 and 448 / w < 0.5 for x, w in scales(model))
    values = made.to_dict() | {"hyena_in_bias": True}
    with pytest.raises(ConfigError, match="fp8_input_projections go without a bias: set hyena_in_bias to false"):
        ModelConfig.from_dict(values)
