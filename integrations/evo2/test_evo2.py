"""evo2 as the package index has it, unchanged: every flow of its modules, on a CPU.

Its checkpoints are fakes of the hub's snapshots with tiny weights. Nothing of evo2 is replaced but the table that tells
which of its configurations belongs to a name: there stands a small one, with all keys of the published one.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import evo2
import evo2.models
import evo2.scoring
import numpy as np
import pytest
import torch
import yaml
from Bio.Seq import Seq
from evo2 import Evo2
from integrations.evo2.cases import (
    CONFIG_MAP,
    HOME,
    MODEL_NAMES,
    PACKAGE,
    Case,
    published,
    random_model,
    rounded,
    small_config,
    write_snapshot,
)
from torch import Tensor

import hyaena
import vortex
from hyaena.sizes import ModelSizes
from vortex.model.model import StripedHyena

TEXTS = ["ACGT", "AC", "AAAAACCCCCGGGGGTTTTT", "GATTACA" * 30]
LED = "cuda:0 was named, and there is no CUDA device: computing on cpu"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def use_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Let evo2 read a configuration for a name, by a path relative to its package."""

    def use(name: str, config: dict[str, Any]) -> None:
        file = tmp_path / f"{name}.yml"  # evo2 looks for 7b in the name
        file.write_text(yaml.safe_dump(config))
        monkeypatch.setitem(evo2.models.CONFIG_MAP, name, os.path.relpath(file, PACKAGE))

    return use


@pytest.fixture
def oracle() -> hyaena.StripedHyena:
    """hyaena's own model, with what a file of the 1B keeps of its weights."""
    return rounded(random_model(small_config("evo2_1b_base")))


@pytest.fixture
def model(oracle: hyaena.StripedHyena, use_config: Any) -> Evo2:
    """The same weights through evo2, in float32."""
    use_config("evo2_1b_base", small_config("evo2_1b_base"))
    write_snapshot("evo2_1b_base", published(oracle))
    found = Evo2("evo2_1b_base")
    found.model.float()
    return found


def logits_of(model: Evo2, ids: Tensor) -> Tensor:
    """evo2 returns what vortex's model returns, logits and None, and a None of its own."""
    (logits, params), embeddings = model(ids)
    assert params is None and embeddings is None
    return logits


def plain(model: hyaena.StripedHyena, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids)


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.float() - expected).abs().max() / expected.abs().max())


# --- the package is the one of the index -----------------------------------------------------------------------------


def test_the_distributions_meet_each_other_s_requirements() -> None:
    assert importlib.metadata.version("evo2") == "0.6.0"
    assert importlib.metadata.version("vtx") == vortex.__version__ == "1.1.0+hyaena"
    assert "vtx>=1.1.0" in (importlib.metadata.requires("evo2") or [])
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert not re.search("evo2|vtx", done.stdout), done.stdout


def test_no_line_of_evo2_is_changed() -> None:
    """Every installed file has the hash that the wheel's RECORD gives."""
    files = [file for file in importlib.metadata.files("evo2") or [] if file.hash and file.suffix in (".py", ".yml")]
    assert len(files) >= 15
    for file in files:
        assert file.hash is not None
        digest = hashlib.new(file.hash.mode, file.read_binary()).digest()
        assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value, file


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_name_loads_and_computes(name: str, use_config: Any) -> None:
    """The large ones come in parts, which evo2 merges."""
    config = small_config(name)
    weights = rounded(random_model(config))
    use_config(name, config)
    folder = write_snapshot(name, published(weights), parts=3 if "40b" in name else 1)
    found = Evo2(name)
    assert (HOME / f"{name}.pt").exists() == ("40b" in name) and not list(folder.glob("*.part*"))
    narrow = {key for key, tensor in found.model.state_dict().items() if tensor.dtype == torch.bfloat16}
    wide = {key.rsplit(".", 1)[1] for key in found.model.state_dict().keys() - narrow}
    assert wide == {"log_poles", "residues", "inv_freq", "_extra_state"}
    ids = torch.tensor([list(b"ACGTACGTTGCA|d__BACTERIA;" * 8)])
    expected = plain(weights, ids)
    logits = logits_of(found, ids)
    assert logits.dtype == torch.bfloat16 and relative(logits, expected) < 0.08
    found.model.float()
    assert relative(logits_of(found, ids), expected) < 1e-5
    if "40b" in name:  # now from the merged file
        again = Evo2(name)
        assert torch.equal(again.model.float()(ids)[0], found.model(ids)[0])


def test_a_local_file(model: Evo2, tmp_path: Path, oracle: hyaena.StripedHyena) -> None:
    torch.save(published(oracle), tmp_path / "mine.pt")
    found = Evo2("evo2_1b_base", local_path=str(tmp_path / "mine.pt"), use_kernels=True)
    ids = torch.randint(32, 128, (2, 50))
    assert torch.equal(found.model.float()(ids)[0], model.model(ids)[0])


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_configurations_at_full_size(name: str) -> None:
    """evo2's own files: the parameters of the published models, counted on the meta device."""
    with torch.device("meta"):
        found = StripedHyena(yaml.safe_load((PACKAGE / CONFIG_MAP[name]).read_text()))
    counted = sum(p.numel() for p in found.parameters())
    assert counted == ModelSizes(found.architecture).parameters
    billions = {"1b": 1.1, "7b": 6.5, "20": 20, "40": 40.3}
    assert counted / 1e9 == pytest.approx(billions[name[5:7]], rel=0.06)


def test_an_unknown_name_is_evo2_s_own_error() -> None:
    with pytest.raises(ValueError, match="Invalid model name"):
        Evo2("evo2_3b")


def test_a_part_that_is_missing_is_told(use_config: Any) -> None:
    config = small_config("evo2_40b")
    use_config("evo2_40b", config)
    folder = write_snapshot("evo2_40b", published(random_model(config)), parts=3)
    (folder / "evo2_40b.pt.part2").unlink()
    with pytest.raises(hyaena.errors.CheckpointError, match=r"evo2_40b\.pt") as caught:
        Evo2("evo2_40b")
    assert "\n" not in str(caught.value)
    (HOME / "evo2_40b.pt").unlink()


# --- forward and embeddings ------------------------------------------------------------------------------------------


def test_golden_numbers_through_evo2(tiny: Case, use_config: Any, tmp_path: Path) -> None:
    """The original's weights, configuration and logits."""
    use_config("evo2_7b", tiny.config)
    torch.save(dict(tiny.weights), tmp_path / "golden.pt")
    found = Evo2("evo2_7b", local_path=str(tmp_path / "golden.pt"))
    assert relative(logits_of(found, tiny.ids), tiny.expected["logits"]) < 0.08  # bfloat16
    found.model.float()
    found.model.custom_load_state_dict(tiny.weights)
    assert relative(logits_of(found, tiny.ids), tiny.expected["logits"]) < 1e-5


def test_embeddings_by_layer_name(model: Evo2, oracle: hyaena.StripedHyena) -> None:
    """Every module that has weights, by the names of ``state_dict``."""
    ids = torch.randint(32, 128, (2, 40))
    modules = {name.rpartition(".")[0] for name in model.model.state_dict() if "rotary_emb" not in name}
    names = [*sorted(modules), *(f"blocks.{i}" for i in range(5)), "blocks.3.inner_mha_cls", "blocks.2.mlp", "unembed"]
    (logits, _), embeddings = model(ids, return_embeddings=True, layer_names=names)
    assert set(embeddings) == set(names)
    assert all(tensor.shape[:2] == (2, 40) and not tensor.requires_grad for tensor in embeddings.values())
    assert torch.equal(embeddings["unembed"], logits)
    seen: dict[str, Tensor] = {}
    places = {f"blocks.{i}": f"layers.{i}" for i in range(5)} | {
        "norm": "norm", "embedding_layer": "embed_tokens", "blocks.3.mlp.l3": "layers.3.mlp.down_proj",
        "blocks.3.inner_mha_cls.Wqkv": "layers.3.mixer.qkv_proj",
        "blocks.1.out_filter_dense": "layers.1.mixer.out_proj",
    }  # fmt: skip
    for theirs, ours in places.items():
        oracle.get_submodule(ours).register_forward_hook(
            lambda _module, _given, out, name=theirs: seen.update({name: out[0] if isinstance(out, tuple) else out})
        )
    plain(oracle, ids)
    for name, expected in seen.items():
        assert relative(embeddings[name], expected) < 1e-5, name
    assert not any(module._forward_hooks for module in model.model.modules())
    with pytest.raises(ValueError, match="layer_names must be specified"):
        model(ids, return_embeddings=True)


# --- scoring ---------------------------------------------------------------------------------------------------------


def own_score(model: hyaena.StripedHyena, text: str, *, bos: bool, reduce: str) -> float:
    """Of a text alone, by one plain pass."""
    ids = torch.tensor([[0] * bos + list(text.encode())])
    logs = plain(model, ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return float(logs.mean() if reduce == "mean" else logs.sum())


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_scores_of_unequal_sequences_are_those_of_each_alone(
    model: Evo2, oracle: hyaena.StripedHyena, caplog: pytest.LogCaptureFixture, reduce: str, bos: bool, size: int
) -> None:
    """evo2 itself counts the first padding of shorter texts (evo2.md 10.9)."""
    scores = model.score_sequences(TEXTS, batch_size=size, prepend_bos=bos, reduce_method=reduce)
    assert caplog.messages == [LED]
    expected = [own_score(oracle, text, bos=bos, reduce=reduce) for text in TEXTS]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 4])
def test_scores_of_both_strands(model: Evo2, oracle: hyaena.StripedHyena, size: int) -> None:
    scores = model.score_sequences(TEXTS, batch_size=size, average_reverse_complement=True)
    both = [[text, str(Seq(text).reverse_complement())] for text in TEXTS]
    expected = [np.mean([own_score(oracle, text, bos=False, reduce="mean") for text in pair]) for pair in both]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_a_device_may_be_named(model: Evo2, caplog: pytest.LogCaptureFixture) -> None:
    arguments = (TEXTS, model.model, model.tokenizer)
    named = evo2.scoring.score_sequences(*arguments, device="cpu")
    assert not caplog.messages
    assert named == evo2.scoring.score_sequences(*arguments) == evo2.scoring.score_sequences(*arguments)
    assert caplog.messages == [LED]  # one line, however often


@pytest.mark.parametrize("bos", [False, True])
def test_positional_entropies_are_those_of_each_alone(model: Evo2, oracle: hyaena.StripedHyena, bos: bool) -> None:
    entropies = evo2.scoring.positional_entropies(TEXTS, model.model, model.tokenizer, prepend_bos=bos, device="cpu")
    for text, entropy in zip(TEXTS, entropies, strict=True):
        logs = plain(oracle, torch.tensor([[0] * bos + list(text.encode())]))[0, int(bos) :].log_softmax(-1)
        np.testing.assert_allclose(entropy, -(logs.exp() * logs).sum(-1).numpy(), **CLOSE)


@pytest.mark.parametrize("entropy", [False, True])
def test_perplexity_along_a_sequence(
    model: Evo2, oracle: hyaena.StripedHyena, caplog: pytest.LogCaptureFixture, entropy: bool
) -> None:
    """The function that names ``cuda:0`` and takes no device."""
    found = evo2.scoring.score_perplexity_along_sequence(model, TEXTS[3], entropy=entropy)
    assert caplog.messages == [LED]
    values = []
    for text in (TEXTS[3], str(Seq(TEXTS[3]).reverse_complement())):
        logs = plain(oracle, torch.tensor([list(text.encode())]))[0].log_softmax(-1)
        values.append(-(logs.exp() * logs).sum(-1).numpy())
    expected = (values[0] + values[1][::-1]) / 2
    np.testing.assert_allclose(found, expected if entropy else np.exp(expected), **CLOSE)


def test_a_text_of_one_base(model: Evo2, caplog: pytest.LogCaptureFixture) -> None:
    scores = evo2.scoring.score_sequences(["ACG", "A"], model.model, model.tokenizer, device="cpu")
    assert np.isfinite(scores[0]) and np.isnan(scores[1])
    assert caplog.messages == ["a text without a predicted token has no mean: pass prepend_bos=True"]
    (found,) = evo2.scoring.score_sequences(["A"], model.model, model.tokenizer, reduce_method="sum", device="cpu")
    assert found == 0
    with pytest.raises(RuntimeError, match="choose mean or sum"):
        model.score_sequences(["ACG"], reduce_method="median")


# --- generation ------------------------------------------------------------------------------------------------------


def greedy(model: hyaena.StripedHyena, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids [B,n] and logits [B,n,V], each by a whole forward pass."""
    logits, length = [], ids.shape[1]
    for _ in range(count):
        logits.append(plain(model, ids)[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1)[:, None]], dim=1)
    return ids[:, length:], torch.stack(logits, dim=1)


@pytest.mark.parametrize("cached", [False, True], ids=["uncached", "cached"])
@pytest.mark.parametrize("batched", [False, True], ids=["single", "batched"])
@pytest.mark.parametrize(
    "prompts", [["ACGT"], ["A", "GG", "CCC", "TTTT", "ACGTA", "ACGTAC"], ["ACGTTA", "GGGCCC"], ["ACGT", "C" * 150]]
)
def test_generation_is_greedy_whole_passes(
    model: Evo2, oracle: hyaena.StripedHyena, prompts: list[str], batched: bool, cached: bool
) -> None:
    """Prompts of one to six tokens among them, which the original continues wrongly."""
    output = model.generate(prompts, n_tokens=9, top_k=1, batched=batched, cached_generation=cached, verbose=0)
    logits = [row for part in output.logits for row in part]
    assert len(output.sequences) == len(output.logprobs_mean) == len(logits) == len(prompts)
    for prompt, text, score, own in zip(prompts, output.sequences, output.logprobs_mean, logits, strict=True):
        ids, expected = greedy(oracle, torch.tensor([list(prompt.encode())]), 9)
        assert text == model.tokenizer.detokenize(ids[0])
        assert relative(own, expected[0]) < 1e-5
        logs = expected[0].log_softmax(-1).gather(1, ids[0, :, None])
        assert score == pytest.approx(float(logs.mean()), rel=1e-5)


@pytest.mark.parametrize("threshold", [1, 3, 7, 128, 500])
def test_a_threshold_changes_nothing(model: Evo2, threshold: int) -> None:
    """The original feeds what is behind it token by token; behind one of 5 or less, wrongly."""
    prompts = ["GATTACA" * 30, "ACGT" * 40]
    whole = model.generate(prompts, n_tokens=8, top_k=1, verbose=0)
    pieces = model.generate(prompts, n_tokens=8, top_k=1, verbose=0, force_prompt_threshold=threshold)
    assert whole.sequences == pieces.sequences
    for a, b in zip(whole.logits, pieces.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_sampling_follows_torch_s_seed(model: Evo2, capsys: pytest.CaptureFixture[str]) -> None:
    def draw(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return model.generate(["ACGT"] * 3, n_tokens=20, temperature=1.0, top_k=4, top_p=0.9).sequences

    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1))) == 3
    assert capsys.readouterr().out.count('Prompt: "ACGT",\tOutput: "') == 12


def test_generation_in_bfloat16_as_it_is_loaded(use_config: Any, oracle: hyaena.StripedHyena) -> None:
    use_config("evo2_1b_base", small_config("evo2_1b_base"))
    write_snapshot("evo2_1b_base", published(oracle))
    found = Evo2("evo2_1b_base")
    output = found.generate(["ACGTACGTAC"], n_tokens=4, top_k=1, verbose=0)
    _, expected = greedy(oracle, torch.tensor([list(b"ACGTACGTAC")]), 1)
    assert output.logits[0].dtype == torch.float32 and relative(output.logits[0][0, 0], expected[0, 0]) < 0.08


# --- what completes evo2 ---------------------------------------------------------------------------------------------

IMPORTS = {
    "evo2 first": "from evo2.scoring import score_sequences; import evo2",
    "vortex first": "import vortex.model.model, sys; assert not 'evo2' in sys.modules; import evo2, evo2.scoring",
}


@pytest.mark.parametrize("lines", IMPORTS.values(), ids=IMPORTS.keys())
def test_the_order_of_imports_does_not_matter(lines: str, tmp_path: Path) -> None:
    """And importing writes no file, prints nothing and configures no logging, as the original does."""
    code = f"{lines}; import logging, sys; assert evo2.models.HAS_TE and not logging.getLogger().handlers; "
    code += "assert 'vortex' in evo2.scoring.prepare_batch.__module__ and 'transformer_engine' not in sys.modules"
    paths = [str(Path(hyaena.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


def test_what_is_completed_is_what_evo2_has() -> None:
    """A version that has other functions is left alone."""
    from types import ModuleType

    from vortex._evo2 import complete_models, complete_scoring

    other = ModuleType("evo2.scoring")
    complete_models(other)
    complete_scoring(other)
    assert not {"HAS_TE", "prepare_batch", "_score_sequences"} & vars(other).keys()
