"""A training step of four layers of the 7B's width, packed and not, against four attention layers."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu.session import GpuSession
from benchmarks.registry import Row, Step, Summary, Target, pairwise
from hyaena.bench.clock import Call, Side, take_turns
from hyaena.bench.run import random_model
from hyaena.config import ModelConfig
from hyaena.model import StripedHyena

NAMES = {
    "unpacked": "the same window unpacked",
    "attention": "four attention layers",
    "packed attention": "four attention layers, packed",
}


def train(session: GpuSession) -> Iterator[Step]:
    """Each window."""
    session.forget_model()
    for length, against_attention, against_unpacked in session.sizes.training:
        run = functools.partial(at, session, length, against_attention, against_unpacked)
        yield Step(f"training step, T {length:,}", run)


def at(session: GpuSession, length: int, against_attention: float, against_unpacked: float | None) -> Iterator[Row]:
    """Our layers and attention layers, on one window and on packed documents; what fails takes no other with it."""
    config = session.sizes.training_config
    baseline = dataclasses.replace(config, layer_types=("attention",) * config.num_layers, name="four attention layers")
    documents = pack(length, *session.sizes.documents)
    segments = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))[None].to(session.device)
    torch.manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, length), device=session.device)
    ours, theirs = (trainable(c, session.device, session.dtype) for c in (config, baseline))
    sides = {
        "unpacked": lambda: step(ours, ids),
        "attention": lambda: step(theirs, ids),
        "packed": lambda: step(ours, ids, segments),
        "packed attention": lambda: step(theirs, ids, segments),
    }
    what = f"training step, T {length:,}, two Hyena and two attention layers, D {config.hidden_size}"
    note = "Packed: documents of " + ", ".join(f"{n:,}" for n in documents) + " tokens."
    yield _row(session, sides, length, what, "unpacked", "attention", Target(">=", against_attention))
    packed_target = None if against_unpacked is None else Target(">=", against_unpacked)
    yield _row(session, sides, length, what + ", packed", "packed", "unpacked", packed_target, note)
    yield _row(session, sides, length, what + ", packed", "packed", "packed attention", None, note)


def pack(length: int, least: int, most: int) -> list[int]:
    """Lengths of documents that fill a window, between two bounds evenly on a logarithmic scale; the last is cut."""
    numbers, documents = random.Random(0), []
    while sum(documents) < length:
        drawn = round(least * (most / least) ** numbers.random())
        documents.append(min(drawn, length - sum(documents)))
    return documents


def trainable(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> StripedHyena:
    """A model that recomputes every layer in its backward pass."""
    model = random_model(config, device, dtype).train()
    for layer in model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    return model


def step(model: StripedHyena, ids: Tensor, segments: Tensor | None = None) -> None:
    """Forward and backward, gradients dropped: the mean cross-entropy of the next token."""
    logits = model(ids, segment_ids=segments)
    nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()
    model.zero_grad(set_to_none=True)


def _row(
    session: GpuSession,
    sides: Mapping[str, Call],
    length: int,
    what: str,
    one: str,
    other: str,
    target: Target | None,
    note: str = "",
) -> Row:
    """Tokens per second of two sides in turns."""

    def finished(name: str) -> None:
        sides[name]()
        session.synchronize()

    for name in (one, other):
        finished(name)  # compile
    seconds = take_turns(
        {name: Side(functools.partial(finished, name)) for name in (one, other)}, session.sizes.training_rounds
    )
    return Row(
        what=what,
        unit="tokens/s",
        ours=Summary.of(length / s for s in seconds[one].values),
        baseline_name=NAMES[other],
        baseline=Summary.of(length / s for s in seconds[other].values),
        ratio=pairwise(seconds[other].values, seconds[one].values),
        ratio_name="ours / baseline",
        target=target,
        note=note,
    )
