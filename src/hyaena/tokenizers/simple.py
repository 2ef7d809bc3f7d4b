"""Tokenizers without a file: bytes as they are, and Evo's characters."""

from __future__ import annotations

from hyaena.arguments import whole
from hyaena.errors import InputError
from hyaena.tokenizers.base import MAX_VOCAB_SIZE, Tokenizer, to_bytes


class ByteTokenizer(Tokenizer):
    """Bytes as they are: ids 0..255 are the 256 byte values, 256 begins a document, 257 ends it, 258 pads.

    Lossless: ``decode_bytes(encode(data, add_special_tokens=False)) == data`` for every ``data``. A vocabulary
    larger than 259 has unused ids at its end, which stand for no bytes. Special tokens have no names here.

    Raises:
        InputError: the vocabulary is smaller than 259.
    """

    bos_id = 256
    eos_id = 257
    pad_id = 258

    def __init__(self, vocab_size: int = 259) -> None:
        self.vocab_size = whole(
            "vocab_size of bytes", vocab_size, "at least 259 (256 values, BOS, EOS, PAD)", 259, MAX_VOCAB_SIZE
        )
        self._pieces = [bytes([value]) for value in range(256)] + [b""] * (self.vocab_size - 256)

    def _encode(self, text: str | bytes, special: bool, add_special_tokens: bool) -> list[int]:
        ids = list(to_bytes(text))
        return [256, *ids] if add_special_tokens else ids


class CharacterTokenizer(Tokenizer):
    """Evo's characters: a byte's value is its id, 0 ends a document, 1 pads, and nothing begins one.

    Ids 0, 1 and those from 256 on stand for no text. So the bytes 0 and 1 cannot be written: ``encode`` refuses a text
    that contains them, unless ``special=True`` reads them as the end of a document and as padding.

    Raises:
        InputError: the vocabulary is smaller than 256.
    """

    eos_id = 0
    pad_id = 1

    def __init__(self, vocab_size: int = 512) -> None:
        self.vocab_size = whole("vocab_size of characters", vocab_size, "at least 256", 256, MAX_VOCAB_SIZE)
        self._pieces = [b"", b""] + [bytes([value]) for value in range(2, 256)] + [b""] * (self.vocab_size - 256)

    def _encode(self, text: str | bytes, special: bool, add_special_tokens: bool) -> list[int]:
        data = to_bytes(text)
        if not special:
            for value, name in ((0, "the end of a document"), (1, "padding")):
                if (position := data.find(value)) >= 0:
                    raise InputError(
                        f"the text has the byte {value} at position {position}, which means {name} in this "
                        "vocabulary: remove it, or encode with special=True"
                    )
        return list(data)
