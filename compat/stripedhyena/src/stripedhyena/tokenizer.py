"""The original's two tokenizers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from hyaena.compat import CharLevelTokenizer
from hyaena.errors import InputError, printable

__all__ = ["CharLevelTokenizer", "HFAutoTokenizer"]


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
