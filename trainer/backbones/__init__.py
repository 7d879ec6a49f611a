"""Networks from pixels to embeddings."""
