"""The model, its parts, text generation and tokenizers."""
