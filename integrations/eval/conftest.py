"""A small model with a tokenizer of words, and local tasks of every kind that the harness has. All offline."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).parents[2] / "tests"))  # pages

import lm_eval.tasks
import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import hyaena
from hyaena.checkpoints import save_model
from hyaena.config import ModelConfig
from hyaena.model import StripedHyena

torch.set_num_threads(1)

WORDS = "the striped brown spotted hyena aardwolf eats sleeps hunts termites bones at night by day in Africa a pack of"


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session", autouse=True)
def _harness_read_once() -> Iterator[None]:
    """Reading the harness's own tasks takes seconds: once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.tasks, "TaskManager", functools.cache(lm_eval.tasks.TaskManager))
        patch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # `pip list`, which takes longer than all else
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 64 positions, so that some of the tasks' texts are longer."""
    path = tmp_path_factory.mktemp("model")
    library = Library(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        [WORDS], trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    size = library.get_vocab_size()
    config = ModelConfig(
        vocab_size=size,
        hidden_size=32,
        layer_types=("hyena", "attention", "hyena", "attention"),
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        state_size=2,
        max_length=64,
        tokenizer="hf",
    )
    torch.manual_seed(1)
    model = StripedHyena(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "long_filter" not in name:
                p.normal_(std=0.2)
    library.save(str(path / "tokenizer.json"))
    save_model(model, path)
    return path


@pytest.fixture(scope="session")
def native(folder: Path) -> Any:
    return hyaena.load(folder)


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks: choices, choices of one token, contexts that differ, texts, and continuations."""
    path = tmp_path_factory.mktemp("tasks")
    words = WORDS.split()

    def phrase(start: int, count: int) -> str:
        return " ".join(words[(start + 7 * i) % len(words)] for i in range(count))

    def write(name: str, documents: list[dict[str, Any]], **config: Any) -> None:
        (path / f"{name}.json").write_text("\n".join(map(json.dumps, documents)))
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path / f"{name}.json")}},
            "test_split": "test",
            "fewshot_split": "test",
            **config,
        }
        (path / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML

    accuracy = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    choices = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    questions = [
        {
            "question": f"{phrase(i, 6 + 9 * (i % 6))} eats",
            "choices": [phrase(i + k, 1 + k + i % 3) for k in range(4)],
            "answer": i % 4,
        }
        for i in range(12)
    ]
    for name, documents in (
        ("hyena_choice", questions),
        ("hyena_word", [q | {"choices": ["bones", "termites", "the"], "answer": 1} for q in questions]),
        # Tasks of the harness's own names, with data of ours: the suite runs offline.
        ("arc_challenge", questions),
        ("hellaswag", questions[:6]),
    ):
        write(name, documents, **choices, doc_to_choice="{{choices}}", metric_list=accuracy)
    pairs = [
        {"options": [phrase(i, 12), phrase(i, 11) + " bones"], "rest": phrase(i + 3, 4), "answer": i % 2}
        for i in range(8)
    ]
    for name in ("hyena_pair", "winogrande"):
        write(
            name,
            pairs,
            output_type="multiple_choice",
            doc_to_text="{{answer}}",
            doc_to_choice="{{options}}",
            doc_to_target="{{rest}}",
            metric_list=accuracy[:1],
        )
    write(
        "hyena_text",
        [{"text": phrase(i, 20 + 60 * i)} for i in range(4)],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}],
    )
    write(
        "hyena_empty",
        [{"text": ""}],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "byte_perplexity"}],
    )
    write(
        "hyena_write",
        [{"question": phrase(i, 4 + 5 * i), "answer": phrase(i, 2)} for i in range(6)],
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n", "the"], "max_gen_toks": 12, "do_sample": False, "num_beams": 1},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    write(
        "hyena_odd",
        [{"question": "a", "answer": "b"}],
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": [], "max_gen_toks": 4, "num_beams": 3},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    return path
