"""The actors of ``hyaena.ray`` without Ray: they take and give batches of columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hyaena
from hyaena.errors import InputError
from hyaena.ray import Embedder, Scorer

TEXTS = ["ACGTACGTAAGG", "TTGACA", "G"]


def batch() -> dict[str, Any]:
    return {"name": np.array(["a", "b", "c"]), "seq": np.array(TEXTS, object), "other": np.arange(3)}


@pytest.fixture
def model(golden: Path) -> str:
    return str(golden / "evo-tiny")


@pytest.mark.parametrize("options", [{}, {"per_token": True}, {"per_token": True, "both_strands": True}])
def test_scores(model: str, options: dict[str, bool]) -> None:
    strands = {"both_strands": options.get("both_strands", False)}
    expected = hyaena.score(*hyaena.load(model), TEXTS, **strands)
    found = Scorer(model, text="seq", device="cpu", **options)(batch())  # type: ignore[arg-type]
    assert found["name"].tolist() == ["a", "b", "c"] and found["other"].tolist() == [0, 1, 2]
    lists = ["ids", "logprobs", "entropies", *(["ranks"] * (not strands["both_strands"]))]
    assert list(found)[3:] == [
        *("tokens", "predicted", "sum", "mean", "perplexity"),
        *(lists if "per_token" in options else []),
    ]
    assert isinstance(expected, list)
    for index, one in enumerate(expected):
        assert (found["tokens"][index], found["predicted"][index]) == (len(TEXTS[index]), one.count)
        for column in ("sum", "mean", "perplexity"):
            np.testing.assert_equal(found[column][index], getattr(one, column))
        if "per_token" in options:
            np.testing.assert_array_equal(found["logprobs"][index], one.logprobs)


def test_vectors(model: str) -> None:
    network, tokenizer = hyaena.load(model)
    for pool in ("mean", "none", [0]):
        found = Embedder(model, text="seq", device="cpu", layers=[0, "norm"], pool=pool)(batch())
        expected = [one for _, one in hyaena.iter_embeddings(network, tokenizer, TEXTS, [0, "norm"], pool=pool)]
        assert (found["norm"].dtype == np.float32) == (pool == "mean")
        for index, one in enumerate(expected):
            np.testing.assert_array_equal(found["0"][index], one[0])
            np.testing.assert_array_equal(found["norm"][index], one["norm"])


def test_mistakes(model: str) -> None:
    with pytest.raises(InputError, match="pool must be"):
        Embedder(model, device="cpu", pool="max")
    scorer = Scorer(model, device="cpu")
    with pytest.raises(InputError, match="the batch has no column 'text' but name, seq, other: name it with text="):
        scorer(batch())
    with pytest.raises(InputError, match=r"^record 'b': the text has the byte 0 at position 1"):
        scorer({"name": np.array(["a", "b"]), "text": np.array(["AC", "A\0C"])})
    with pytest.raises(InputError, match=r"^text 1: the text has the byte 0"):
        scorer({"text": np.array(["AC", "A\0C"])})
