#!/usr/bin/env python3
"""Fine-tune the bundled model on prompts and answers; about a minute on a CPU.

    python examples/finetune.py [FOLDER]

The task is to greet: the prompt is ``# greet Bolani`` and the answer ``print("Hello, Bolani!")``. The loss counts the
answers only, and the names of the held-out rows are not in the training rows. FOLDER (by default a temporary one) gets
the data, the run and the new model, ``run/final``.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path
from random import Random

import hyaena
from hyaena.tokenizers import Tokenizer
from hyaena.train.config import DataConfig, OptimConfig, TrainConfig
from hyaena.train.loop import train


def make_name(random: Random) -> str:
    """Make a name of two to four syllables."""
    syllables = (random.choice("bdfgklmnprstvz") + random.choice("aeiou") for _ in range(random.randint(2, 4)))
    return "".join(syllables).capitalize()


def write_rows(path: Path, names: list[str]) -> None:
    """Write one JSON object per line: the form of data with prompts."""
    rows = [{"prompt": f"# greet {name}\n", "completion": f'print("Hello, {name}!")\n'} for name in names]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def answer(model: hyaena.StripedHyena, tokenizer: Tokenizer, name: str) -> str:
    """Complete the prompt of a name with the most likely text, up to the end of the line."""
    prompt = f"# greet {name}\n"
    completion = hyaena.generate(model, tokenizer, prompt, max_new_tokens=40, temperature=0, stop="\n", seed=0)
    assert not isinstance(completion, list)
    return completion.text


def main(folder: Path, steps: int = 40) -> None:
    """Write the data, train, and compare answers before and after."""
    random = Random(0)
    names = sorted({make_name(random) for _ in range(400)})
    random.shuffle(names)
    heldout = names[:10]
    write_rows(folder / "train.jsonl", names[10:])
    write_rows(folder / "heldout.jsonl", heldout)
    config = TrainConfig(
        output=str(folder / "run"),
        init_from="cub",
        data=DataConfig(train=(str(folder / "train.jsonl"),), heldout=(str(folder / "heldout.jsonl"),)),
        optim=OptimConfig(lr=1e-3, warmup_steps=4),
        steps=steps,
        window=96,
        batch_size=4,
        eval_every=20,
    )
    result = train(config)
    before, after = (hyaena.load(source) for source in ("cub", folder / "run/final"))
    print(
        f"held-out answers: {result.initial_bits_per_byte:.2f} bits per byte before, {result.bits_per_byte:.2f} after"
    )
    for name in heldout[:3]:
        print(f"{name}: {answer(*before, name)!r} before, {answer(*after, name)!r} after")
    right = sum(answer(*after, name) == f'print("Hello, {name}!")' for name in heldout)
    print(f"{right} of {len(heldout)} names that it has not seen are greeted; the model is {folder}/run/final")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
