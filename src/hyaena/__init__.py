"""hyaena: run, serve, fine-tune and study StripedHyena models."""

__version__ = "0.1.0"
