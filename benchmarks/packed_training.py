"""Training step on packed documents against the same window unpacked, and against a model of attention layers alone.

    python -m benchmarks.packed_training [--length 32768] [--steps 5] [--out packed.json]

A step is forward and backward with full activation checkpointing (each layer is computed again in the backward pass),
in bfloat16, on two Hyena and two attention layers of the 7B's width, or on four attention layers, with a vocabulary so
small that the head weighs nothing. Documents have 256 to 8,192 tokens, log-uniform. Before anything is timed, the fused
operator and the attention of packed documents are held to the plain path: loss and gradients. The variants are timed
in turns; a figure is the median of their steps. ``--quick`` runs tiny sizes, on a CPU too, to try the program.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hyaena.config import ModelConfig
from hyaena.model import StripedHyena
from hyaena.ops.backend import VARIABLE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

WIDE = ModelConfig(
    vocab_size=512,
    hidden_size=4096,
    layer_types=("hyena", "attention") * 2,
    intermediate_size=14_336,
    num_attention_heads=32,
    num_key_value_heads=8,
    state_size=2,
    rope_theta=500_000.0,
    max_length=131_072,
    tie_embeddings=True,
)
SMALL = replace(WIDE, hidden_size=512, num_attention_heads=8, num_key_value_heads=2, intermediate_size=1024)
TINY = replace(WIDE, vocab_size=64, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32)

LIMIT = 1e-4
"""Relative error of all gradients together in float32, whose sums run over thousands of steps."""


class IncorrectError(Exception):
    """A variant computes something else than the plain path."""


@dataclass(frozen=True)
class Window:
    """One window of tokens.

    Attributes:
        ids: int [1,T].
        segments: int [1,T], the number of each position's document; None for an unpacked window.
    """

    ids: Tensor
    segments: Tensor | None


def draw_lengths(total: int, least: int, most: int, generator: torch.Generator) -> list[int]:
    """Draw log-uniform document lengths until they fill ``total`` tokens; the last one is cut."""
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        share = float(torch.rand((), generator=generator))
        lengths.append(min(left, round(least * (most / least) ** share)))
    return lengths


def draw_window(config: ModelConfig, lengths: list[int]) -> Window:
    """Draw random tokens for packed documents."""
    ids = torch.randint(config.vocab_size, (1, sum(lengths)), device=DEVICE)
    numbers = torch.arange(len(lengths), device=DEVICE)
    return Window(ids, numbers.repeat_interleave(torch.tensor(lengths, device=DEVICE))[None])


def make_model(config: ModelConfig, dtype: torch.dtype, *, checkpointing: bool) -> StripedHyena:
    """Make a model with fresh weights, each layer behind activation checkpointing where wanted."""
    with torch.device("meta"):
        model = StripedHyena(config)
    model.to(dtype).to_empty(device=DEVICE)
    model.init_weights()
    if checkpointing:
        for layer in model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model


def train_step(model: StripedHyena, window: Window) -> Tensor:
    """Compute loss and gradients; the loss of the next token, across boundaries too, since only time counts."""
    model.zero_grad(set_to_none=True)
    logits = model(window.ids, segment_ids=window.segments)
    loss = F.cross_entropy(logits[0, :-1].float(), window.ids[0, 1:])
    loss.backward()
    return loss.detach()


def loss_and_gradients(model: StripedHyena, window: Window, backend: str) -> tuple[Tensor, Tensor]:
    """Compute the loss and all gradients as one float64 vector, by the kernels or by plain torch."""
    os.environ[VARIABLE] = backend
    loss = train_step(model, window).double()
    os.environ.pop(VARIABLE)
    return loss, torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def distance(value: Tensor, expected: Tensor) -> float:
    """Compute ‖value - expected‖ / ‖expected‖."""
    return float((value - expected).norm() / expected.norm())


def check(config: ModelConfig, lengths: list[int], backend: str) -> dict[str, float]:
    """Hold the packed step to the plain path in float32: the loss, and all gradients together.

    In bfloat16 it may be as wrong as twice the plain path's own rounding.

    Raises:
        IncorrectError: a loss or gradient is wrong.
    """
    errors = {}
    torch.manual_seed(0)
    window = draw_window(config, lengths)
    reference = make_model(config, torch.float32, checkpointing=False)
    loss, gradients = loss_and_gradients(reference, window, "plain")
    kinds = {
        "float32": (torch.float32, backend),
        "plain bfloat16": (torch.bfloat16, "plain"),
        "bfloat16": (torch.bfloat16, backend),
    }
    for name, (dtype, which) in kinds.items():
        model = make_model(config, dtype, checkpointing=True)
        model.load_state_dict(reference.state_dict())
        got_loss, got = loss_and_gradients(model, window, which)
        errors[name] = max(distance(got, gradients), float((got_loss - loss).abs() / loss))
    for name, limit in (("float32", LIMIT), ("bfloat16", 2 * errors["plain bfloat16"])):
        if not errors[name] <= limit:
            raise IncorrectError(f"packed training in {name}: relative error {errors[name]:.1e} > {limit:.1e}")
    return errors


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measure(run: Callable[[], object]) -> float:
    """Measure the seconds of one call, the device's work included."""
    synchronize()
    begin = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - begin


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32_768, help="tokens of the window (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of every variant (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the program")
    args = parser.parse_args()

    config, dtype = (TINY, torch.float32) if args.quick else (WIDE, torch.bfloat16)
    length, least, most = (64, 4, 16) if args.quick else (args.length, 256, 8192)
    backend = "triton" if DEVICE == "cuda" else "plain"
    lengths = draw_lengths(length, least, most, torch.Generator().manual_seed(2))
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU", "lengths": lengths}
    print(f"{found['device']}; {len(lengths)} documents in {length:,} tokens: {lengths}", flush=True)

    small, ragged = (TINY, [1, 9, 1, 1, 12]) if args.quick else (SMALL, [1, 700, 1, 1, 300, 64, 900, 81])
    found["errors"] = check(small, ragged, backend)
    print("relative errors against the plain path:", found["errors"], flush=True)

    torch.manual_seed(0)
    packed = draw_window(config, lengths)
    windows = {"packed": packed, "unpacked": Window(packed.ids, None)}
    for kind, layers in (("striped", config.layer_types), ("attention", ("attention",) * 4)):
        model = make_model(replace(config, layer_types=layers), dtype, checkpointing=True)
        for window in windows.values():  # compile, and fill the allocator's pools
            train_step(model, window)
        seconds: dict[str, list[float]] = {name: [] for name in windows}
        for _ in range(args.steps):
            for name, window in windows.items():
                seconds[name].append(measure(lambda model=model, window=window: train_step(model, window)))
        found[kind] = {name: length / statistics.median(times) for name, times in seconds.items()}
        found[f"{kind} seconds"] = seconds
        del model

    print(f"{'layers':<24}{'packed':>12}{'unpacked':>12}{'packed / unpacked':>20}   tokens/s")
    for kind, name in (("striped", "2 Hyena, 2 attention"), ("attention", "4 attention")):
        rates = found[kind]
        ratio = rates["packed"] / rates["unpacked"]
        print(f"{name:<24}{rates['packed']:>12,.0f}{rates['unpacked']:>12,.0f}{ratio:>20.2f}")
    for name in windows:
        print(f"striped / attention, {name}: {found['striped'][name] / found['attention'][name]:.2f}")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
