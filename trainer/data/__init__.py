"""Importers, shards, augmentation and the stream of batches."""
