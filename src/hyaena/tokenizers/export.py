"""Writes a tokenizer as the files that ``AutoTokenizer`` of transformers reads: the same ids for the same texts.

Names of special tokens inside a text stay text there, too (``split_special_tokens``).
"""

from __future__ import annotations

import json
from typing import Any

from hyaena.errors import InputError
from hyaena.tokenizers.base import Tokenizer
from hyaena.tokenizers.decoders import CHARACTER_OF
from hyaena.tokenizers.files import read_beside, read_object
from hyaena.tokenizers.hf import HFTokenizer
from hyaena.tokenizers.simple import ByteTokenizer, CharacterTokenizer

CLASS = "PreTrainedTokenizerFast"
_KEPT = ("chat_template", "model_max_length", "clean_up_tokenization_spaces")
"""Settings of a ``tokenizer_config.json`` that say nothing about special tokens."""


def transformers_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of a tokenizer for transformers: ``tokenizer.json``, ``tokenizer_config.json``, generation settings.

    Bytes and characters become a byte-level vocabulary without merges. Their special tokens are called ``<s>``,
    ``</s>`` and ``<pad>``. Where ``CharacterTokenizer`` refuses the bytes 0 and 1, transformers leaves them out.

    Raises:
        InputError: the tokenizer is of another kind.
    """
    settings: dict[str, Any] = {}
    generation: dict[str, Any] = {}
    names: dict[str, int | None] = {"<s>": tokenizer.bos_id, "</s>": tokenizer.eos_id, "<pad>": tokenizer.pad_id}
    if isinstance(tokenizer, HFTokenizer):
        spec, _ = read_object(tokenizer.path)
        beside = read_beside(tokenizer.path.with_name("tokenizer_config.json"))
        settings |= {key: beside[key] for key in _KEPT if key in beside}
        generation |= read_beside(tokenizer.path.with_name("generation_config.json"))
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        settings |= {key: tokenizer.name_of(token) for key, token in ids.items() if token is not None}
        adds_bos = tokenizer.adds_bos
    elif isinstance(tokenizer, ByteTokenizer | CharacterTokenizer):
        special = {name: token for name, token in names.items() if token is not None}
        spec = _byte_level(special)
        keys = {"<s>": "bos_token", "</s>": "eos_token", "<pad>": "pad_token"}
        settings |= {keys[name]: name for name in special}
        adds_bos = tokenizer.bos_id is not None
    else:
        raise InputError(f"a {type(tokenizer).__name__} has no form for transformers: write its files by hand")
    spec |= {"truncation": None, "padding": None, "post_processor": None}
    if adds_bos:
        spec["post_processor"] = _beginning(settings["bos_token"], tokenizer.bos_id)
    settings |= {
        "tokenizer_class": CLASS,
        "add_bos_token": adds_bos,
        "split_special_tokens": True,
        "padding_side": "left",
    }
    settings.setdefault("clean_up_tokenization_spaces", False)
    generation |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": _one_or_all(tokenizer.eos_ids)}
    generation |= {"pad_token_id": tokenizer.pad_id}
    written = {
        "tokenizer.json": _json(spec),
        "tokenizer_config.json": _json(settings),
        "generation_config.json": _json({key: value for key, value in generation.items() if value is not None}),
    }
    if isinstance(tokenizer, HFTokenizer) and (template := tokenizer.path.with_name("chat_template.jinja")).is_file():
        written[template.name] = template.read_bytes()
    return written


def _byte_level(special: dict[str, int]) -> dict[str, Any]:
    """A ``tokenizer.json`` that gives each byte its value, but for the ids of special tokens."""
    vocab = {CHARACTER_OF[value]: value for value in range(256) if value not in special.values()} | special
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": token, "content": name, **flags} for name, token in sorted(special.items())],
        "normalizer": None,
        "pre_tokenizer": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [],
        },
    }


def _beginning(name: str, token: int | None) -> dict[str, Any]:
    """The post-processor that puts one token before each text."""
    begin = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": letter, "type_id": i}} for i, letter in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, second],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }


def _one_or_all(ids: tuple[int, ...]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else next(iter(ids), None)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
