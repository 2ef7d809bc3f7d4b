"""Text to token ids and back: raw bytes, Evo's characters, and ``tokenizer.json`` files.

For decoding, every tokenizer here is a table of byte strings: token ``i`` decodes to the bytes ``pieces[i]`` (none for
special tokens). So one equation holds for all of them:

    decode(ids) == decode_bytes(ids).decode("utf-8", errors="replace")

and a stream of single tokens gives the same text. SentencePiece-like tokenizers add one rule: the space that their
encoder puts before a text is removed again at the start of the text, and, if the encoder puts one there too, after an
added token; nowhere else. A stream therefore needs the ids before it: ``tokenizer.stream(after=prompt_ids)``.

Text never turns into control tokens unless the caller asks for it: ``encode("</s>")`` gives the ids of four characters,
``encode("</s>", special=True)`` the id of the end of a document.
"""

from hyaena.tokenizers.base import TextStream, Tokenizer, token_ids
from hyaena.tokenizers.chat import TEMPLATES
from hyaena.tokenizers.export import transformers_files
from hyaena.tokenizers.hf import HFTokenizer
from hyaena.tokenizers.load import load_tokenizer
from hyaena.tokenizers.simple import ByteTokenizer, CharacterTokenizer

__all__ = [
    "TEMPLATES",
    "ByteTokenizer",
    "CharacterTokenizer",
    "HFTokenizer",
    "TextStream",
    "Tokenizer",
    "load_tokenizer",
    "token_ids",
    "transformers_files",
]
