"""hyaena: run, serve, fine-tune and study StripedHyena models."""
