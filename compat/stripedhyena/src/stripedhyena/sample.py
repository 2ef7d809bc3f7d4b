"""From logits to tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from hyaena import sampling
from hyaena.sampling import SamplingParams


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Choose one token per row, with torch's global random numbers (``torch.manual_seed``).

    Args:
        logits: [B,V]; not changed. Tokens at -infinity are never chosen.
        top_k: 1 takes the most probable token, 0 keeps all, k the k most probable.
        top_p: of those, keep the most probable that reach this probability together; 0 and 1 keep all.
        temperature: 0 takes the most probable token.

    Returns:
        int64 [B].

    Raises:
        InputError: a value outside its range.
        NonFiniteError: a row holds NaN or +infinity, or nothing but -infinity. The original chose some token.
    """
    if top_k == 1:
        params = SamplingParams()
    else:
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=1.0 if top_p == 0 else top_p)
    rows = len(logits)
    return sampling.sample(logits, [params] * rows, [torch.default_generator] * rows)
