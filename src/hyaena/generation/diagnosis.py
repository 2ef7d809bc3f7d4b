"""Where a computation went wrong: the layer in which NaN or infinity first appears."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hyaena.model import StripedHyena


class _FoundError(Exception):
    """Leaves a forward pass at the module whose output is not finite."""


@torch.inference_mode()
def first_non_finite(model: StripedHyena, ids: Sequence[int], *, method: str, chunk: int) -> str:
    """Read tokens again and say where NaN or infinity first appears, in words.

    Memory stays flat, as in a prefill: chunks and a cache.
    """
    places: list[tuple[str, nn.Module]] = [("the embedding", model.embed_tokens)]
    places += [(f"layer {i} ({kind})", model.layers[i]) for i, kind in enumerate(model.config.layer_types)]
    places += [("the final norm", model.norm)]
    read = 0  # tokens, those of the pass under way included

    def watch(place: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            x = output[0] if isinstance(output, tuple) else output
            fine = torch.isfinite(x).flatten(2).all(dim=-1)[0]  # [T]
            if not bool(fine.all()):
                at = read - len(fine) + int((~fine).nonzero()[0])  # the norm sees the last position only
                raise _FoundError(f"they first appear in {place}, at token {at}")

        return hook

    handles = [module.register_forward_hook(watch(place)) for place, module in places]
    try:
        cache = model.make_cache(1, max_length=len(ids))
        for start in range(0, len(ids), chunk):
            part = torch.tensor([list(ids[start : start + chunk])], device=model.device)
            read = start + part.shape[1]
            logits = model(part, cache=cache, logits_to_keep=1, method=method)
    except _FoundError as found:
        return str(found)
    finally:
        for handle in handles:
            handle.remove()
    if bool(torch.isfinite(logits).all()):
        return "they were finite when the tokens were read again, so not the weights but the steps differ"
    return "they first appear in the head"
