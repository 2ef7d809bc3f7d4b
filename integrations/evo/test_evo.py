"""evo-model as the package index has it, unchanged: every flow of its modules and scripts, on a CPU.

Its checkpoint is a fake of the hub's snapshot with the weights of a golden case. Nothing is replaced: the hub's cache
is found by HF_HOME, and ``load_checkpoint`` takes the small configuration by its argument ``config_path``.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import evo
import evo.generation
import evo.models
import evo.scoring
import numpy as np
import pytest
import torch
import yaml
from evo.tokenizer import CharLevelTokenizer
from integrations.evo.cases import ROOT, Case, write_snapshot
from safetensors.torch import load_file
from torch import Tensor

import hyaena
import stripedhyena
from hyaena import ModelConfig
from hyaena.sizes import ModelSizes
from stripedhyena.generation import Generator
from stripedhyena.model import StripedHyena

PACKAGE = Path(evo.__file__).parent
TEXTS = ["ACGT", "A", "AAAAACCCCCGGGGGTTTTT", "GATTACA" * 30]
BFLOAT16 = 0.05
"""Of the norm of the logits: 8 bits, through 4 layers; 0.016 was measured."""


def path_of(config: dict[str, Any], folder: Path) -> str:
    """A ``config_path`` of evo-model, which it looks up from its own folder."""
    file = folder / "tiny.yml"
    file.write_text(yaml.safe_dump(config))
    return os.path.relpath(file, PACKAGE)


@pytest.fixture
def tokenizer() -> CharLevelTokenizer:
    return CharLevelTokenizer(512)


@pytest.fixture
def model(evo_case: Case) -> StripedHyena:
    """In float32: for comparisons with the golden case."""
    return evo_case.model()


def native(case: Case) -> hyaena.StripedHyena:
    model = hyaena.StripedHyena(case.model().architecture)
    model.load_state_dict(case.weights)
    return model.eval()


def log_probabilities(model: hyaena.StripedHyena, text: str) -> Tensor:
    """Of every character of a text alone, by a plain forward pass: [T,V], and the text's own, [T]."""
    ids = torch.tensor([[0, *text.encode()]])
    with torch.inference_mode():
        return model(ids)[0, :-1].log_softmax(-1)


# --- the package is the one of the index -----------------------------------------------------------------------------


def test_the_distributions_meet_each_other_s_requirements() -> None:
    assert importlib.metadata.version("evo-model") == "0.5"
    assert importlib.metadata.version("stripedhyena") == stripedhyena.__version__ == "0.2.2+hyaena"
    assert "stripedhyena==0.2.2" in (importlib.metadata.requires("evo-model") or [])
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert not re.search("evo-model|stripedhyena", done.stdout), done.stdout


def test_no_line_of_evo_model_is_changed() -> None:
    """Every installed file has the hash that the wheel's RECORD gives."""
    files = [file for file in importlib.metadata.files("evo-model") or [] if file.hash and file.suffix == ".py"]
    assert len(files) >= 10
    for file in files:
        assert file.hash is not None
        digest = hashlib.new(file.hash.mode, file.read_binary()).digest()
        assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value, file


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hub", "revision", "shards"),
    [
        ("evo-1-8k-base", "togethercomputer/evo-1-8k-base", "1.1_fix", 3),
        ("evo-1-131k-base", "togethercomputer/evo-1-131k-base", "1.1_fix", 3),
        ("evo-1-8k-crispr", "LongSafari/evo-1-8k-crispr", "main", 1),
        ("evo-1-8k-transposon", "LongSafari/evo-1-8k-transposon", "main", 2),
        ("evo-1.5-8k-base", "evo-design/evo-1.5-8k-base", "main", 3),
    ],
)
def test_load_checkpoint_reads_a_snapshot(
    evo_case: Case, tmp_path: Path, name: str, hub: str, revision: str, shards: int
) -> None:
    write_snapshot(hub, revision, evo_case.weights, evo_case.config, shards)
    model = evo.models.load_checkpoint(name, path_of(evo_case.config, tmp_path), device="cpu")
    poles = {key for key in evo_case.weights if key.endswith(("poles", "residues"))}
    for key, p in model.named_parameters():
        assert p.dtype == (torch.float32 if key in poles else torch.bfloat16), key
        assert torch.equal(p, evo_case.weights[key].to(p.dtype)), key
    with torch.inference_mode():
        logits, _ = model(evo_case.ids)
    expected = evo_case.expected["logits"]
    assert float((logits.float() - expected).norm() / expected.norm()) < BFLOAT16
    if name == "evo-1-8k-base":  # what hyaena reads from the same folder computes the same
        ours, _ = hyaena.load(hub, dtype="bfloat16", config=evo_case.folder / "config.yml")
        with torch.inference_mode():
            difference = ours(evo_case.ids).float() - logits.float()
        assert float(difference.norm() / expected.norm()) < BFLOAT16 / 5


@pytest.mark.filterwarnings("ignore:.*no-op")
@pytest.mark.parametrize("name", ["evo-1-8k-base", "evo-1-131k-base"])
def test_evo_loads_its_own_configuration_at_full_size(name: str) -> None:
    """``Evo(name)`` of 6.45 billion parameters: the snapshot is a file of holes, and the model is on no device."""
    hub = evo.models.HF_MODEL_NAME_MAP[name]
    long = name == "evo-1-131k-base"
    file = f"configs/evo-1-{'131k' if long else '8k'}-base_inference.yml"
    config = yaml.safe_load((PACKAGE / file).read_text())
    with torch.device("meta"):
        shapes = StripedHyena(config).state_dict()
    folder = write_snapshot(hub, "1.1_fix", {"embedding_layer.weight": torch.zeros(1)}, config, shards=1)
    write_holes(folder / "model.safetensors", shapes)
    with torch.device("meta"):
        loaded = evo.Evo(name)
    (folder / "model.safetensors").unlink()
    assert (
        sum(p.numel() for p in loaded.model.parameters()) == ModelSizes(ModelConfig.from_name("evo-1-131k")).parameters
    )
    assert loaded.model.architecture.rope_scaling_factor == (16 if long else 1)
    assert loaded.tokenizer.vocab_size == 512
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16, torch.float32}


def write_holes(file: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file of these names and shapes, in the dtypes of Evo, whose data are a hole in the file: zeros."""
    header, start = {}, 0
    for key, tensor in tensors.items():
        if key != "unembed.weight":
            wide = key.endswith(("poles", "residues", "inv_freq"))
            stop = start + tensor.numel() * (4 if wide else 2)
            header[f"backbone.{key}"] = {
                "dtype": "F32" if wide else "BF16",
                "shape": list(tensor.shape),
                "data_offsets": [start, stop],
            }
            start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + start)


def test_an_unknown_name_is_evo_s_own_error() -> None:
    with pytest.raises(ValueError, match="Invalid model name"):
        evo.Evo("evo-3")


# --- scoring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_scores_of_unequal_sequences_are_those_of_each_alone(
    evo_case: Case, model: StripedHyena, tokenizer: CharLevelTokenizer, reduce: str
) -> None:
    ours = native(evo_case)
    scores = evo.score_sequences(TEXTS, model, tokenizer, reduce_method=reduce, device="cpu")
    for text, score in zip(TEXTS, scores, strict=True):
        own = log_probabilities(ours, text)[torch.arange(len(text)), list(text.encode())].numpy()
        assert score == pytest.approx(own.mean() if reduce == "mean" else own.sum(), rel=1e-4)


def test_positional_entropies_are_those_of_each_alone(
    evo_case: Case, model: StripedHyena, tokenizer: CharLevelTokenizer
) -> None:
    ours = native(evo_case)
    entropies = evo.positional_entropies(TEXTS, model, tokenizer, device="cpu")
    for text, entropy in zip(TEXTS, entropies, strict=True):
        logs = log_probabilities(ours, text)
        np.testing.assert_allclose(entropy, -(logs.exp() * logs).sum(-1).numpy(), rtol=1e-4, atol=1e-4)


# --- generation ------------------------------------------------------------------------------------------------------


def greedy(model: hyaena.StripedHyena, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids [B,n] and logits [B,n,V], each by a whole forward pass."""
    logits, length = [], ids.shape[1]
    with torch.inference_mode():
        for _ in range(count):
            logits.append(model(ids)[:, -1])
            ids = torch.cat([ids, logits[-1].argmax(-1)[:, None]], dim=1)
    return ids[:, length:], torch.stack(logits, dim=1)


def test_generation_is_the_golden_case(evo_case: Case, model: StripedHyena, tokenizer: CharLevelTokenizer) -> None:
    generator = evo.generation.Generator(model, tokenizer, top_k=1)
    expected = evo_case.expected["greedy_ids"]
    ids, logits, params = generator.generate("cpu", input_ids=evo_case.ids, num_tokens=expected.shape[1])
    assert torch.equal(ids, expected)
    torch.testing.assert_close(logits[:, 1:], evo_case.expected["decode_logits"], rtol=1e-4, atol=1e-4)
    for i, state in params["hyena"].state_dict.items():
        final = evo_case.expected[f"final.iir_state.{i}"]
        torch.testing.assert_close(torch.view_as_real(state), final, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 3, 127, 128, 129, 200])
@pytest.mark.parametrize("rows", [1, 3])
def test_prompts_around_the_threshold_of_128(
    evo_case: Case, model: StripedHyena, tokenizer: CharLevelTokenizer, length: int, rows: int
) -> None:
    """Behind 128 tokens evo-model feeds the prompt one by one, with ``seqlen_offset`` of the whole prompt."""
    prompt = torch.randint(2, 256, (rows, length))
    expected, logits = greedy(native(evo_case), prompt, 5)
    generator = evo.generation.Generator(model, tokenizer, top_k=1)
    ids, scores, params = generator.generate("cpu", input_ids=prompt, num_tokens=5)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(scores, logits, rtol=1e-4, atol=1e-4)
    assert params["mha"].lengths == [length + 4] * rows  # the last token was not read yet
    # The same from stripedhyena's own generator, which evo-model's stems from; there, uncached, too.
    for cached in (True, False):
        own, scores = Generator(model, tokenizer, top_k=1).generate(
            "cpu", input_ids=prompt, num_tokens=5, cached_generation=cached, stop_at_eos=False
        )
        assert torch.equal(own, expected)
        torch.testing.assert_close(scores, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threshold", [1, 2, 50])
def test_another_threshold_changes_nothing(
    evo_case: Case, model: StripedHyena, tokenizer: CharLevelTokenizer, threshold: int
) -> None:
    generator = evo.generation.Generator(model, tokenizer, top_k=1)
    ids, _, _ = generator.generate("cpu", input_ids=evo_case.ids, num_tokens=6, force_prompt_threshold=threshold)
    assert torch.equal(ids, evo_case.expected["greedy_ids"][:, :6])


def test_generation_goes_on_from_a_cache(evo_case: Case, model: StripedHyena, tokenizer: CharLevelTokenizer) -> None:
    """``inference_params_dict`` of one call in the next: evo-model reads the last token of ``input_ids`` only."""
    generator = evo.generation.Generator(model, tokenizer, top_k=1)
    expected = evo_case.expected["greedy_ids"]
    first, _, params = generator.generate("cpu", input_ids=evo_case.ids, num_tokens=4)
    ids = torch.cat([evo_case.ids, first], dim=1)
    second, _, _ = generator.generate("cpu", input_ids=ids, num_tokens=8, inference_params_dict=params)
    assert torch.equal(torch.cat([first, second], dim=1), expected)


@pytest.mark.parametrize("prompts", [["ACGTTA", "GGGCCC"], ["ACGT", "A", "C" * 150], ["T" * 140] * 2])
@pytest.mark.parametrize("bos", [False, True])
def test_generate_takes_texts(
    evo_case: Case, model: StripedHyena, tokenizer: CharLevelTokenizer, prompts: list[str], bos: bool
) -> None:
    texts, scores = evo.generate(
        prompts, model, tokenizer, n_tokens=6, cached_generation=True, prepend_bos=bos, device="cpu", verbose=1
    )
    ours = native(evo_case)
    for prompt, text, score in zip(prompts, texts, scores, strict=True):
        ids, logits = greedy(ours, torch.tensor([[0] * bos + list(prompt.encode())]), 6)
        assert text == tokenizer.detokenize(ids[0].tolist())
        # evo-model's score leaves the last prediction and the first token out.
        expected = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).mean()
        assert score == pytest.approx(float(expected), rel=1e-3)


def test_sampling_follows_torch_s_seed(model: StripedHyena, tokenizer: CharLevelTokenizer) -> None:
    def draw(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return evo.generate(
            ["ACGT"] * 3, model, tokenizer, n_tokens=20, temperature=1.0, top_k=4, top_p=0.9,
            cached_generation=True, device="cpu", verbose=2,
        )[0]  # fmt: skip

    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1))) == 3


def test_uncached_generation_fails_in_evo_model_itself(model: StripedHyena, tokenizer: CharLevelTokenizer) -> None:
    """evo-model 0.5 reads a variable that it sets on the cached path only, before it calls the model.

    Uncached generation with its model and tokenizer: ``stripedhyena.generation.Generator``, as above.
    """
    with pytest.raises(UnboundLocalError, match="prefilled"):
        evo.generate(["ACGT"], model, tokenizer, n_tokens=2, cached_generation=False, device="cpu")


# --- embeddings, and the package's scripts ---------------------------------------------------------------------------


def test_example_inference(model: StripedHyena, tokenizer: CharLevelTokenizer) -> None:
    """What scripts/example_inference.py does: int32 ids, and a batch of unequal texts padded on the right."""
    with torch.inference_mode():
        alone, _ = model(torch.tensor(tokenizer.tokenize("ACGT"), dtype=torch.int)[None])
        ids, lengths = evo.scoring.prepare_batch(TEXTS[:3], tokenizer, prepend_bos=False, device="cpu")
        batch, _ = model(ids)
    assert lengths == [4, 1, 20] and batch.shape == (3, 20, 512)
    torch.testing.assert_close(batch[:1, :4], alone, rtol=1e-4, atol=1e-4)


@pytest.fixture
def package(evo_case: Case, tmp_path: Path) -> Path:
    """A folder with evo-model's package: every source file is the installed one, and its two YAML files are small."""
    shutil.copytree(PACKAGE, tmp_path / "evo", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (tmp_path / "evo" / "configs").iterdir():
        file.write_text(yaml.safe_dump(evo_case.config))
    for hub in ("togethercomputer/evo-1-8k-base", "togethercomputer/evo-1-131k-base"):
        write_snapshot(hub, "1.1_fix", evo_case.weights, evo_case.config, 2)
    return tmp_path


def run_script(package: Path, name: str, *arguments: str) -> str:
    paths = [package, ROOT / "src", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, "-m", f"evo.scripts.{name}", "--device", "cpu", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        cwd=package,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_script_that_scores(evo_case: Case, package: Path) -> None:
    (package / "in.fasta").write_text("".join(f">{i}\n{text}\n" for i, text in enumerate(TEXTS)))
    run_script(package, "score", "--input-fasta", "in.fasta", "--output-tsv", "out.tsv", "--batch-size", "3")
    rows = [line.split("\t") for line in (package / "out.tsv").read_text().splitlines()]
    assert rows[0] == ["seqs", "scores"] and [row[0] for row in rows[1:]] == TEXTS
    ours = native(evo_case)
    for text, score in rows[1:]:
        own = log_probabilities(ours, text)[torch.arange(len(text)), list(text.encode())].mean()
        assert float(score) == pytest.approx(float(own), rel=0.02)  # bfloat16 against float32


def test_the_script_that_generates(evo_case: Case, package: Path) -> None:
    arguments = ("--model-name", "evo-1-8k-base", "--n-samples", "2", "--n-tokens", "8", "--top-k", "1")
    shown = run_script(package, "generate", "--prompt", "ACGT", *arguments)
    ours, _ = hyaena.load("togethercomputer/evo-1-8k-base", dtype="bfloat16", config=evo_case.folder / "config.yml")
    ids, _ = greedy(ours, torch.tensor([list(b"ACGT")]), 8)
    text = CharLevelTokenizer(512).detokenize(ids[0].tolist())
    assert shown.count(f'Prompt: "ACGT",\tOutput: "{text}"') == 2


def test_the_golden_weights_are_not_rounded_by_the_snapshot(evo_case: Case) -> None:
    folder = write_snapshot("togethercomputer/evo-1-8k-base", "1.1_fix", evo_case.weights, evo_case.config, 2)
    stored = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    assert all(torch.equal(stored[f"backbone.{key}"], value) for key, value in evo_case.weights.items())
