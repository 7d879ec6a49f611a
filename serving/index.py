"""The FAISS projection of a gallery: exact inner-product search over unit vectors, collapsed to subjects.

It can be rebuilt from the store at any time and is never written to disk. It is exact because what an approximate index
misses is added to FNIR; up to about ten million vectors a scan is fast enough.

Row i of the FAISS index belongs to `_subject_N[i]` (a number given to the subject here) and `_sample_N[i]` (the 16
bytes of the sample's UUID). A flat index keeps the order of its rows when some are removed, so these arrays follow it.

Axes: Q queries, B vectors of one call, N rows, D dimensions.
"""

import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

from trainer.evaluation.normalise import Normaliser

NORM_TOLERANCE = 1e-3
# FAISS multiplies matrices instead of scanning query by query from this many queries x D on. Its default never does so
# below 250 queries at D = 512; a batch of 8 gains a factor of two.
BLAS_THRESHOLD = 2048


@dataclass(frozen=True)
class Candidate:
    """A subject, its best score (cosine similarity), and the sample that reached it."""

    subject_id: str
    score: float
    sample_id: str


class ReadersWriter:
    """Many readers or one writer. A waiting writer goes before new readers, so that it always gets its turn."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers, self._waiting = 0, 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._waiting)
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                self._condition.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        with self._condition:  # held while writing, so that nobody else comes in
            self._waiting += 1
            try:
                self._condition.wait_for(lambda: not self._readers)
                yield
            finally:
                self._waiting -= 1
                self._condition.notify_all()


class Index:
    """Unit vectors of subjects' samples in memory. Searches run side by side; a change excludes them while it lasts.

    All methods that take vectors raise ValueError where one is not of the index's dimension, not finite, or not of
    length 1.
    """

    def __init__(self, dimension: int, threads: int = 1, normaliser: Normaliser | None = None) -> None:
        """`threads`: the most cores that one call of FAISS uses. `normaliser`: of the scores; None: cosines."""
        faiss.cvar.distance_compute_blas_threshold = BLAS_THRESHOLD
        self.dimension, self._threads = dimension, threads
        self._lock = ReadersWriter()
        self._normaliser = normaliser
        self._faiss = faiss.IndexFlatIP(normaliser.width if normaliser else dimension)
        self._subject_N = np.empty(0, np.int64)  # longer than the index: room to grow
        self._sample_N = np.empty((0, 16), np.uint8)
        self._names: dict[int, str] = {}
        self._numbers: dict[str, int] = {}
        self._hidden: list[int] = []  # numbers without a name, whose rows may still be there
        self._next = 0

    @property
    def samples(self) -> int:
        """Those that can be found."""
        hidden = np.count_nonzero(np.isin(self._subject_N[: self._rows], self._hidden)) if self._hidden else 0
        return self._rows - int(hidden)

    @property
    def subjects(self) -> int:
        return len(self._numbers)

    @property
    def _rows(self) -> int:
        return int(self._faiss.ntotal)

    def check(self, vectors_BD: NDArray[np.float32]) -> None:
        """FAISS accepts NaN and any length in silence; this does not."""
        if vectors_BD.ndim != 2 or vectors_BD.shape[1] != self.dimension:
            raise ValueError(f"vectors of shape {vectors_BD.shape}; the index takes [B, {self.dimension}]")
        lengths_B = np.linalg.norm(vectors_BD.astype(np.float64), axis=1)
        wrong_B = ~(np.abs(lengths_B - 1) <= NORM_TOLERANCE)  # written so that NaN is wrong
        if wrong_B.any():
            first = int(np.flatnonzero(wrong_B)[0])
            raise ValueError(f"vector {first} has length {lengths_B[first]:.4g}; the index takes vectors of length 1")

    def add(self, subject_ids: Sequence[str], sample_ids: Sequence[bytes], vectors_BD: NDArray[np.float32]) -> None:
        """Add one sample per vector, with the 16 bytes of its UUID. Nothing is added when one of them is refused."""
        self.check(vectors_BD)
        if not len(subject_ids) == len(sample_ids) == len(vectors_BD):
            raise ValueError(f"{len(subject_ids)} subjects, {len(sample_ids)} samples and {len(vectors_BD)} vectors")
        samples_B = np.frombuffer(b"".join(sample_ids), np.uint8).reshape(-1, 16)
        enrolled_BE = self._normaliser.enrolled(vectors_BD) if self._normaliser else vectors_BD
        with self._lock.writing():
            start, end = self._rows, self._rows + len(vectors_BD)
            self._reserve(end)
            self._faiss.add(np.ascontiguousarray(enrolled_BE, np.float32))
            self._sample_N[start:end] = samples_B
            for row, subject_id in enumerate(subject_ids, start):
                self._subject_N[row] = self._number(subject_id)

    def hide(self, subject_id: str) -> None:
        """Let no search find the subject from now on. It needs no memory; its rows go with the next `remove`."""
        with self._lock.writing():
            self._hide(subject_id)

    def remove(self, *subject_ids: str) -> int:
        """Remove subjects; the number of their samples (0: none was there). One pass over the index.

        They are hidden first: whatever fails after that, no search finds them.
        """
        with self._lock.writing():
            for subject_id in subject_ids:
                self._hide(subject_id)
            if not self._hidden:
                return 0
            size = self._rows
            gone_N = np.isin(self._subject_N[:size], self._hidden)
            # What needs memory comes before what changes anything.
            subjects, samples = self._subject_N[:size][~gone_N], self._sample_N[:size][~gone_N]
            self._faiss.remove_ids(faiss.IDSelectorBatch(np.flatnonzero(gone_N).astype(np.int64)))
            left = self._rows
            self._subject_N[:left], self._sample_N[:left] = subjects, samples
            self._sample_N[left:size] = 0
            self._hidden.clear()
            return size - left

    def search(self, queries_QD: NDArray[np.float32], top_k: int) -> list[list[Candidate]]:
        """The `top_k` subjects with the highest best scores for each query, best first; fewer if there are fewer.

        Same as scoring every sample, taking the maximum over each subject's samples, and sorting the subjects.
        """
        self.check(queries_QD)
        queries_QD = self._searching(queries_QD)
        with self._lock.reading():
            if not self._rows:
                return [[] for _ in queries_QD]
            found = zip(queries_QD, *self._scan(queries_QD, top_k + 32), strict=True)
            return [self._collapse(query_D, scores_K, rows_K, top_k) for query_D, scores_K, rows_K in found]

    def compare(self, query_D: NDArray[np.float32], subject_id: str) -> Candidate | None:
        """The best score among one subject's samples; None if it is not there."""
        self.check(query_D[None])
        with self._lock.reading():
            number = self._numbers.get(subject_id)
            if number is None:
                return None
            rows = np.flatnonzero(self._subject_N[: self._rows] == number)
            scores_B = self._faiss.reconstruct_batch(rows) @ self._searching(query_D[None])[0]
            best = int(scores_B.argmax())
            return self._candidate(int(rows[best]), float(scores_B[best]))

    def score(self, query_D: NDArray[np.float32], reference_D: NDArray[np.float32]) -> float:
        """The score that the query would have if the reference were enrolled, -1 to 1."""
        self.check(np.stack([query_D, reference_D]))
        enrolled_D = self._normaliser.enrolled(reference_D[None])[0] if self._normaliser else reference_D
        return max(-1.0, min(1.0, float(self._searching(query_D[None])[0] @ enrolled_D)))

    def _searching(self, queries_QD: NDArray[np.float32]) -> NDArray[np.float32]:
        """The queries in the form in which the index is searched."""
        return np.ascontiguousarray(self._normaliser.probes(queries_QD) if self._normaliser else queries_QD, np.float32)

    def _collapse(
        self, query_D: NDArray[np.float32], scores_K: NDArray[np.float32], rows_K: NDArray[np.int64], top_k: int
    ) -> list[Candidate]:
        """The first row of each subject, searching deeper until `top_k` different subjects have been seen.

        Rows come in order of falling score, so the first row of a subject is its best, and no subject that has not been
        seen can score above one that has.
        """
        while True:
            numbers_K = self._subject_N[rows_K]
            _, first = np.unique(numbers_K, return_index=True)
            found = [int(k) for k in np.sort(first) if int(numbers_K[k]) in self._names]  # the hidden have no name
            if len(found) >= top_k or len(rows_K) == self._rows:
                return [self._candidate(int(rows_K[k]), float(scores_K[k])) for k in found[:top_k]]
            (scores_K,), (rows_K,) = self._scan(query_D[None], 4 * len(rows_K))

    def _scan(self, queries_QD: NDArray[np.float32], depth: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        faiss.omp_set_num_threads(self._threads)  # OpenMP keeps this number per calling thread
        scores_QK, rows_QK = self._faiss.search(queries_QD, min(self._rows, depth))
        return scores_QK, rows_QK

    def _candidate(self, row: int, score: float) -> Candidate:
        sample_id = str(uuid.UUID(bytes=self._sample_N[row].tobytes()))
        return Candidate(self._names[int(self._subject_N[row])], max(-1.0, min(1.0, score)), sample_id)

    def _number(self, subject_id: str) -> int:
        if subject_id not in self._numbers:
            self._numbers[subject_id], self._names[self._next] = self._next, subject_id
            self._next += 1
        return self._numbers[subject_id]

    def _hide(self, subject_id: str) -> None:
        number = self._numbers.get(subject_id)
        if number is not None:
            self._hidden.append(number)
            del self._numbers[subject_id], self._names[number]

    def _reserve(self, rows: int) -> None:
        if rows > len(self._subject_N):
            more = max(rows, 2 * len(self._subject_N), 1024) - len(self._subject_N)
            longer = np.pad(self._subject_N, (0, more)), np.pad(self._sample_N, ((0, more), (0, 0)))
            self._subject_N, self._sample_N = longer  # both or, where memory is short, none
