"""The tokenizer of Evo 2."""

from hyaena.compat import CharLevelTokenizer

__all__ = ["CharLevelTokenizer"]
