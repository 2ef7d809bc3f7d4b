"""What narrow weights, and narrow keys and values, cost a model: loss on a text, and what Hyena layers remember of it.

    python scripts/build_corpus.py
    python -m benchmarks.narrow_loss cub corpus/heldout.jsonl --weights int8,int4

For each scheme: bytes of the weights; nats per token above the weights as they are stored, in windows without overlap,
everything computed in float32; and with ``--state N`` the distance of the states of all long filters after N tokens
of the text in one piece, relative to their norm, and at ten places on the way, since it differs from place to place.
``--calibrate FILE`` rounds by what the model reads in that text, as ``hyaena quantize`` does.

``--cache-dtype int8,…`` measures keys and values instead, with the weights in float32: windows are read through a cache
of float32, and of each of these dtypes.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import hyaena
from hyaena.cli.quantize import CALIBRATION_TOKENS
from hyaena.model import StripedHyena
from hyaena.ops import HyenaState
from hyaena.quant import collect_moments, narrow_linears, quantized_layers
from hyaena.schemes import CACHE_DTYPES, SCHEMES, scheme_of
from hyaena.sizes import ModelSizes
from hyaena.tokenizers import Tokenizer
from hyaena.train.corpus import Corpus, tokenize
from hyaena.train.documents import read_documents
from hyaena.train.evaluate import evaluate

PASS = 512
"""Tokens that are read at a time for the states."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("text", help="plain text or records, see `hyaena train`")
    parser.add_argument("--weights", default=",".join(SCHEMES), metavar="SCHEME,…")
    parser.add_argument("--cache-dtype", metavar="DTYPE,…", help=f"measure these instead: {', '.join(CACHE_DTYPES)}")
    parser.add_argument("--window", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--state", type=int, default=0, metavar="N", help="tokens before states are compared")
    parser.add_argument("--calibrate", metavar="FILE")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    schemes = [None, *map(scheme_of, arguments.weights.split(","))]
    load = partial(hyaena.load, arguments.model, device=arguments.device, dtype="float32")
    model, tokenizer = load()
    corpus = read(arguments.text, tokenizer)
    if arguments.cache_dtype:
        compare_caches(model, corpus, arguments.cache_dtype.split(","), arguments.window, arguments.state)
        return
    moments = {}
    if arguments.calibrate:
        ids = read(arguments.calibrate, tokenizer).tokens[:CALIBRATION_TOKENS]
        moments = collect_moments(model, torch.tensor(ids, dtype=torch.long))
    first = wide = None
    for scheme in schemes:
        began = time.perf_counter()
        if scheme is not None:
            model, _ = load()
            narrow(model, scheme.name, moments)
        loss = evaluate(model, corpus, window=arguments.window, device=arguments.device, batch_size=1).loss
        states = after(model, corpus, arguments.state) if arguments.state else {}
        first, wide = first or loss, wide or states
        sizes = ModelSizes(replace(model.config, weights=scheme and scheme.name))
        print(
            f"{scheme.name if scheme else 'as stored'}: {sizes.weight_bytes(2) / 1e6:.1f} MB, loss {loss:.6f} of "
            f"{corpus.num_predictions:,} tokens, {loss - first:+.6f}",
            *apart(states, wide),
            f"{time.perf_counter() - began:.0f} s",
            sep=", ",
            flush=True,
        )


def compare_caches(model: StripedHyena, corpus: Corpus, dtypes: list[str], window: int, length: int) -> None:
    """Print a line for a cache of float32, and for each dtype."""
    first = wide = None
    for dtype in ("float32", *dtypes):
        began = time.perf_counter()
        model.cache_dtype = dtype
        loss, tokens = loss_through_cache(model, corpus, window)
        states = after(model, corpus, length) if length else {}
        first, wide = first or loss, wide or states
        print(
            f"keys and values in {dtype}: loss {loss:.5f} of {tokens:,} tokens, {loss - first:+.6f}",
            *apart(states, wide),
            f"{time.perf_counter() - began:.0f} s",
            sep=", ",
            flush=True,
        )


@torch.inference_mode()
def loss_through_cache(model: StripedHyena, corpus: Corpus, window: int) -> tuple[float, int]:
    """Nats per token of windows of each document, each read in one pass into an empty cache; and how many tokens."""
    total, count = 0.0, 0
    for start, stop in zip(corpus.starts.tolist(), corpus.ends.tolist(), strict=True):
        for begin in range(start, stop - 1, window):
            ids = torch.tensor(corpus.tokens[begin : min(begin + window + 1, stop)], dtype=torch.long)
            ids = ids.to(model.device)
            logits = model(ids[None, :-1], cache=model.make_cache(1, max_length=window))[0]
            total += float(torch.nn.functional.cross_entropy(logits.double(), ids[1:], reduction="sum"))
            count += len(ids) - 1
    return total / count, count


def read(source: str, tokenizer: Tokenizer) -> Corpus:
    """A text as tokens."""
    return tokenize(list(read_documents([source])), tokenizer)


def narrow(model: StripedHyena, scheme: str, moments: dict[str, Tensor]) -> None:
    """Round the linear layers of a model, in place."""
    wide = {name: m.weight.detach() for name, m in model.named_modules() if type(m) is torch.nn.Linear}
    narrow_linears(model, scheme_of(scheme))
    for name, layer in quantized_layers(model).items():
        layer.narrow(wide[name], moments.get(name))


@torch.inference_mode()
def after(model: StripedHyena, corpus: Corpus, length: int) -> dict[int, Tensor]:
    """The states of all long filters after each tenth of so many tokens."""
    ids = torch.tensor(corpus.tokens[:length], dtype=torch.long, device=model.device)[None]
    cache, found = model.make_cache(max_length=length), {}
    parts = ids.split(PASS, dim=1)
    places = {len(parts) * i // 10 for i in range(1, 11)}
    for count, part in enumerate(parts, 1):
        model(part, cache=cache, logits_to_keep=1)
        if count in places:
            states = [state.long for state in cache.states if isinstance(state, HyenaState)]
            real = [torch.view_as_real(s) if s.is_complex() else s for s in states]
            found[cache.length] = torch.cat([s.flatten() for s in real])
    return found


def apart(states: dict[int, Tensor], wide: dict[int, Tensor]) -> list[str]:
    """How far states are from those of the wide weights, if there are any: at the last place, and at all."""
    if not states:
        return []
    found = [distance(states[n], wide[n]) for n in states]
    return [
        f"states after {max(states):,} tokens {found[-1]:.3%} apart "
        f"({min(found):.3%} … {max(found):.3%} at {len(found)} places)"
    ]


def distance(one: Tensor, other: Tensor) -> float:
    """Relative to the norm of the other."""
    return float((one - other).norm() / other.norm())


if __name__ == "__main__":
    sys.exit(main())
