"""Rows of very different lengths in one call: each costs its own memory, and none waits for another's prompt."""

from __future__ import annotations

import torch

from hyaena.config import ModelConfig
from hyaena.generation import Event, stream
from hyaena.model import StripedHyena
from hyaena.ops import KVState
from hyaena.tokenizers import ByteTokenizer

CONFIG = ModelConfig(
    vocab_size=260,
    hidden_size=16,
    layer_types=("hyena", "attention"),
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    state_size=2,
)


def run(prompts: list[str], monkeypatch, decoding: str, **options: object) -> tuple[list[tuple[Event, int]], int]:
    """The events, each with the number of passes over prompts before it; and the most numbers that a cache held."""
    torch.manual_seed(0)
    model = StripedHyena(CONFIG).double()
    stores: dict[int, int] = {}
    allocate = KVState.allocate

    def count(batch: int, groups: int, capacity: int, *rest: object) -> KVState:
        state = allocate(batch, groups, capacity, *rest)  # type: ignore[arg-type]
        stores[len(stores)] = batch * capacity
        return state

    monkeypatch.setattr(KVState, "allocate", count)
    passes: list[int] = []
    events = [
        (event, len(passes))
        for event in stream(
            model,
            ByteTokenizer(260),
            prompts,
            decoding=decoding,  # type: ignore[arg-type]
            progress=lambda done, total: passes.append(done),
            stop_at_eos=False,
            **options,  # type: ignore[arg-type]
        )
    ]
    monkeypatch.undo()
    return events, sum(stores.values())


def test_short_rows_do_not_wait_and_cost_what_they_cost_alone(monkeypatch) -> None:
    short, long = [f"import {i:03d}" for i in range(15)], "x" * 2399
    for decoding in ("eager", "static"):
        options = {"max_new_tokens": 8, "prefill_chunk": 240}
        events, slots = run([*short, long], monkeypatch, decoding, **options)
        apart = [run(part, monkeypatch, decoding, **options) for part in (short, [long])]
        # 15 rows of 11 + 8 tokens, one of 2,400 + 8; static decoding has a slot of scratch for each place besides
        assert slots <= 15 * 19 + 2408 + 17 and slots <= 1.05 * sum(number for _, number in apart)
        first = {}
        for event, passes in events:
            first.setdefault(event.index, passes)
        assert {first[row] for row in range(15)} == {1} and first[15] == 1 + 10
        # and they are decoded while the long prompt is read, one step after each pass
        done = {event.index: passes for event, passes in events if event.finish_reason}
        assert {done[row] for row in range(15)} == {7}
        alone = {event.index: event for event, _ in apart[0][0]}
        tokens = [[e.token for e, _ in events if e.index == row] for row in range(16)]
        assert tokens[3] == [e.token for e, _ in apart[0][0] if e.index == 3] and len(alone) == 15
        assert tokens[15] == [e.token for e, _ in apart[1][0]]
