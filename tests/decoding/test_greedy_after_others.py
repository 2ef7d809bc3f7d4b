"""Rows that ask more of a step leave nothing behind that makes later steps slower."""

from __future__ import annotations

import pytest
import torch

from configs import TINY
from hyaena.decoding import make_decoder
from hyaena.sampling import SamplingParams
from models import spread


@pytest.mark.parametrize("decoding", ["static", "compiled"])
def test_steps_are_greedy_again_when_a_row_with_a_penalty_has_left(decoding: str) -> None:
    if decoding == "compiled":
        pytest.importorskip("numba", reason="the kernels are compiled by numba")
    model = spread(TINY)
    decoder, alone = (make_decoder(model, 4, decoding) for _ in range(2))  # type: ignore[arg-type]

    def add(to: object, params: SamplingParams, ids: list[int]) -> None:
        cache = model.make_cache(1, max_length=64)
        with torch.inference_mode():
            first = model(torch.tensor([ids]), cache=cache)[:, -1].argmax(-1)
        seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool)
        seen[0, [*ids, *first.tolist()]] = True
        to.add(cache, first, [params], [params.generator()], seen=seen)  # type: ignore[attr-defined]

    greedy, penalty = SamplingParams(temperature=0), SamplingParams(temperature=0, repetition_penalty=1.5)
    for to in (decoder, alone):
        add(to, greedy, [1, 2, 3])
    want, got = [], []
    for step in range(12):
        if step in (3, 8):
            add(decoder, penalty, [4, 5, 6])
            assert not decoder.sampler.greedy
        if step in (5, 10):
            decoder.keep([0])
            assert decoder.sampler.greedy
        for to, tokens in ((decoder, got), (alone, want)):
            to.launch()
            tokens.append(to.fetch().tokens[0])
    assert got == want
