"""Excerpts: a part of a text behind its context scores as it does inside the text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hyaena
from configs import TINY_BYTES
from hyaena.errors import InputError
from hyaena.scoring import Excerpt
from hyaena.tokenizers import ByteTokenizer
from models import spread

TOKENIZER = ByteTokenizer(259)
BEFORE, TEXT, AFTER = "ACGTTGCA", "GATTACAGATTACA", "CCGTA"


@pytest.mark.parametrize("options", [{}, {"bos": False}, {"tokens_per_pass": 5}])
def test_scores_are_those_of_the_part(options: dict[str, Any]) -> None:
    model = spread(TINY_BYTES)
    (found,) = hyaena.score(model, TOKENIZER, [Excerpt(TEXT, BEFORE, AFTER)], **options)
    whole = hyaena.score(model, TOKENIZER, BEFORE + TEXT, **options)
    np.testing.assert_allclose(found.logprobs, whole.logprobs[len(BEFORE) :], rtol=1e-4)
    np.testing.assert_array_equal(found.ranks, whole.ranks[len(BEFORE) :])
    assert (found.count, found.sum) == (len(TEXT), pytest.approx(found.logprobs.astype(float).sum()))
    assert found.tokens.tolist() == list(TEXT.encode())


def test_the_other_strand_reads_what_stands_behind() -> None:
    model = spread(TINY_BYTES)
    (found,) = hyaena.score(model, TOKENIZER, [Excerpt(TEXT, BEFORE, AFTER)], both_strands=True)
    one = hyaena.score(model, TOKENIZER, BEFORE + TEXT).logprobs[len(BEFORE) :]
    other = hyaena.score(model, TOKENIZER, hyaena.scoring.reverse_complement(TEXT + AFTER)).logprobs[len(AFTER) :]
    np.testing.assert_allclose(found.logprobs, (one + other[::-1]) / 2, rtol=1e-4)


@pytest.mark.parametrize("pool", ["mean", "last", "none", [0, -1]])
def test_vectors_are_those_of_the_part(pool: Any) -> None:
    model = spread(TINY_BYTES)
    (found,) = hyaena.embed(model, TOKENIZER, [Excerpt(TEXT, BEFORE)], 0, pool=pool)
    rows = hyaena.embed(model, TOKENIZER, BEFORE + TEXT, 0, pool="none")[len(BEFORE) :]
    wanted = {"mean": rows.mean(0), "last": rows[-1], "none": rows}.get(str(pool), rows[[0, -1]])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_an_excerpt_needs_a_text_and_letters() -> None:
    model = spread(TINY_BYTES)
    for excerpt in (Excerpt(""), Excerpt("", "ACG"), Excerpt("é")):
        with pytest.raises(InputError, match="text 0"):
            hyaena.score(model, TOKENIZER, [excerpt])
    with pytest.raises(InputError, match="pass the maximum length 512"):
        hyaena.score(model, TOKENIZER, [Excerpt("A" * 400, "C" * 200)])
