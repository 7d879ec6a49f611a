"""Images to shards, and shards to batches: manifest, reader, samplers, stream, augmentation."""
