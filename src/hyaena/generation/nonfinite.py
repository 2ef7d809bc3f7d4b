"""Finds the layer in which NaN or infinity first appears."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hyaena.generation.chunks import run_steps
from hyaena.hooks import observing
from hyaena.model import StripedHyena


class _NonFiniteFound(Exception):
    """Leaves a forward pass at the module whose output is not finite."""


CHUNK = 512
"""Tokens per pass of the search: logits of every position are computed, so fewer than a prefill takes."""


def explain_non_finite(model: StripedHyena, ids: Sequence[int], *, method: str = "auto") -> str:
    """Read tokens again and say where NaN or infinity first appears, and what helps, in words.

    Memory stays flat, as in a prefill: chunks and a cache.
    """
    return run_steps(search_non_finite(model, ids, method=method))


def remedy(model: StripedHyena, *, overflows: bool | None = None) -> str:
    """What helps against numbers that are not finite, in words.

    Args:
        model: that made them.
        overflows: whether they come from keys and values that the dtype of the cache does not hold; None: not known.
    """
    usual = "check the weights with `hyaena info`, or compute in float32"
    if not _is_narrow(model) or overflows is False:
        return usual
    kept = str(model.cache_dtype).removeprefix("torch.")
    cache = f"keys and values beyond the range of {kept}, the cache's dtype: load the model with cache_dtype='auto'"
    return f"there are {cache}" if overflows else f"{usual}; or there are {cache}"


def _is_narrow(model: StripedHyena) -> bool:
    """Whether the model computes with numbers that are infinite in its caches. A slot of 8 bits has a scale."""
    kept = model.cache_dtype
    return kept.is_floating_point and torch.finfo(kept).max < torch.finfo(model.dtype).max / 2  # bfloat16 is no float16


def search_non_finite(model: StripedHyena, ids: Sequence[int], *, method: str = "auto") -> Generator[int, None, str]:
    """``explain_non_finite`` in steps of a chunk, between which others may use the model.

    Yields:
        How many tokens were read since the step before.
    """
    where = yield from _search(model, ids, method, model.cache_dtype)
    overflows = False
    if where is not None and _is_narrow(model):
        overflows = (yield from _search(model, ids, method, model.dtype)) != where
    if where is None:
        where = "they were finite when the tokens were read again, so not the weights but the steps differ"
    return f"{where}; {remedy(model, overflows=overflows)}"


@torch.inference_mode()
def _search(
    model: StripedHyena, ids: Sequence[int], method: str, dtype: torch.dtype
) -> Generator[int, None, str | None]:
    """Where they first appear with a cache of this dtype, in words; None where they do not appear."""
    places: list[tuple[str, nn.Module]] = [("the embedding", model.embed_tokens)]
    places += [(f"layer {i} ({kind})", model.layers[i]) for i, kind in enumerate(model.config.layer_types)]
    places += [("the final norm", model.norm)]
    start = 0

    def check(place: str, x: Tensor) -> None:
        broken = ~torch.isfinite(x[0]).all(dim=-1)  # [T]
        if bool(broken.any()):
            raise _NonFiniteFound(f"they first appear in {place}, at token {start + int(broken.nonzero()[0])}")

    def watch(place: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            check(place, output[0] if isinstance(output, tuple) else output)

        return hook

    cache = model.make_cache(1, max_length=len(ids), method=method, dtype=dtype)
    for start in range(0, len(ids), CHUNK):
        part = torch.tensor([list(ids[start : start + CHUNK])], device=model.device)
        try:
            with observing((module, watch(place)) for place, module in places):
                check("the head", model(part, cache=cache, method=method))
        except _NonFiniteFound as found:
            return str(found)
        yield part.shape[1]
    return None
