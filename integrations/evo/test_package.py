"""The distribution, its tokenizers and its generator."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from integrations.evo.cases import ROOT, Case
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from hyaena.errors import InputError
from stripedhyena.generation import Generator
from stripedhyena.sample import sample
from stripedhyena.tokenizer import CharLevelTokenizer, HFAutoTokenizer
from stripedhyena.utils import dotdict


def test_the_wheel_holds_one_package_and_meets_the_pin(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(
        ROOT / "compat" / "stripedhyena", clone, ignore=shutil.ignore_patterns("*.egg-info", "build", "__pycache__")
    )
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, clone]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("stripedhyena-0.2.2+hyaena-")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = ROOT / "compat" / "stripedhyena" / "src"
    assert names == {p.relative_to(source).as_posix() for p in source.glob("stripedhyena/*") if p.is_file()}


def test_a_dotdict_takes_stray_keywords_and_has_no_missing_attribute() -> None:
    config = dotdict({"a": 1}, Loader=json.loads, b=2)
    assert (config.a, config.b, config.c, config.get("Loader")) == (1, 2, None, None)
    config.c = 3
    assert dict(config) == {"a": 1, "b": 2, "c": 3}
    del config.a
    assert "a" not in config


@pytest.fixture
def tokenizer(tmp_path: Path) -> HFAutoTokenizer:
    """As that of the 7B: a text begins with ``<s>``."""
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "the", "striped", "hyena"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    return HFAutoTokenizer(str(tmp_path / "tokenizer.json"))


def test_a_tokenizer_file(tokenizer: HFAutoTokenizer, tmp_path: Path) -> None:
    ids = tokenizer.tokenize("the striped hyena")
    assert ids.tolist() == [1, 3, 4, 5] and tokenizer.encode_to_list("the") == [3]
    assert tokenizer.detokenize(ids, skip_special_tokens=True) == "the striped hyena"
    assert tokenizer.detokenize_batch(ids[None]) == ["<s> the striped hyena"]
    assert [row.tolist() for row in tokenizer.tokenize_batch(["the", "hyena"])] == [[1, 3], [1, 5]]
    assert (tokenizer.vocab_size, tokenizer.vsize, tokenizer.eos_id, tokenizer.eod, tokenizer.bos_id) == (6, 6, 2, 2, 1)
    (tmp_path / "in.jsonl").write_text('{"text": "the"}\n{"text": "hyena"}\n')
    for _ in range(2):  # a file that exists is left alone
        tokenizer.tokenize_file(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    assert (tmp_path / "out.jsonl").read_text() == '{"tokens": [1, 3]}\n{"tokens": [1, 5]}\n'


def test_the_generator_continues_a_text(
    sh_case: Case, tokenizer: HFAutoTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    model = sh_case.model(vocab_size=256)
    generator, text = Generator(model, tokenizer, top_k=1), "the striped hyena"
    results = [generator.generate("cpu", text, num_tokens=6, cached_generation=cached) for cached in (True, False)]
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-4)
    prompt = tokenizer.tokenize(text)[None]
    ids, _ = generator.generate("cpu", input_ids=prompt, num_tokens=6, cached_generation=True)
    assert torch.equal(ids, results[0][0])
    short, _ = generator.generate("cpu", text, num_tokens=6, max_seqlen=2)
    assert torch.equal(short, generator.generate("cpu", input_ids=prompt[:, -2:], num_tokens=6)[0])
    assert capsys.readouterr().out == ""
    generator.generate("cpu", "the", num_tokens=2, verbose=True, skip_special_tokens=True)
    assert "Input: the, Output:" in capsys.readouterr().out


def test_the_generator_stops_at_the_end_token_of_a_tokenizer_file(sh_case: Case, tokenizer: HFAutoTokenizer) -> None:
    model = sh_case.model()
    model.unembed.register_forward_hook(lambda _module, _given, out: torch.nn.functional.one_hot(
        torch.full(out.shape[:2], 2 if out.shape[1] > 1 else 4), 256).float())  # fmt: skip
    ids, _ = Generator(model, tokenizer, top_k=1).generate("cpu", "the", num_tokens=9, cached_generation=True)
    assert ids.tolist() == [[2]]


def test_sampling_keeps_to_its_limits() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(2000, 4)
    before = logits.clone()
    assert set(sample(logits, top_k=2).tolist()) == {0, 1}
    assert set(sample(logits, top_k=0, top_p=0.7).tolist()) == {0, 1}
    assert set(sample(logits, top_k=0, top_p=1.0).tolist()) == {0, 1, 2, 3}
    assert set(sample(logits, top_k=0, temperature=0.0).tolist()) == {0}
    share = float((sample(logits, top_k=4) == 0).float().mean())
    assert share == pytest.approx(0.5, abs=0.05) and torch.equal(logits, before)
    with pytest.raises(InputError, match="top_p"):
        sample(logits, top_k=3, top_p=1.5)


def test_a_generator_without_a_prompt_says_so(sh_case: Case) -> None:
    generator = Generator(sh_case.model(), CharLevelTokenizer(256))
    for arguments in ({}, {"input_string": ""}, {"input_string": "A", "num_tokens": 0}):
        with pytest.raises(InputError, match="generate takes"):
            generator.generate("cpu", **arguments)
