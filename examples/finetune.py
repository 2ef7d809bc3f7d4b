#!/usr/bin/env python3
"""Fine-tune the bundled model on prompts and answers; less than a minute on two CPU cores.

    python examples/finetune.py [FOLDER]

The task is to spell numbers: the prompt is ``spell(42) == "`` and the answer ``forty-two"``. The loss counts the
answers only. FOLDER (by default a temporary one) gets the data, the run and the new model, ``run/final``.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import tempfile
from pathlib import Path

import hyaena
from hyaena.tokenizers import Tokenizer
from hyaena.train.config import DataConfig, OptimConfig, TrainConfig
from hyaena.train.loop import train

ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def spell(number: int) -> str:
    """Spell a number from 0 to 99."""
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (f"-{ONES[ones]}" if ones else "")


def write_rows(path: Path, numbers: list[int]) -> None:
    """Write one JSON object per line: the form of data with prompts."""
    rows = [{"prompt": f'spell({number}) == "', "completion": f'{spell(number)}"'} for number in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def answer(model: hyaena.StripedHyena, tokenizer: Tokenizer, number: int) -> str:
    """Complete the prompt of a number with the most likely text."""
    prompt = f'spell({number}) == "'
    completion = hyaena.generate(model, tokenizer, prompt, max_new_tokens=20, temperature=0, stop='"', seed=0)
    assert not isinstance(completion, list)
    return completion.text


def main(folder: Path, steps: int = 40) -> None:
    """Write the data, train, and compare answers before and after."""
    numbers = random.Random(0).sample(range(100), 100)
    heldout = numbers[:20]
    write_rows(folder / "train.jsonl", numbers[20:])
    write_rows(folder / "heldout.jsonl", heldout)
    config = TrainConfig(
        output=str(folder / "run"),
        init_from="cub",
        data=DataConfig(train=(str(folder / "train.jsonl"),), heldout=(str(folder / "heldout.jsonl"),)),
        optim=OptimConfig(lr=1e-3, warmup_steps=4),
        steps=steps,
        window=64,
        batch_size=4,
        eval_every=20,
    )
    result = train(config)
    before, after = (hyaena.load(source) for source in ("cub", folder / "run/final"))
    print(
        f"held-out answers: {result.initial_bits_per_byte:.2f} bits per byte before, {result.bits_per_byte:.2f} after"
    )
    for number in heldout[:5]:
        print(f"{number}: {answer(*before, number)!r} before, {answer(*after, number)!r} after")
    right = sum(answer(*after, number) == spell(number) for number in heldout)
    print(f"{right} of {len(heldout)} numbers that it has not seen are spelled right; the model is {folder}/run/final")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
