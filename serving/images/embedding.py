"""Crops of different requests, embedded in one call of the model.

As with searches, nothing waits for company: a batch is what came while the model worked on the one before it.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.batching import Batcher
from trainer.embedder import Embedder
from trainer.errors import UserError

MOST = 16  # requests of one call
Pixels = NDArray[np.uint8]


class Embedded(NamedTuple):
    """Unit vectors [B, D], and their lengths [B] before they were brought to 1 where these tell something."""

    x_BD: NDArray[np.float32]
    norms_B: NDArray[np.float32] | None

    def rows(self, start: int, stop: int) -> "Embedded":
        return Embedded(self.x_BD[start:stop], None if self.norms_B is None else self.norms_B[start:stop])


class Embedding:
    """One thread that embeds. `embed` may be called from several threads.

    Args:
        on_batch: told of each call: crops, and seconds.
    """

    def __init__(self, embedder: Embedder, on_batch: Callable[[int, float], object]) -> None:
        self._embedder, self._on_batch = embedder, on_batch
        self._batcher: Batcher[Pixels, Embedded | UserError] = Batcher(self._work, MOST)

    @property
    def waiting(self) -> int:
        """Requests whose crops wait for the model."""
        return self._batcher.waiting

    def embed(self, pixels_BCHW: Pixels) -> Embedded:
        """The crops of one request; see `Embedder.embed_measured`.

        Raises:
            UserError: one of them has no direction; other requests are not concerned.
            Closed: `close` was called.
        """
        found = self._batcher.submit(pixels_BCHW).result()
        if isinstance(found, UserError):
            raise found
        return found

    def close(self) -> None:
        """Embed what waits, and end. Idempotent."""
        self._batcher.close()

    def _work(self, requests: Sequence[Pixels]) -> list[Embedded | UserError]:
        start = time.perf_counter()
        try:
            together = Embedded(*self._embedder.embed_measured(np.concatenate(requests)))
        except UserError as error:
            if len(requests) == 1:
                return [error]
            return [self._work([one])[0] for one in requests]  # which of them it is
        ends = np.cumsum([len(one) for one in requests]).tolist()
        self._on_batch(ends[-1], time.perf_counter() - start)
        return [together.rows(end - len(one), end) for one, end in zip(requests, ends, strict=True)]
