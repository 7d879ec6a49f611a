"""Embeddings of made-up identities."""

import numpy as np


def made_up(
    count: int, samples: int, spread: float, *, dimension: int = 16, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors [count x samples, dimension] about a random centre per identity, and labels, in shuffled order."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(count, 1, dimension))
    vectors = (centres + spread * generator.normal(size=(count, samples, dimension))).reshape(-1, dimension)
    order = generator.permutation(len(vectors))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit.astype(np.float32)[order], np.repeat(np.arange(count), samples)[order]
