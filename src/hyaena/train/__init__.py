"""Training on one device: packed windows of documents, AdamW, filters that stay stable, exact resumption."""
