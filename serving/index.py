"""The FAISS projection of a gallery: exact inner-product search over unit vectors, collapsed to subjects.

It can be rebuilt from the store at any time and is never written to disk. It is exact because what an approximate index
misses is added to FNIR; up to about ten million vectors a scan is fast enough.

Rows lie in blocks that never move. A change writes where no search looks yet, or marks rows as gone, and then shows a
new `_View`; a search takes the view that it finds, so that neither waits for the other. A removed vector is zeroed at
once; when more than half of a block is gone, what is left of it moves into a smaller one.

Axes: Q queries, B vectors of one call, N rows, D dimensions, K results of a scan.
"""

import bisect
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate

import faiss
import numpy as np
from numpy.typing import NDArray

from trainer.evaluation.normalise import Normaliser

Vectors = NDArray[np.float32]
Numbers = NDArray[np.int64]

NORM_TOLERANCE = 1e-3
# FAISS multiplies matrices instead of scanning query by query from this many queries x D on. Its default never does so
# below 250 queries at D = 512; a batch of 8 gains a factor of two.
BLAS_THRESHOLD = 2048
BLOCK_BYTES = 32 * 2**20  # of vectors: few enough that a search of a million rows has 60 blocks, and copied in 10 ms
FIRST_ROWS = 1024  # of the first block; blocks grow with the index
GONE = -1  # in place of a row's subject
SPLIT = 2**23  # multiplications from which a scan is worth more than one core


@dataclass(frozen=True)
class Candidate:
    """A subject, its best score (cosine similarity), and the sample that reached it."""

    subject_id: str
    score: float
    sample_id: str


class _Block:
    """Rows in one piece of memory, and of each its subject's number (or GONE) and the 16 bytes of its sample's UUID."""

    def __init__(self, rows: int, width: int) -> None:
        self.vectors_ND = np.empty((rows, width), np.float32)
        self.subject_N = np.empty(rows, np.int64)
        self.sample_N = np.empty((rows, 16), np.uint8)

    def __len__(self) -> int:
        return len(self.subject_N)

    def put(self, at: int, subjects_B: Numbers, samples_B: NDArray[np.uint8], vectors_BD: Vectors) -> None:
        part = slice(at, at + len(subjects_B))
        self.vectors_ND[part], self.subject_N[part], self.sample_N[part] = vectors_BD, subjects_B, samples_B


@dataclass(frozen=True)
class _View:
    """What a search sees: the first `counts` rows of each block; `starts` is the number of the first one."""

    blocks: tuple[_Block, ...] = ()
    counts: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    rows: int = 0

    @classmethod
    def of(cls, parts: Sequence[tuple[_Block, int]]) -> "_View":
        counts = tuple(count for _, count in parts)
        return cls(tuple(block for block, _ in parts), counts, tuple(accumulate(counts[:-1], initial=0)), sum(counts))

    def parts(self) -> list[tuple[_Block, int]]:
        return list(zip(self.blocks, self.counts, strict=True))

    def place(self, row: int) -> tuple[_Block, int]:
        number = bisect.bisect_right(self.starts, row) - 1
        return self.blocks[number], row - self.starts[number]

    def subjects(self, rows_K: Numbers) -> Numbers:
        """The numbers of the rows' subjects as they are now."""
        number_K = np.searchsorted(self.starts, rows_K, side="right") - 1
        found_K = np.empty(len(rows_K), np.int64)
        for number in np.unique(number_K):
            mine_K = number_K == number
            found_K[mine_K] = self.blocks[number].subject_N[rows_K[mine_K] - self.starts[number]]
        return found_K


class Index:
    """Unit vectors of subjects' samples in memory. Searches wait for nobody; changes wait for each other.

    All methods that take vectors raise ValueError where one is not of the index's dimension, not finite, or not of
    length 1.
    """

    def __init__(self, dimension: int, threads: int = 1, normaliser: Normaliser | None = None) -> None:
        """`threads`: the most cores that one search uses. `normaliser`: of the scores; None: cosines."""
        faiss.cvar.distance_compute_blas_threshold = BLAS_THRESHOLD
        self.dimension, self._normaliser = dimension, normaliser
        self._width = normaliser.width if normaliser else dimension
        self._cores, self._pool = threads, ThreadPoolExecutor(threads, thread_name_prefix="scan")
        self._lock = threading.Lock()  # held by a change
        self._view = _View()
        self._names: dict[int, str] = {}  # of those that can be found; what has no name is passed over
        self._numbers: dict[str, int] = {}
        self._hidden: list[int] = []  # numbers without a name, whose rows may still be there
        self._next, self._gone = 0, 0  # the next subject's number; rows that are GONE

    @property
    def samples(self) -> int:
        """Those that can be found."""
        view, hidden = self._view, self._hidden
        lost = sum(np.count_nonzero(np.isin(b.subject_N[:n], hidden)) for b, n in view.parts()) if hidden else 0
        return view.rows - self._gone - int(lost)

    @property
    def subjects(self) -> int:
        return len(self._numbers)

    def check(self, vectors_BD: Vectors) -> None:
        """FAISS accepts NaN and any length in silence; this does not."""
        if vectors_BD.ndim != 2 or vectors_BD.shape[1] != self.dimension:
            raise ValueError(f"vectors of shape {vectors_BD.shape}; the index takes [B, {self.dimension}]")
        lengths_B = np.linalg.norm(vectors_BD.astype(np.float64), axis=1)
        wrong_B = ~(np.abs(lengths_B - 1) <= NORM_TOLERANCE)  # written so that NaN is wrong
        if wrong_B.any():
            first = int(np.flatnonzero(wrong_B)[0])
            raise ValueError(f"vector {first} has length {lengths_B[first]:.4g}; the index takes vectors of length 1")

    def add(self, subject_ids: Sequence[str], sample_ids: Sequence[bytes], vectors_BD: Vectors) -> None:
        """Add one sample per vector, with the 16 bytes of its UUID. A search finds all of them or none.

        Nothing is added when one of them is refused.
        """
        self.check(vectors_BD)
        if not len(subject_ids) == len(sample_ids) == len(vectors_BD):
            raise ValueError(f"{len(subject_ids)} subjects, {len(sample_ids)} samples and {len(vectors_BD)} vectors")
        samples_B = np.frombuffer(b"".join(sample_ids), np.uint8).reshape(-1, 16)
        enrolled_BE = self._normaliser.enrolled(vectors_BD) if self._normaliser else vectors_BD
        with self._lock:
            parts = self._with_room(len(vectors_BD))
            subjects_B = np.fromiter(map(self._number, subject_ids), np.int64, len(subject_ids))
            done = 0
            for place, (block, count) in enumerate(parts):
                taken = min(len(block) - count, len(vectors_BD) - done)
                if taken:
                    some = slice(done, done + taken)
                    block.put(count, subjects_B[some], samples_B[some], enrolled_BE[some])
                    parts[place], done = (block, count + taken), done + taken
            self._view = _View.of(parts)

    def hide(self, subject_id: str) -> None:
        """Let no search find the subject from now on. It needs no memory; its rows go with the next `remove`."""
        with self._lock:
            self._hide(subject_id)

    def remove(self, *subject_ids: str) -> int:
        """Remove subjects; the number of their samples (0: none was there). A pass over the subjects' numbers.

        They are hidden first: whatever fails after that, no search finds them.
        """
        with self._lock:
            for subject_id in subject_ids:
                self._hide(subject_id)
            if not self._hidden:
                return 0
            removed = 0
            for block, count in self._view.parts():
                gone = np.flatnonzero(np.isin(block.subject_N[:count], self._hidden))
                block.subject_N[gone], block.vectors_ND[gone], block.sample_N[gone] = GONE, 0, 0
                removed, self._gone = removed + len(gone), self._gone + len(gone)
            self._hidden.clear()
            if removed:
                with suppress(MemoryError):  # it can wait
                    self._view, self._gone = self._compacted()
            return removed

    def remove_sample(self, subject_id: str, sample_id: bytes) -> None:
        """Remove one sample of a subject that has others. A pass over the subjects' numbers."""
        number, wanted_16 = self._numbers.get(subject_id, GONE), np.frombuffer(sample_id, np.uint8)
        with self._lock:
            for block, count in self._view.parts():
                rows = np.flatnonzero(block.subject_N[:count] == number)
                gone = rows[(block.sample_N[rows] == wanted_16).all(axis=1)]
                block.subject_N[gone], block.vectors_ND[gone], block.sample_N[gone] = GONE, 0, 0
                self._gone += len(gone)
            with suppress(MemoryError):  # it can wait
                self._view, self._gone = self._compacted()

    def merge(self, into: str, other: str) -> None:
        """Make the samples of `other` those of `into`. A pass over the subjects' numbers."""
        with self._lock:
            number, gone = self._numbers.get(into), self._numbers.get(other)
            if number is None or gone is None:  # the index lacks a change, and will be built anew
                self._hide(other)
                return
            for block, count in self._view.parts():
                block.subject_N[:count][block.subject_N[:count] == gone] = number
            del self._numbers[other], self._names[gone]

    def search(self, queries_QD: Vectors, top_k: int) -> list[list[Candidate]]:
        """The `top_k` subjects with the highest best scores for each query, best first; fewer if there are fewer.

        Same as scoring every sample, taking the maximum over each subject's samples, and sorting the subjects.
        """
        self.check(queries_QD)
        queries_QD = self._searching(queries_QD)
        view = self._view
        if not view.rows:
            return [[] for _ in queries_QD]
        found = zip(queries_QD, *self._scan(view, queries_QD, top_k + 32), strict=True)
        return [self._collapse(view, query_D, scores_K, rows_K, top_k) for query_D, scores_K, rows_K in found]

    def compare(self, query_D: Vectors, subject_id: str) -> Candidate | None:
        """The best score among one subject's samples; None if it is not there."""
        self.check(query_D[None])
        number, best, query_E = self._numbers.get(subject_id, GONE), None, self._searching(query_D[None])[0]
        for block, count in self._view.parts() if number != GONE else ():
            rows = np.flatnonzero(block.subject_N[:count] == number)
            scores_B = block.vectors_ND[rows] @ query_E
            if len(rows) and (best is None or scores_B.max() > best[0]):
                best = float(scores_B.max()), block.sample_N[rows[scores_B.argmax()]].tobytes()
        # It is asked for the name only now: whoever was removed meanwhile is not there.
        return None if best is None else self._candidate(number, *best)

    def score(self, query_D: NDArray[np.float32], reference_D: NDArray[np.float32]) -> float:
        """The score that the query would have if the reference were enrolled, -1 to 1."""
        self.check(np.stack([query_D, reference_D]))
        enrolled_D = self._normaliser.enrolled(reference_D[None])[0] if self._normaliser else reference_D
        return max(-1.0, min(1.0, float(self._searching(query_D[None])[0] @ enrolled_D)))

    def _searching(self, queries_QD: NDArray[np.float32]) -> NDArray[np.float32]:
        """The queries in the form in which the index is searched."""
        return np.ascontiguousarray(self._normaliser.probes(queries_QD) if self._normaliser else queries_QD, np.float32)

    def _collapse(
        self, view: _View, query_D: Vectors, scores_K: Vectors, rows_K: Numbers, top_k: int
    ) -> list[Candidate]:
        """The first row of each subject, searching deeper until `top_k` different subjects have been seen.

        Rows come in order of falling score, so the first row of a subject is its best, and no subject that has not been
        seen can score above one that has.
        """
        while True:
            numbers_K, found = view.subjects(rows_K), []
            for k in np.sort(np.unique(numbers_K, return_index=True)[1]):
                block, at = view.place(int(rows_K[k]))
                sample = block.sample_N[at].tobytes()
                if candidate := self._candidate(int(numbers_K[k]), float(scores_K[k]), sample):
                    found.append(candidate)
                    if len(found) == top_k:
                        return found
            if len(rows_K) == view.rows:
                return found
            (scores_K,), (rows_K,) = self._scan(view, query_D[None], 4 * len(rows_K))

    def _scan(self, view: _View, queries_QD: Vectors, depth: int) -> tuple[Vectors, Numbers]:
        """The highest scores of each query, falling, and their rows. Blocks are shared out among the cores."""
        groups = [range(len(view.blocks))]
        if self._cores > 1 and len(queries_QD) * view.rows * self._width >= SPLIT:
            groups = [range(first, len(view.blocks), self._cores) for first in range(self._cores)]
        waiting = [self._pool.submit(_best, view, group, queries_QD, depth) for group in groups[1:] if group]
        found = [*_best(view, groups[0], queries_QD, depth), *(part for one in waiting for part in one.result())]
        if len(found) == 1:
            return found[0]
        scores_QK = np.concatenate([scores for scores, _ in found], axis=1)
        rows_QK = np.concatenate([rows for _, rows in found], axis=1)
        order_QK = np.argsort(-scores_QK, axis=1, kind="stable")[:, :depth]
        return np.take_along_axis(scores_QK, order_QK, axis=1), np.take_along_axis(rows_QK, order_QK, axis=1)

    def _candidate(self, number: int, score: float, sample: bytes) -> Candidate | None:
        """None where nobody has the number any more."""
        name = self._names.get(number)
        return None if name is None else Candidate(name, max(-1.0, min(1.0, score)), str(uuid.UUID(bytes=sample)))

    def _number(self, subject_id: str) -> int:
        if subject_id not in self._numbers:
            self._names[self._next], self._numbers[subject_id] = subject_id, self._next
            self._next += 1
        return self._numbers[subject_id]

    def _hide(self, subject_id: str) -> None:
        number = self._numbers.get(subject_id)
        if number is not None:
            self._hidden.append(number)
            del self._numbers[subject_id], self._names[number]

    def _with_room(self, more: int) -> list[tuple[_Block, int]]:
        """The blocks and their counts, with new blocks for so many rows behind them."""
        parts, rows = self._view.parts(), self._view.rows
        room = len(parts[-1][0]) - parts[-1][1] if parts else 0
        while room < more:
            block = _Block(min(self._most(), max(FIRST_ROWS, rows)), self._width)
            parts.append((block, 0))
            room, rows = room + len(block), rows + len(block)
        return parts

    def _compacted(self) -> tuple[_View, int]:
        """The blocks without those that are mostly gone, and how many rows are still GONE in them; what was left in a
        block shares one with the block before it where both are small."""
        most, kept, gone = self._most(), list[tuple[_Block, int]](), self._gone
        for block, count in self._view.parts():
            live = int(np.count_nonzero(block.subject_N[:count] != GONE))
            if 2 * live > count:
                kept.append((block, count))
                continue
            pieces = [(block, count)]
            if kept and live + kept[-1][1] <= most // 2:
                pieces.insert(0, kept.pop())
            smaller = _joined(pieces, self._width)
            gone -= sum(size for _, size in pieces) - len(smaller)
            if len(smaller):
                kept.append((smaller, len(smaller)))
        return _View.of(kept), gone

    def _most(self) -> int:
        """Rows of a block."""
        return max(FIRST_ROWS, BLOCK_BYTES // (4 * self._width))


def _joined(pieces: Sequence[tuple[_Block, int]], width: int) -> _Block:
    """A block of what is not gone in these."""
    rows = [np.flatnonzero(block.subject_N[:count] != GONE) for block, count in pieces]
    joined, done = _Block(sum(map(len, rows)), width), 0
    for (block, _), live in zip(pieces, rows, strict=True):
        joined.put(done, block.subject_N[live], block.sample_N[live], block.vectors_ND[live])
        done += len(live)
    return joined


def _best(view: _View, group: range, queries_QD: Vectors, depth: int) -> list[tuple[Vectors, Numbers]]:
    """The highest scores of each query in each block of the group, and their rows."""
    faiss.omp_set_num_threads(1)  # OpenMP keeps this number per calling thread
    found = []
    for number in group:
        count = view.counts[number]
        vectors_ND = view.blocks[number].vectors_ND[:count]
        scores_QK, rows_QK = faiss.knn(queries_QD, vectors_ND, min(count, depth), metric=faiss.METRIC_INNER_PRODUCT)
        found.append((scores_QK, rows_QK + view.starts[number]))
    return found
