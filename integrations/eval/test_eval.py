"""Tasks of lm-evaluation-harness give the same scores as its own HFLM over ``hyaena.hf``, and read less."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast

import hyaena
import pages
from hyaena.cli import main
from hyaena.errors import InputError
from hyaena.evals import SUITES, evaluate
from hyaena.evals.harness import HyaenaLM
from hyaena.evals.run import figures
from hyaena.hf import StripedHyenaForCausalLM


@pytest.fixture(scope="session")
def hflm(native: Any, folder: Path) -> HFLM:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    model = StripedHyenaForCausalLM.from_native(native[0]).eval()
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=64, batch_size=4, device="cpu")


def samples(lm: Any, tasks: Path, name: str, **options: Any) -> tuple[list[Any], dict[str, Any]]:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    options = {"num_fewshot": 0, "bootstrap_iters": 0} | options
    results = simple_evaluate(model=lm, tasks=[name], task_manager=manager, log_samples=True, **options)
    assert results is not None
    return [sample["resps"] for sample in results["samples"][name]], results["results"][name]


CASES = [("hyena_choice", 0), ("hyena_choice", 1), ("hyena_word", 2), ("hyena_pair", 0), ("hyena_pair", 1)]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(("name", "shots"), CASES)
def test_choices_score_as_with_hflm(native: Any, hflm: HFLM, tasks: Path, name: str, shots: int, share: bool) -> None:
    """Texts longer than the 64 positions are among them."""
    ours, figures_ = samples(HyaenaLM(*native, share_contexts=share), tasks, name, num_fewshot=shots)
    theirs, wanted = samples(hflm, tasks, name, num_fewshot=shots)
    flat = [[answer for (answer,) in document] for document in ours]
    for document, reference in zip(flat, theirs, strict=True):
        for (logprob, greedy), ((expected, best),) in zip(document, reference, strict=True):
            assert float(logprob) == pytest.approx(float(expected), abs=1e-4)
            assert greedy == best
    metrics = {key: value for key, value in wanted.items() if isinstance(value, float)}
    assert {key: figures_[key] for key in metrics} == metrics


def test_whole_texts_score_as_with_hflm(native: Any, hflm: HFLM, tasks: Path) -> None:
    ours, _ = samples(HyaenaLM(*native), tasks, "hyena_text")
    theirs, _ = samples(hflm, tasks, "hyena_text")
    assert len(ours) == 4
    for one, other in zip(ours, theirs, strict=True):
        assert float(one[0][0]) == pytest.approx(float(other[0][0]), abs=1e-3, rel=1e-6)


def test_continuations_are_those_of_hflm(native: Any, hflm: HFLM, tasks: Path) -> None:
    ours, _ = samples(HyaenaLM(*native, batch_size=4), tasks, "hyena_write")
    theirs, _ = samples(hflm, tasks, "hyena_write")
    assert ours == theirs
    assert len({str(row) for row in ours}) > 2


def test_what_requests_share_is_read_once(native: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    embed = native[0].embed_tokens.forward

    def count(ids: torch.Tensor) -> torch.Tensor:
        read.append(ids.numel())
        return embed(ids)

    monkeypatch.setattr(native[0].embed_tokens, "forward", count)
    amounts = {}
    for share in (True, False):
        read.clear()
        samples(HyaenaLM(*native, share_contexts=share, max_length=400), tasks, "hyena_choice")
        amounts[share] = sum(read)
    assert amounts[True] < 0.6 * amounts[False]


def test_a_text_that_begins_with_bos_gets_no_second(native: Any) -> None:
    lm = HyaenaLM(*native)
    ids = lm.tok_encode("the hyena")
    assert ids[0] == native[1].bos_id == lm.prefix_token_id
    assert lm.tok_encode("<s>the hyena") == ids
    assert lm.tok_encode("the hyena", add_special_tokens=False) == ids[1:]


# --- the command


def test_the_command_prints_a_table_and_writes_json(
    folder: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--tasks", "hyena_choice,hyena_pair", "--include-path", str(tasks), "--num-fewshot", "1", "--limit", "5"]
    assert main(["eval", "--model", str(folder), *flags, "--output", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    document = json.loads((tmp_path / "out.json").read_text())
    model, tokenizer = hyaena.load(folder)
    names = ["hyena_choice", "hyena_pair"]
    results = evaluate(model, tokenizer, names, include_path=tasks, num_fewshot=1, limit=5)
    for task, metric, value, _ in figures(results):
        assert re.search(rf"^{task} +1 +{metric} +{value:.4f}", out, re.MULTILINE)
        assert document["results"][task][f"{metric},none"] == value
    assert document["limit"] == 5 and document["n-samples"]["hyena_choice"]["effective"] == 5


def test_the_suite_of_the_readme(folder: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over tasks of the same names with local data. A window of 64 tokens cuts most of the ten examples off."""
    assert [reference.value for reference in SUITES["readme"].references] == [0.570, 0.816, 0.735]
    flags = ["--suite", "readme", "--include-path", str(tasks), "--limit", "3", "--num-fewshot", "2"]
    assert main(["eval", "--model", str(folder), *flags]) == 0
    out = capsys.readouterr().out
    for task, metric, value in (("arc_challenge", "acc_norm", "0.570"), ("hellaswag", "acc_norm", "0.816"),
                                ("winogrande", "acc", "0.735")):  # fmt: skip
        assert re.search(rf"^{task} +2 +{metric} +\d\.\d{{4}} .*{value}$", out, re.MULTILINE)
    assert "published: README" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "hyena_chioce"], "unknown task 'hyena_chioce': did you mean hyena_choice?"),
        (["--tasks", "zzzzzzzzzzzzzzzz"], "unknown task 'zzzzzzzzzzzzzzzz': `lm-eval ls tasks`"),
        (["--tasks", ","], "name at least one task"),
        ([], "name tasks by --tasks, or a suite by --suite"),
        (["--tasks", "hyena_choice", "--suite", "readme"], "one of the two only"),
        (["--suite", "other"], "unknown suite 'other': choose readme"),
        (["--tasks", "hyena_choice", "--output", "/nowhere/out.json"], "name a file in a folder that exists"),
        (["--tasks", "hyena_choice", "--limit", "0"], "limit must be a whole number, 1 or more"),
        (["--tasks", "piqa"], "piqa cannot be loaded"),
        (["--tasks", "hyena_empty"], "a task of hyena_empty failed: ZeroDivisionError: float division by zero"),
        (["--tasks", "hyena_odd"], "the task sets num_beams for generation"),
        (["--tasks", "hyena_write", "--max-length", "12"], "12 new tokens leave no room for a prompt"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, tasks: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--model", str(folder), "--include-path", str(tasks), *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hyaena: error")]
    assert len(lines) == 1 and message in lines[0]


def test_a_folder_with_a_broken_task(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(folder), "--include-path"]
    assert main(["eval", *flags, str(tmp_path / "none"), "--tasks", "x"]) == 2
    assert "is no folder" in capsys.readouterr().err
    (tmp_path / "own.yaml").write_text("task: own\ndataset_path: json\ndataset_kwargs: {data_files: nowhere.json}\n")
    assert main(["eval", *flags, str(tmp_path), "--tasks", "own"]) == 2
    assert "own cannot be loaded" in capsys.readouterr().err


def test_a_model_without_a_token_to_begin_with(native: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native[1], "bos_id", None)
    monkeypatch.setattr(native[1], "eos_id", None)
    with pytest.raises(InputError, match="neither BOS nor EOS"):
        HyaenaLM(*native)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pages.run(pages.ROOT / "docs" / "evaluation.md", monkeypatch)
