"""What has come with the end of the time, and before metrics are complete."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from configs import TINY
from hyaena.model import StripedHyena
from hyaena.serve.delivery import Delivery
from hyaena.serve.engine import Engine, EngineSettings
from hyaena.serve.metrics import Times
from hyaena.serve.protocol import CompletionBody
from hyaena.serve.service import Generation, Limits, Served, too_late
from hyaena.tokenizers import ByteTokenizer


def test_an_answer_that_is_complete_is_not_late() -> None:
    """Its reader was late, not the answer."""
    engine = Engine(StripedHyena(replace(TINY, vocab_size=259)), ByteTokenizer(), EngineSettings(kv_bytes=2**22))
    served = Served(name="tiny", engine=engine, tokenizer=ByteTokenizer())
    engine.start()

    async def read() -> list[Any]:
        body, delivery = CompletionBody(prompt="a", ignore_eos=True), Delivery(asyncio.get_running_loop(), 0)
        generation = Generation(
            served, [[97]], body, top=0, limits=Limits(seconds=60), delivery=delivery, max_new_tokens=3
        )
        while len(generation._inbox.items) < 3:
            await asyncio.sleep(0.01)
        generation.fail(too_late())
        found = []
        while parts := await generation.next():
            found += [delta.finish_reason for _, deltas in parts for delta in deltas]
        generation.close()
        return found

    try:
        assert asyncio.run(read()) == [None, None, "length"]
    finally:
        engine.stop()


def test_times_are_collected_while_a_model_is_new() -> None:
    times = Times("seconds", "text", (0.1, 1.0))

    class Collecting(dict[str, Any]):
        """Sums, at every change of which another thread collects."""

        def __setitem__(self, model: str, value: float) -> None:
            times.collect()
            super().__setitem__(model, value)
            times.collect()

        def setdefault(self, model: str, value: float) -> float:
            times.collect()
            return super().setdefault(model, value)

    times._sums = Collecting()
    times.observe("a", 0.5, 2)
    times.observe("a", 0.5, 2)
    assert times._sums == {"a": 2.0}
