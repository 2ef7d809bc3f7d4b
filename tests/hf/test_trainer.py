"""Trainer of transformers: trains, saves, goes on, evaluates; its checkpoints are folders like others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import hyaena
from hf_models import CONFIGS, build
from hyaena.hf import StripedHyenaForCausalLM, fast_tokenizer
from hyaena.tokenizers import CharacterTokenizer


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(tmp_path: Path, checkpointing: bool) -> None:
    pytest.importorskip("accelerate")
    kinds = CONFIGS["kinds"].to_dict() | {"vocab_size": 256, "tokenizer": "characters", "tie_embeddings": True}
    model = StripedHyenaForCausalLM.from_native(build(hyaena.ModelConfig.from_dict(kinds)))
    tokenizer = fast_tokenizer(CharacterTokenizer(256))
    data = [{"input_ids": ids} for ids in tokenizer(["ACGT" * 5, "GATTACA", "TTTTGGGG"] * 2)["input_ids"]]
    options = TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, learning_rate=1e-2, per_device_train_batch_size=3, use_cpu=True,
        report_to=[], logging_steps=1, disable_tqdm=True, gradient_checkpointing=checkpointing, bf16=True,
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, options, train_dataset=data, data_collator=collator, processing_class=tokenizer)
    before = trainer.evaluate(data)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(data)["eval_loss"] < before
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(p, after[name]) for name, p in model.named_parameters())
    native, own = hyaena.load(tmp_path / "checkpoint-4")
    assert all(torch.equal(p, after[f"model.{name}"]) for name, p in native.named_parameters())
    assert own.encode("ACGT") == tokenizer("ACGT")["input_ids"]
