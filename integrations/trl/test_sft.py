"""TRL's SFTTrainer over ``hyaena.hf``: chat data in the Nous format, packed windows, LoRA."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import hyaena
import hyaena.hf
from hyaena.adapters import read_adapter, with_adapter
from hyaena.config import ModelConfig
from hyaena.tokenizers import ByteTokenizer

TINY = ModelConfig(
    vocab_size=264,
    hidden_size=32,
    layer_types=("hyena", "attention", "hyena"),
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    state_size=2,
    tokenizer="bytes",
)
NAMES = ("crocuta", "parahyaena", "proteles", "hyaena")
CHATS = [
    {"messages": [{"role": "user", "content": f"greet {n}"}, {"role": "assistant", "content": f"hello, {n}"}]}
    for n in NAMES
]


@pytest.fixture
def tokenizer() -> Any:
    made = hyaena.hf.fast_tokenizer(ByteTokenizer())
    hyaena.hf.set_chat_template(made)
    return made


def model() -> hyaena.hf.StripedHyenaForCausalLM:
    torch.manual_seed(0)
    return hyaena.hf.StripedHyenaForCausalLM.from_native(hyaena.StripedHyena(TINY))


def trainer(tokenizer: Any, folder: Path, **options: Any) -> SFTTrainer:
    peft_config = options.pop("peft_config", None)
    settings: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "max_steps": 25,
        "logging_steps": 1,
        "max_length": 256,
        "report_to": "none",
        "use_cpu": True,
        "assistant_only_loss": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return SFTTrainer(
        model=model(),
        args=SFTConfig(**{**settings, **options}),
        train_dataset=Dataset.from_list(CHATS),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_on_chats_lowers_the_loss_and_loads_natively(tokenizer: Any, tmp_path: Path, checkpointing: bool) -> None:
    targets = [name for name in hyaena.hf.LORA_TARGETS if name != "lm_head"]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    sft = trainer(tokenizer, tmp_path, peft_config=lora, gradient_checkpointing=checkpointing)
    sft.train()
    losses = [entry["loss"] for entry in sft.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    sft.save_model(str(tmp_path / "adapter"))
    ids = torch.tensor([tokenizer.apply_chat_template(CHATS[0]["messages"], tokenize=True)["input_ids"]])
    torch.manual_seed(0)
    native = with_adapter(hyaena.StripedHyena(TINY), read_adapter(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(native.eval()(ids), sft.model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    "options",
    [{"packing": True, "max_length": 512}, {"padding_free": True, "max_length": None}],
    ids=["packing", "padding-free"],
)
def test_packed_windows_have_the_loss_of_their_documents(
    tokenizer: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Nothing passes from one document to the next: not a state, not an attention score, not a target."""
    packing, padding = trainer(tokenizer, tmp_path, **options), trainer(tokenizer, tmp_path)
    packed, padded = (next(iter(made.get_train_dataloader())) for made in (packing, padding))
    assert packed["input_ids"].shape[0] == 1 and "position_ids" in packed
    assert len(padded["input_ids"]) == 4 and (padded["attention_mask"] == 0).any()
    untold = {name: packed[name] for name in ("input_ids", "labels")}
    with torch.no_grad():
        expected = packing.model(**padded).loss
        torch.testing.assert_close(packing.model(**packed).loss, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(packing.compute_loss(packing.model, packed), expected, rtol=1e-5, atol=0)
        # A model that is not told where documents begin has another loss.
        assert abs(packing.model(**untold).loss - expected) > 1e-3


def test_trl_refuses_an_adapter_of_the_head(tokenizer: Any, tmp_path: Path) -> None:
    """If it stops to do so, docs/finetuning.md has to say so."""
    lora = LoraConfig(r=8, target_modules=list(hyaena.hf.LORA_TARGETS), task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="lm_head"):
        trainer(tokenizer, tmp_path, peft_config=lora)


def test_the_loss_counts_what_the_assistant_says(tokenizer: Any, tmp_path: Path) -> None:
    batch = next(iter(trainer(tokenizer, tmp_path, per_device_train_batch_size=1).get_train_dataloader()))
    said = tokenizer.decode(batch["labels"][batch["labels"] != -100])
    assert said in {f"hello, {name}</s>" for name in NAMES}


def test_the_program_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of it, on the bundled model."""
    text = (Path(__file__).parents[2] / "docs" / "finetuning.md").read_text(encoding="utf-8")
    lines = [line for line in text.split("## Chats with TRL")[1].splitlines() if line.startswith("    ") or not line]
    program = textwrap.dedent("\n".join(lines))
    assert "max_steps=100" in program
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    few = program.replace("max_steps=100", 'max_steps=1, report_to="none"')
    exec(compile(few, "finetuning.md", "exec"), {"__name__": "__main__"})
    assert hyaena.load_model("cub", adapter="chat-adapter").config.tie_embeddings
