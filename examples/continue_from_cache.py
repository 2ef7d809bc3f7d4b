"""Read a prompt once, keep what the model remembers of it, and go on from there several times.

python examples/continue_from_cache.py
"""

import torch

import hyaena

model, tokenizer = hyaena.load("cub")


def ids(text: str) -> torch.Tensor:
    """Make the ids [1,T] of a text: the tokens of cub are bytes."""
    return torch.tensor([list(text.encode())])


with torch.inference_mode():
    cache = model.make_cache(batch_size=1)
    model(ids("import sys\n\n\ndef main(argv):\n    if "), cache=cache)  # the long part, read once
    print(cache)

    # Branches: a snapshot is an independent copy, so each branch goes on from the same place.
    for branch in ("not argv", "len(argv) > ", "argv[0] == "):
        copy = cache.snapshot()
        token = model(ids(branch), cache=copy)[:, -1].argmax(-1)
        out = []
        for _ in range(16):  # greedy, one token per pass
            out.append(int(token))
            token = model(token[:, None], cache=copy)[:, -1].argmax(-1)
        print(repr(branch + tokenizer.decode(out)))

    # Or as rows of one batch: merge copies, and all branches advance in one pass.
    batch = cache.merge([cache] * 3)
    logits = model(torch.cat([ids("argc"), ids("argv"), ids("not ")]), cache=batch)
    print(f"{batch.batch_size} rows of {batch.lengths} tokens:", [chr(i) for i in logits[:, -1].argmax(-1).tolist()])
