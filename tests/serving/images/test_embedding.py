"""Crops of several requests in one call of the model: each request gets its own vectors, or its own refusal."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from serving.batching import Closed
from serving.images.embedding import Embedding
from tests.serving.conftest import SIDE
from trainer.embedder import Embedder
from trainer.errors import UserError


class Watched:
    """A real Embedder whose calls wait for `go`, so that requests come together."""

    def __init__(self, folder: Path) -> None:
        self._embedder, self.go, self.calls = Embedder.open(folder), threading.Event(), list[int]()
        self.embed, self.begun = self._embedder.embed, threading.Event()

    def embed_measured(self, images_BCHW: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        self.begun.set()
        assert self.go.wait(60)
        self.calls.append(len(images_BCHW))
        return self._embedder.embed_measured(images_BCHW)


@pytest.fixture
def watched(embedder: Path) -> Watched:
    return Watched(embedder)


@pytest.fixture
def told() -> list[tuple[int, float]]:
    return []


@pytest.fixture
def embedding(watched: Watched, told: list[tuple[int, float]]) -> Iterator[Embedding]:
    made = Embedding(watched, lambda crops, seconds: told.append((crops, seconds)))
    yield made
    watched.go.set()
    made.close()


def crops(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 1, SIDE, SIDE), np.uint8)


def wait_for(embedding: Embedding, waiting: int) -> None:
    for _ in range(6000):
        if embedding.waiting >= waiting:
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"{embedding.waiting} wait, not {waiting}")


def test_requests_that_come_meanwhile_are_embedded_together(
    watched: Watched, embedding: Embedding, told: list[tuple[int, float]]
) -> None:
    requests = [crops(1 + seed % 3, seed) for seed in range(9)]
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(embedding.embed, requests[0])
        assert watched.begun.wait(60)
        others = [pool.submit(embedding.embed, one) for one in requests[1:]]
        wait_for(embedding, 8)
        watched.go.set()
        found = [one.result(60) for one in (first, *others)]
    assert sum(watched.calls) == sum(map(len, requests))
    assert len(watched.calls) <= 3
    assert [size for size, _ in told] == watched.calls
    for one, wanted in zip(found, requests, strict=True):
        np.testing.assert_allclose(one.x_BD, watched.embed(wanted), atol=1e-6)
        assert one.norms_B is None


def test_a_crop_without_direction_is_refused_to_its_own_request_alone(watched: Watched, embedding: Embedding) -> None:
    flat = np.full((1, 1, SIDE, SIDE), 90, np.uint8)
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(embedding.embed, one) for one in (crops(1, 1), flat, crops(2, 2))]
        watched.go.set()
        assert len(answers[0].result(60).x_BD) == 1
        with pytest.raises(UserError, match="sample 0 a vector of length 0"):
            answers[1].result(60)
        assert len(answers[2].result(60).x_BD) == 2


def test_after_the_end_nothing_is_embedded(watched: Watched, embedding: Embedding) -> None:
    watched.go.set()
    embedding.close()
    embedding.close()
    with pytest.raises(Closed):
        embedding.embed(crops(1, 1))
