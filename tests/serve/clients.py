"""Engines over small models, and clients that collect what a request gets."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType

import hyaena
from configs import TINY, TINY_EVO, TINY_EVO2
from hyaena.adapters import Adapter
from hyaena.model import StripedHyena
from hyaena.sampling import SamplingParams
from hyaena.serve.engine import Delta, Engine, EngineSettings, Request
from hyaena.sizes import ModelSizes
from hyaena.tokenizers import ByteTokenizer

PATIENCE = 200.0
"""Seconds after which something has not happened and will not, however busy the machine is."""

MULTI = replace(
    TINY, layer_types=("hyena_se", "attention", "hyena_mr", "hyena_li"), se_filter_groups=4, mr_filter_groups=4
)
CONFIGS = {
    name: replace(c, vocab_size=256)
    for name, c in {"sh": TINY, "evo": TINY_EVO, "evo2": TINY_EVO2, "multi": MULTI}.items()
}


@contextmanager
def running(
    model: StripedHyena, adapters: Mapping[str, Adapter] = MappingProxyType({}), **settings: object
) -> Iterator[Engine]:
    engine = Engine(model, ByteTokenizer(), EngineSettings(**settings), adapters=adapters)  # type: ignore[arg-type]
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(timeout=PATIENCE)


def until(holds: Callable[[], object], what: str = "it") -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.01)


class Client:
    """Collects what a request gets."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.done = threading.Event()

    def __call__(self, delta: Delta) -> None:
        self.deltas.append(delta)
        if delta.finish_reason is not None:
            self.done.set()

    def wait(self) -> Client:
        assert self.done.wait(PATIENCE), "the request never ended"
        return self

    @property
    def tokens(self) -> list[int]:
        return [delta.token for delta in self.deltas if delta.token is not None]

    @property
    def logprobs(self) -> list[float]:
        return [delta.logprob for delta in self.deltas if delta.token is not None]

    @property
    def reason(self) -> str | None:
        return self.deltas[-1].finish_reason


def submit(engine: Engine, prompt: list[int], count: int = 12, adapter: str = "", **params: object) -> Client:
    client = Client()
    client.key = engine.submit(  # type: ignore[attr-defined]
        Request(prompt=prompt, params=SamplingParams(**params), max_new_tokens=count, adapter=adapter),  # type: ignore[arg-type]
        client,
    )
    return client


def once(function: Callable[[], object]) -> Generator[float, None, None]:
    """Work of the engine in one step."""
    function()
    yield 0.0


def alone(model: StripedHyena, prompt: list[int], count: int = 12, **params: object) -> hyaena.generation.Completion:
    return hyaena.generate(model, ByteTokenizer(), prompt, max_new_tokens=count, stop_at_eos=False, **params)  # type: ignore[arg-type]


def prompts(count: int, *, seed: int = 0, longest: int = 200) -> list[list[int]]:
    rng = random.Random(seed)
    stems = [[rng.randrange(256) for _ in range(longest)] for _ in range(3)]
    return [
        [*rng.choice(stems)[: rng.randrange(0, longest)], *(rng.randrange(256) for _ in range(rng.randrange(1, 9)))]
        for _ in range(count)
    ]


def page_bytes(model: StripedHyena) -> int:
    return ModelSizes(model.config).page_bytes(64, 4)
