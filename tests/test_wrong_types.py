"""Values of other types than those that a function takes: one line that says what it wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hyaena
from configs import TINY
from hyaena import checkpoints
from hyaena.adapters import read_adapter
from hyaena.errors import HyaenaError
from hyaena.model import StripedHyena
from hyaena.records import FastaGenome, Variant, read_variants
from hyaena.scoring import Edit, iter_edit_scores, score_variants
from hyaena.tokenizers import ByteTokenizer

MODEL = StripedHyena(replace(TINY, vocab_size=260, max_length=100)).eval()
GENOME = {"c": "ACGTTGCAAC" * 10}
WRONG = [True, 1.5, float("nan"), 2**70, b"x", [None], {"a": 1}, object(), torch.tensor(1), print, "ACGT"]


def variants(genome: Any = GENOME, *, window: Any = 20, max_length: Any = None, **fields: Any) -> object:
    variant = Variant("c", 50, "A", "G")._replace(**fields)
    return score_variants(MODEL, ByteTokenizer(260), genome, [variant], window=window, max_length=max_length)


def edits(windows: Any) -> object:
    return list(iter_edit_scores(MODEL, ByteTokenizer(260), windows, both_strands=True))


TAKERS: dict[str, Callable[[Any], object]] = {
    "texts": lambda x: list(hyaena.iter_scores(MODEL, ByteTokenizer(260), x)),
    "groups": lambda x: hyaena.score_continuations(MODEL, x),
    "continuations": lambda x: hyaena.score_continuations(MODEL, [([1, 2], x)]),
    "genome": lambda x: variants(x),
    "file of a genome": FastaGenome,
    "file of variants": lambda x: list(read_variants(x)),
    "variants": lambda x: score_variants(MODEL, ByteTokenizer(260), GENOME, x),
    "variant": lambda x: score_variants(MODEL, ByteTokenizer(260), GENOME, [x]),
    "contig": lambda x: variants(contig=x),
    "start": lambda x: variants(start=x if x is not True else 1.0),
    "reference": lambda x: variants(reference=x),
    "alternative": lambda x: variants(alternative=x),
    "window": lambda x: variants(window=x),
    "max_length": lambda x: variants(max_length=-1 if isinstance(x, int) else x),
    "windows": edits,
    "edits": lambda x: edits([("ACGT", x)]),
    "edit": lambda x: edits([("ACGT", [x])]),
    "edit's letters": lambda x: edits([("ACGT", [Edit(0, "A", x)])]),
    "adapter": read_adapter,
    "checkpoint": lambda x: checkpoints.quantize_checkpoint(x, "nowhere", "int8"),
}


LETTERS = ("reference", "alternative", "edit's letters")
CASES = [(name, value) for name in TAKERS for value in WRONG if not (isinstance(value, str) and name in LETTERS)]


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{name}-{type(value).__name__}" for name, value in CASES])
def test_one_line(name: str, value: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HyaenaError) as caught:
        TAKERS[name](value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_edits_may_be_plain_tuples() -> None:
    scores = edits([("ACGTTGCA", [(3, "T", "G")])])
    assert scores == edits([("ACGTTGCA", [Edit(3, "T", "G")])])
