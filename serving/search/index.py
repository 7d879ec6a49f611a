"""The index of a gallery: exact inner-product search over unit vectors, collapsed to subjects.

It can be rebuilt from the store at any time. It is exact in whatever form its rows are scanned, because what an
approximate index misses is added to FNIR; up to about ten million vectors a scan is fast enough.

A removed vector is zeroed at once; when more than half of a block is gone, what is left of it moves into a smaller one.

Axes: Q queries, B vectors of one call, S subjects, N rows, D dimensions, E numbers of a vector in the index, K results.
"""

import threading
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from serving.search.blocks import GONE, Block, Find, Numbers, Vectors, View, block_rows, digest, of_sample, of_subjects
from serving.search.codes import Codes, Form
from serving.search.scan import Found, Scan
from trainer.evaluation.normalise import Normaliser

NORM_TOLERANCE = 1e-3
SPLIT = 2**23  # multiplications from which a scan is worth more than one core
MORE = 32  # rows that are looked for besides those asked for: a subject can have several
MORE_CODED = 128  # the same where codes are scanned, and the last one has to be clearly below the first ones


@dataclass(frozen=True)
class Candidate:
    """A subject, its best score (cosine similarity), and the sample that reached it, where it was one sample."""

    subject_id: str
    score: float
    sample_id: str | None


class Index:
    """Unit vectors of subjects' samples in memory. Searches wait for nobody; changes wait for each other.

    A subject has a name and a number, a whole number from 0 on that is never given twice. All methods that take vectors
    raise ValueError where one is not of the index's dimension, not finite, or not of length 1.
    """

    def __init__(
        self, dimension: int, threads: int = 1, normaliser: Normaliser | None = None, form: Form = "exact"
    ) -> None:
        """`threads`: the most cores that one search uses. `normaliser`: of the scores; None: cosines. `form`: what a
        scan reads of a vector."""
        self.dimension, self.form, self._normaliser = dimension, form, normaliser
        self.width = normaliser.width if normaliser else dimension
        self._cores, self._pool = threads, ThreadPoolExecutor(threads, thread_name_prefix="scan")
        self._lock = threading.Lock()  # held by a change
        self._view = View()
        self._names: list[str | None] = []  # by number, of those that can be found; what has no name is passed over
        self._numbers: dict[str, int] = {}
        self._hidden: list[int] = []  # numbers without a name, whose rows may still be there
        self._gone = 0  # rows that are GONE

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

    def add(
        self, subject_ids: Sequence[str], sample_ids: Sequence[bytes], vectors_BD: Vectors, numbers_B: Numbers
    ) -> None:
        """Add one sample per vector, with the 16 bytes of its UUID and the number of its subject. A search finds all of
        them or none.

        Nothing is added when one of them is refused.
        """
        self.check(vectors_BD)
        if not len(subject_ids) == len(sample_ids) == len(numbers_B) == len(vectors_BD):
            raise ValueError(f"{len(subject_ids)} subjects, {len(sample_ids)} samples and {len(vectors_BD)} vectors")
        sample_B = np.frombuffer(b"".join(sample_ids), np.uint8).reshape(-1, 16)
        enrolled_BE = self._normaliser.enrolled(vectors_BD) if self._normaliser else vectors_BD
        with self._lock:
            parts, done = self._with_room(len(vectors_BD)), 0
            for place, (block, count) in enumerate(parts):
                taken = min(len(block) - count, len(vectors_BD) - done)
                if taken:
                    some = slice(done, done + taken)
                    block.put(count, numbers_B[some], sample_B[some], enrolled_BE[some])
                    parts[place], done = (block, count + taken), done + taken
            self._call(zip(numbers_B.tolist(), subject_ids, strict=True))
            self._view = View.of(parts)

    def replace(
        self, subject_ids: Sequence[str], sample_ids: Sequence[bytes], vectors_BD: Vectors, numbers_B: Numbers
    ) -> None:
        """As `add`; what these subjects had before is removed. A search finds the new rows, the old ones, or both."""
        before = {block: of_subjects(numbers_B)(block, count) for block, count in self._view.parts()}
        self.add(subject_ids, sample_ids, vectors_BD, numbers_B)
        with self._lock:
            self._erase(lambda block, _: before.get(block, np.empty(0, np.int64)))

    def parts(self) -> list[tuple[Block, int]]:
        """The blocks, and how many rows of each there are now. No row that is there ever moves within its block."""
        return self._view.parts()

    def take(self, parts: Sequence[tuple[Block, int]], named: Iterable[tuple[int, str]], without: Find) -> None:
        """Hold rows that were another index's of the same width, without some; and subjects' numbers and names."""
        with self._lock:
            for block, count in parts:
                if self.form != "exact":
                    block.codes = Codes(self.form, len(block), self.width).put(0, count, block.vectors_NE)
            self._call(named)
            self._view = View.of(parts)
            self._gone = sum(int(np.count_nonzero(block.subject_N[:count] == GONE)) for block, count in parts)
            self._erase(without)

    def share(self, mapped: Iterable[tuple[Block, Vectors]]) -> None:
        """Give up the memory of vectors that are now in a file, where a search reads few of them."""
        with self._lock:
            for block, vectors_NE in mapped if self.form != "exact" else ():
                block.vectors_NE = vectors_NE

    def digest(self) -> int:
        """See `blocks.digest`. A pass over the rows' numbers and ids."""
        return sum(digest(block.subject_N[:count], block.sample_N[:count]) for block, count in self.parts()) % 2**64

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
            removed = self._erase(of_subjects(self._hidden))
            self._hidden.clear()
            return removed

    def remove_sample(self, subject_id: str, sample_id: bytes) -> int:
        """Remove one sample of a subject that has others; 0 where it is not there."""
        with self._lock:
            return self._erase(of_sample(self.numbers([subject_id]), sample_id))

    def merge(self, into: str, other: str) -> None:
        """Make the samples of `other` those of `into`. A pass over the subjects' numbers."""
        with self._lock:
            number, old = self._numbers.get(into), self._numbers.get(other)
            if number is None or old is None:  # the index lacks a change, and will be built anew
                self._hide(other)
                return
            for block, count in self._view.parts():
                block.subject_N[of_subjects([old])(block, count)] = number
            self._forget(other)

    def search(self, queries_QD: Vectors, top_k: int, allowed_S: Numbers | None = None) -> list[list[Candidate]]:
        """The `top_k` subjects with the highest best scores for each query, best first; fewer if there are fewer.

        Same as scoring every sample, taking the maximum over each subject's samples, and sorting the subjects.

        Args:
            allowed_S: the numbers of the only subjects that are looked for; see `numbers`.
        """
        self.check(queries_QD)
        queries_QE, view, allowed = self._searching(queries_QD), self._view, None
        if allowed_S is not None:
            allowed = np.zeros(len(self._names) + 1, np.bool_)
            allowed[allowed_S] = True
        scan = Scan(queries_QE, top_k + (MORE if self.form == "exact" else MORE_CODED), self.form, allowed)
        if not view.rows:
            return [[] for _ in queries_QD]
        found, least_Q = self._scan(view, scan)
        return [self._collapse(view, scan, query, found, least_Q, top_k) for query in range(len(queries_QE))]

    def numbers(self, subject_ids: Iterable[str]) -> Numbers:
        """Of those among these subjects who are there."""
        found = (self._numbers.get(subject_id) for subject_id in subject_ids)
        return np.array([number for number in found if number is not None], np.int64)

    def compare(self, query_D: Vectors, subject_id: str) -> Candidate | None:
        """The best score among one subject's samples; None if it is not there."""
        self.check(query_D[None])
        number, best, query_E = self._numbers.get(subject_id), None, self._searching(query_D[None])[0]
        for block, count in self._view.parts() if number is not None else ():
            rows = np.flatnonzero(block.subject_N[:count] == number)
            scores_B = block.vectors_NE[rows] @ query_E
            if len(rows) and (best is None or scores_B.max() > best[0]):
                best = float(scores_B.max()), block.sample_N[rows[scores_B.argmax()]].tobytes()
        # It is asked for the name only now: whoever was removed meanwhile is not there.
        return None if best is None or number is None else self._candidate(number, *best)

    def score(self, query_D: NDArray[np.float32], reference_D: NDArray[np.float32]) -> float:
        """The score that the query would have if the reference were enrolled, -1 to 1."""
        self.check(np.stack([query_D, reference_D]))
        enrolled_D = self._normaliser.enrolled(reference_D[None])[0] if self._normaliser else reference_D
        return max(-1.0, min(1.0, float(self._searching(query_D[None])[0] @ enrolled_D)))

    def _searching(self, queries_QD: NDArray[np.float32]) -> NDArray[np.float32]:
        """The queries in the form in which the index is searched."""
        return np.ascontiguousarray(self._normaliser.probes(queries_QD) if self._normaliser else queries_QD, np.float32)

    def _scan(self, view: View, scan: Scan) -> tuple[Found, Vectors]:
        """The highest scores of each query, falling, and the most that another row's can be.

        Blocks are shared out among the cores.
        """
        groups = [range(len(view.blocks))]
        if self._cores > 1 and len(scan.queries_QE) * view.rows * self.width >= SPLIT:
            groups = [range(first, len(view.blocks), self._cores) for first in range(self._cores)]
        waiting = [self._pool.submit(scan.run, view, group) for group in groups[1:] if group]
        parts = [scan.run(view, groups[0]), *(one.result() for one in waiting)]
        found = parts[0] if len(parts) == 1 else Found.joined(parts).best(scan.depth)
        all_seen = found.score_QK.shape[1] < scan.depth
        least_Q = np.full(len(scan.queries_QE), -np.inf, np.float32) if all_seen else found.score_QK[:, -1]
        if self.form != "exact":  # what was found are bounds
            found = replace(found, score_QK=view.products(scan.queries_QE, found.row_QK)).best(scan.depth)
        return found, least_Q

    def _collapse(
        self, view: View, scan: Scan, query: int, found: Found, least_Q: Vectors, top_k: int
    ) -> list[Candidate]:
        """The first row of each subject, searching deeper until `top_k` different subjects have been seen.

        Rows come in order of falling score, so the first row of a subject is its best, and no subject that has not been
        seen can score above one that has, as long as that one's score is at least what another row can have.
        """
        query_E = scan.queries_QE[query]
        while True:
            candidates, seen, least = list[Candidate](), set[int](), float(least_Q[query])
            for score, row, number in zip(*found.of(query), strict=True):
                if score < least or len(candidates) == top_k:
                    break
                if number not in seen:
                    seen.add(number)
                    block, at = view.place(row)
                    if candidate := self._candidate(number, score, block.sample_N[at].tobytes()):
                        candidates.append(candidate)
            if len(candidates) == top_k or least == -np.inf:
                return candidates
            query, scan = 0, scan.deeper(query_E)
            found, least_Q = self._scan(view, scan)

    def _candidate(self, number: int, score: float, sample: bytes) -> Candidate | None:
        """None where nobody has the number any more."""
        name = self._names[number] if number != GONE else None
        sample_id = str(uuid.UUID(bytes=sample)) if any(sample) else None
        return None if name is None else Candidate(name, max(-1.0, min(1.0, score)), sample_id)

    def _call(self, named: Iterable[tuple[int, str]]) -> None:
        """Give numbers their names."""
        for number, subject_id in named:
            if self._numbers.get(subject_id) != number:
                self._hide(subject_id)  # whoever had the name before
                self._names.extend([None] * (number + 1 - len(self._names)))
                self._names[number], self._numbers[subject_id] = subject_id, number

    def _forget(self, subject_id: str) -> int | None:
        """The number that nobody has any more."""
        number = self._numbers.pop(subject_id, None)
        if number is not None:
            self._names[number] = None
        return number

    def _hide(self, subject_id: str) -> None:
        if (number := self._forget(subject_id)) is not None:
            self._hidden.append(number)

    def _erase(self, find: Find) -> int:
        """Erase the rows that are found in the blocks; how many there were."""
        erased = 0
        for block, count in self._view.parts():
            gone = find(block, count)
            block.erase(gone)
            erased, self._gone = erased + len(gone), self._gone + len(gone)
        if erased:
            with suppress(MemoryError):  # it can wait
                self._view, self._gone = self._view.compacted(self._gone)
        return erased

    def _with_room(self, more: int) -> list[tuple[Block, int]]:
        """The blocks and their counts, with new blocks for so many rows behind them."""
        parts, rows = self._view.parts(), self._view.rows
        room = len(parts[-1][0]) - parts[-1][1] if parts else 0
        while room < more:
            size = block_rows(self.width, rows)
            codes = Codes(self.form, size, self.width) if self.form != "exact" else None
            parts.append((Block.empty(size, self.width, codes), 0))
            room, rows = room + size, rows + size
        return parts
