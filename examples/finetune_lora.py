#!/usr/bin/env python3
"""Fine-tune the bundled model with LoRA: PEFT over ``hyaena.hf``; about a minute on a CPU.

    python examples/finetune_lora.py [FOLDER]

The task is to greet, in the prompt format of StripedHyena-Nous. Only an adapter is trained. The loss counts answers,
and the names of the held-out chats are not in the training chats. The adapter is saved in FOLDER (by default a
temporary one), and ``hyaena generate --adapter`` uses it. Needs the extra ``hf``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import hyaena
import hyaena.hf
from hyaena.tokenizers import Tokenizer

PROMPT = "### Instruction:\ngreet {name}\n\n### Response:\n"
ANSWER = 'print("Hello, {name}!")'


def make_name(random: Random) -> str:
    """Make a name of two to four syllables."""
    syllables = (random.choice("bdfgklmnprstvz") + random.choice("aeiou") for _ in range(random.randint(2, 4)))
    return "".join(syllables).capitalize()


def pack(tokenizer: Tokenizer, names: list[str]) -> dict[str, Tensor]:
    """Chats as one row [1,T], each a document of its own: its positions begin at 0. Labels are -100 in prompts."""
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for name in names:
        prompt = tokenizer.encode(PROMPT.format(name=name))
        answer = [*tokenizer.encode(ANSWER.format(name=name), add_special_tokens=False), tokenizer.eos_id or 0]
        ids += prompt + answer
        labels += [-100] * len(prompt) + answer
        positions += range(len(prompt) + len(answer))
    return {k: torch.tensor([v]) for k, v in (("input_ids", ids), ("labels", labels), ("position_ids", positions))}


def main(folder: Path, steps: int = 30) -> None:
    """Train an adapter, save it, and generate with it."""
    random = Random(0)
    torch.manual_seed(0)
    names = sorted({make_name(random) for _ in range(400)})
    random.shuffle(names)
    heldout, training = names[:40], names[40:]
    native, tokenizer = hyaena.load("cub")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=list(hyaena.hf.LORA_TARGETS), task_type="CAUSAL_LM")
    model = get_peft_model(hyaena.hf.StripedHyenaForCausalLM.from_native(native), lora)
    model.print_trainable_parameters()

    def heldout_loss() -> float:
        with torch.no_grad():
            return float(model.eval()(**pack(tokenizer, heldout)).loss)

    print(f"held-out loss before: {heldout_loss():.3f} nats per byte")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    for step in range(1, steps + 1):
        loss = model.train()(**pack(tokenizer, random.sample(training, 8))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            print(f"step {step}: loss {float(loss):.3f}")
    print(f"held-out loss after: {heldout_loss():.3f} nats per byte")
    adapter = folder / "adapter"
    model.save_pretrained(str(adapter), save_embedding_layers=False)
    size = sum(path.stat().st_size for path in adapter.iterdir())
    print(f"the adapter is {adapter}, {size / 1e6:.1f} MB; hyaena generate --adapter {adapter}:")
    command = [sys.executable, "-m", "hyaena", "generate", "--adapter", str(adapter), "--max-new-tokens", "40"]
    subprocess.run([*command, PROMPT.format(name=heldout[0])], check=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
