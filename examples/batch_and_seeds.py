"""Continue several prompts in one batch, and draw several samples of one prompt.

python examples/batch_and_seeds.py
"""

import hyaena

model, tokenizer = hyaena.load("cub")
options = {"max_new_tokens": 16, "temperature": 0.8, "top_p": 0.95}

# Prompts of different lengths need no padding by hand. Each row has its own random numbers, made from the one seed.
prompts = ["import ", "def main(argv):\n    ", "class Node:\n"]
together = hyaena.generate(model, tokenizer, prompts, seed=1, **options)
for prompt, completion in zip(prompts, together, strict=True):
    print(repr(prompt + completion.text))

# The same call gives the same texts, and a row does not depend on its neighbours.
alone = hyaena.generate(model, tokenizer, prompts[1], seed=1, **options)
assert alone.tokens == together[1].tokens

# Four samples of one prompt: repeat it. They differ, and the first is what the prompt gives alone.
samples = hyaena.generate(model, tokenizer, [prompts[1]] * 4, seed=1, **options)
assert samples[0].tokens == alone.tokens
for sample in samples:
    print(repr(sample.text))

# One seed per row: each row is what its prompt gives alone with that seed.
rows = hyaena.generate(model, tokenizer, prompts, seed=[7, 8, 9], **options)
assert rows[2].tokens == hyaena.generate(model, tokenizer, prompts[2], seed=9, **options).tokens
