"""Finds the layer in which NaN or infinity first appears."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hyaena.generation.chunks import run_steps
from hyaena.model import StripedHyena


class _NonFiniteFound(Exception):
    """Leaves a forward pass at the module whose output is not finite."""


CHUNK = 512
"""Tokens per pass of the search: logits of every position are computed, so fewer than a prefill takes."""


def first_non_finite(model: StripedHyena, ids: Sequence[int], *, method: str = "auto") -> str:
    """Read tokens again and say where NaN or infinity first appears, in words.

    Memory stays flat, as in a prefill: chunks and a cache.
    """
    return run_steps(search_non_finite(model, ids, method=method))


@torch.inference_mode()
def search_non_finite(model: StripedHyena, ids: Sequence[int], *, method: str = "auto") -> Generator[int, None, str]:
    """``first_non_finite`` in steps of a chunk, between which others may use the model.

    Yields:
        How many tokens were read since the step before.
    """
    places: list[tuple[str, nn.Module]] = [("the embedding", model.embed_tokens)]
    places += [(f"layer {i} ({kind})", model.layers[i]) for i, kind in enumerate(model.config.layer_types)]
    places += [("the final norm", model.norm)]
    start, thread = 0, threading.get_ident()

    def check(place: str, x: Tensor) -> None:
        broken = ~torch.isfinite(x[0]).all(dim=-1)  # [T]
        if bool(broken.any()):
            raise _NonFiniteFound(f"they first appear in {place}, at token {start + int(broken.nonzero()[0])}")

    def watch(place: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == thread:  # others may use the model meanwhile
                check(place, output[0] if isinstance(output, tuple) else output)

        return hook

    cache = model.make_cache(1, max_length=len(ids), method=method)
    for start in range(0, len(ids), CHUNK):
        part = torch.tensor([list(ids[start : start + CHUNK])], device=model.device)
        handles = [module.register_forward_hook(watch(place)) for place, module in places]
        try:
            check("the head", model(part, cache=cache, method=method))
        except _NonFiniteFound as found:
            return str(found)
        finally:
            for handle in handles:
                handle.remove()
        yield part.shape[1]
    return "they were finite when the tokens were read again, so not the weights but the steps differ"
