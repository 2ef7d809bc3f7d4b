"""From logits to tokens."""

from hyaena.compat import sample

__all__ = ["sample"]
