"""Tokenizers as transformers reads them: the ids of ours, for every kind and text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import hyaena
from hyaena import StripedHyena
from hyaena.errors import InputError
from hyaena.hf import fast_tokenizer, load
from hyaena.tokenizers import ByteTokenizer, CharacterTokenizer, HFTokenizer, Tokenizer, transformers_files
from tokenizer_libraries import TEXTS, byte_level, sentencepiece_like, write

KINDS = ["bytes", "characters", "strip", "metaspace", "byte-level"]
MORE = ["</s><s> <pad> <|endoftext|>", "ACGT" * 20, "\t\r\n", "größe 日本 😀", "an added wörd"]


def make(kind: str, folder: Path) -> Tokenizer:
    if kind == "bytes":
        return ByteTokenizer(264)
    if kind == "characters":
        return CharacterTokenizer(512)
    library = byte_level() if kind == "byte-level" else sentencepiece_like(kind)
    return HFTokenizer(write(library, folder))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_ids_for_the_same_texts(kind: str, tmp_path: Path) -> None:
    ours = make(kind, tmp_path)
    (tmp_path / "out").mkdir()
    for name, content in transformers_files(ours).items():
        (tmp_path / "out" / name).write_bytes(content)
    first = AutoTokenizer.from_pretrained(tmp_path / "out")
    first.save_pretrained(tmp_path / "again")
    for theirs in (first, AutoTokenizer.from_pretrained(tmp_path / "again"), fast_tokenizer(ours)):
        for text in [*TEXTS, *MORE]:
            ids = ours.encode(text)
            assert theirs(text)["input_ids"] == ids, text
            assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, add_special_tokens=False)
            assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
            ours.bos_id,
            ours.eos_id,
            ours.pad_id,
        )
        assert theirs.padding_side == "left"
        if ours.eos_id is not None:
            name = theirs.eos_token
            assert theirs.encode(name, add_special_tokens=False, split_special_tokens=False) == [ours.eos_id]


def test_every_byte(tmp_path: Path) -> None:
    for kind, ours in (("bytes", ByteTokenizer()), ("characters", CharacterTokenizer())):
        theirs = fast_tokenizer(make(kind, tmp_path))
        values = range(256) if kind == "bytes" else range(2, 256)
        text = "".join(map(chr, values))
        assert theirs(text)["input_ids"] == ours.encode(text)
        for value in values:
            assert theirs.decode([value]) == ours.decode([value])
    assert fast_tokenizer(CharacterTokenizer())("A\0\1C")["input_ids"] == [65, 67]  # ours raises


def test_other_tokenizers_have_no_form() -> None:
    class Mine(ByteTokenizer):
        pass

    class Other(Tokenizer):
        def _encode(self, text: str | bytes, special: bool, add_special_tokens: bool) -> list[int]:
            return []

    assert transformers_files(Mine())
    with pytest.raises(InputError, match="Other has no form for transformers"):
        transformers_files(Other())


@torch.inference_mode()
def test_load_takes_what_hyaena_takes() -> None:
    model, tokenizer = load("cub", dtype="bfloat16")
    native: StripedHyena = hyaena.load_model("cub", dtype="bfloat16")
    inputs = tokenizer(["a", "import"], padding=True, return_tensors="pt")
    assert inputs["attention_mask"].tolist() == [[0, 0, 0, 0, 0, 1, 1], [1] * 7]
    assert torch.equal(model(inputs["input_ids"][1:]).logits, native(inputs["input_ids"][1:]))
    settings = model.generation_config
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (256, [257], 258)
    with pytest.raises(hyaena.errors.CheckpointError, match="no such model"):
        load("cubb/")
