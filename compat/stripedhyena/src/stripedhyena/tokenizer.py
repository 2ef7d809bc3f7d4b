"""The original's two tokenizers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from hyaena.errors import InputError, printable


class CharLevelTokenizer:
    """Bytes as ids: text is UTF-8, 0 ends a document, 1 pads.

    ``detokenize(tokenize(text)) == text`` for every text without the bytes 0 and 1. The original wrote control
    characters as spaces, and every byte of a character beyond ASCII as a character of its own.
    """

    def __init__(self, vocab_size: int = 512) -> None:
        self.name = "CharLevelTokenizer"
        self.vocab_size = vocab_size
        self.eod_id = self.eos_id = self.eod = self.eos = 0
        self.pad_id = 1

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def tokenize_batch(self, text_batch: Sequence[str] | str) -> list[list[int]] | list[int]:
        if isinstance(text_batch, str):
            return self.tokenize(text_batch)
        return [self.tokenize(text) for text in text_batch]

    def decode_token(self, token: int) -> str:
        return self.detokenize([token])

    def detokenize(self, token_ids: Iterable[int] | Tensor) -> str:
        """The text of ids; 0, 1 and ids from 256 on stand for none, and bytes that are no UTF-8 become U+FFFD."""
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
        return bytes(int(token) for token in ids if 1 < token < 256).decode(errors="replace")

    def detokenize_batch(self, token_ids: Iterable[Iterable[int]] | Tensor) -> list[str]:
        rows = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
        return [self.detokenize(row) for row in rows]


class HFAutoTokenizer:
    """A ``tokenizer.json``. Ids come as tensors, with the special tokens that the file adds to a text."""

    eos, bos = "</s>", "<s>"

    def __init__(self, vocab_file: str) -> None:
        try:
            self.tokenizer = Tokenizer.from_file(str(vocab_file))
        except Exception as error:  # the library raises Exception itself
            raise InputError(f"{printable(str(vocab_file))} is not a tokenizer.json: {error}") from None
        self.vsize = self.vocab_size = self.tokenizer.get_vocab_size()
        self.eos_id, self.bos_id = (self.tokenizer.token_to_id(token) for token in (self.eos, self.bos))
        self.eod = self.eod_id = self.eos_id

    def encode_to_list(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def tokenize(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text).ids, dtype=torch.int64)

    def tokenize_batch(self, text_batch: Sequence[str]) -> list[Tensor]:
        return [self.tokenize(text) for text in text_batch]

    def tokenize_file(self, input_file: str, output_file: str, verbose: bool = False) -> None:
        """JSON lines with ``text`` → JSON lines with ``tokens``. A file that exists is left alone."""
        if Path(output_file).exists():
            print(f"Output file {output_file} already exists, skipping")
            return
        with open(input_file, encoding="utf-8") as lines:
            written = [{"tokens": self.tokenize(json.loads(line)["text"]).tolist()} for line in lines]
        Path(output_file).write_text("".join(json.dumps(line) + "\n" for line in written), encoding="utf-8")

    def detokenize(self, token_ids: Sequence[int] | Tensor, skip_special_tokens: bool = False) -> str:
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else list(token_ids)
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def detokenize_batch(
        self, token_ids_batch: Iterable[Sequence[int]] | Tensor, skip_special_tokens: bool = False
    ) -> list[str]:
        return [self.detokenize(ids, skip_special_tokens) for ids in token_ids_batch]
