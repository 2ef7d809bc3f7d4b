"""What is no path is refused where the path is given, whoever would have opened it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hyaena
from configs import TINY
from hyaena import checkpoints, hub
from hyaena.arguments import as_path
from hyaena.errors import InputError
from hyaena.formats import read_config
from hyaena.model import StripedHyena

MODEL = StripedHyena(TINY)


@pytest.mark.parametrize("value", ["a", "a b", "./é", Path("a/b")])
def test_a_path_is_text_or_an_object_that_stands_for_one(value: Any) -> None:
    assert as_path("the model", value) == Path(value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "must be a path, not (None|a tuple)"),
        (5, "must be a path, not an int"),
        (b"a", "must be a path, not a bytes"),
        (["a"], "must be a path, not a list"),
        ({}, "must be a path, not a dict"),
        (MODEL, "must be a path, not a StripedHyena"),
        (torch.zeros(2), r"must be a path, not a float32 Tensor of shape \[2\]"),
        ("", "is empty: name a path, or . for the current folder"),
        ("a\0b", "has a NUL character in it"),
    ],
)
@pytest.mark.parametrize(
    "call",
    [
        hyaena.load,
        hyaena.load_model,
        hub.load_tokenizer_of,
        checkpoints.load_model,
        checkpoints.find,
        read_config,
        lambda value: hyaena.load("cub", config=() if value is None else value),
        lambda value: hyaena.save_model(MODEL, value),
    ],
    ids=["load", "load_model", "tokenizer", "checkpoints", "find", "read_config", "config", "save_model"],
)
def test_what_is_no_path_is_one_line(call: Callable[[Any], Any], value: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        call(value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 200
