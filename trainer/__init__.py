"""Train embeddings of very many identities on a cluster."""
