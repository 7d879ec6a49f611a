"""The Gallery: enrolled subjects, searched by the index, kept by the store, decided on by a threshold.

Order of a change, under one lock: commit in the store (on disk), then apply to the index, then answer. A search between
the two steps does not see the change, which nobody has been told of yet. If the second step fails, the index is marked
broken and rebuilt from the store before it is used again, so the two never stay apart.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serving.index import Candidate, Index
from serving.store import Deletion, Enrolment, IdempotencyKey, State, Store, StoreError, SubjectRow, SubjectUnknown
from serving.threshold import Rule
from trainer.errors import UserError


@dataclass(frozen=True)
class Identification:
    """The answer to "who is this?": the best subjects, best first, and whether the first is a match."""

    candidates: list[Candidate]
    decision: Literal["match", "unknown"]
    gallery_size: int


@dataclass(frozen=True)
class Verification:
    """The answer to "are these the same?". `sample_id`: the subject's sample that scored, when one was compared."""

    score: float
    decision: Literal["match", "no_match"]
    sample_id: str | None = None


class Gallery:
    """All methods may be called from several threads.

    Each raises StoreError when the disk fails; what was acknowledged before is not lost by it.
    """

    def __init__(
        self, store: Store, verify_rule: Rule, identify_rule: Rule, threads: int = 1, max_samples: int = 100
    ) -> None:
        """Build the index from the store.

        Args:
            threads: cores that one search uses.
            max_samples: per subject.

        Raises:
            UserError: the store is damaged.
        """
        self.verify_rule, self.identify_rule = verify_rule, identify_rule
        self._store = store
        self._threads, self._max_samples = threads, max_samples
        self._changing = threading.Lock()
        self._broken = False
        self._index, self._revision = self._build()

    @property
    def model_id(self) -> str:
        return self._store.model_id

    @property
    def dimension(self) -> int:
        return self._store.dimension

    @property
    def size(self) -> int:
        """Enrolled subjects."""
        return self._index.subjects

    @property
    def samples(self) -> int:
        return self._index.samples

    def close(self) -> None:
        with self._changing:
            self._store.close()

    def enrol(self, subject_id: str, vectors_BD: NDArray[np.float32], key: IdempotencyKey | None = None) -> Enrolment:
        """Add samples to a subject, new or known. When this returns, they are on disk and found by the next search.

        Raises:
            ValueError: a vector is not finite, not of length 1, or not of the gallery's dimension.
            KeyReused, SubjectFull: see `Store.enrol`.
        """
        with self._changing:
            index = self._in_step()
            index.check(vectors_BD)  # before the store has them
            done = self._store.enrol(subject_id, vectors_BD, self._max_samples, key)
            if not done.replayed:
                self._project(lambda: index.add([subject_id] * len(vectors_BD), done.sample_ids, vectors_BD))
            return done

    def replay(self, key: IdempotencyKey) -> Enrolment | None:
        """What an enrolment under this key did, if it was done.

        Raises:
            KeyReused: the key stands for another request.
        """
        return self._store.recall(key)

    def delete(self, subject_id: str, key: IdempotencyKey | None = None) -> Deletion:
        """Erase a subject. When this returns, it is off the disk and no later search finds it.

        Raises:
            SubjectUnknown, KeyReused: see `Store.delete`.
        """
        with self._changing:
            index = self._in_step()
            done = self._store.delete(subject_id, key)
            if not done.replayed:
                self._project(lambda: index.remove(subject_id))
            return done

    def subjects(self, after: int, limit: int) -> list[SubjectRow]:
        """A page of the subjects, in order of enrolment, behind position `after` (0: from the start)."""
        return self._store.subjects(after, limit)

    def identify(self, probe_D: NDArray[np.float32], top_k: int) -> Identification:
        """The `top_k` nearest subjects; a match if the nearest reaches the threshold.

        Raises:
            ValueError: the probe is not a unit vector of the gallery's dimension.
        """
        index = self._searchable()
        size = index.subjects
        (candidates,) = index.search(probe_D[None], top_k)
        known = bool(candidates) and self.identify_rule.matches(candidates[0].score)
        return Identification(candidates, "match" if known else "unknown", size)

    def verify(self, probe_D: NDArray[np.float32], reference_D: NDArray[np.float32]) -> Verification:
        """Compare two vectors.

        Raises:
            ValueError: as `identify`.
        """
        self._index.check(np.stack([probe_D, reference_D]))
        return self._verified(max(-1.0, min(1.0, float(probe_D @ reference_D))), None)

    def verify_subject(self, probe_D: NDArray[np.float32], subject_id: str) -> Verification:
        """Compare a vector with the best of a subject's samples.

        Raises:
            ValueError: as `identify`.
            SubjectUnknown: nobody of that id is enrolled.
        """
        candidate = self._searchable().compare(probe_D, subject_id)
        if candidate is None:
            raise SubjectUnknown(f"no subject '{subject_id}' is enrolled; GET /v1/subjects lists them")
        return self._verified(candidate.score, candidate.sample_id)

    def check(self) -> State:
        """The store's counts, after making sure that it answers and that the index is in step with it.

        O(1), unless the two have come apart: then the index is rebuilt here and now. A change under way is not waited
        for.

        Raises:
            StoreError: the store does not answer, or is damaged.
        """
        if self._changing.acquire(blocking=False):
            try:
                self._in_step()
            finally:
                self._changing.release()
        return self._store.state()

    def _verified(self, score: float, sample_id: str | None) -> Verification:
        return Verification(score, "match" if self.verify_rule.matches(score) else "no_match", sample_id)

    def _project(self, change: Callable[[], object]) -> None:
        """Apply a committed change to the index, or remember that it has to be rebuilt."""
        applied = False
        try:
            change()
            applied = True
        finally:
            self._broken = not applied
        self._revision += 1

    def _behind(self, state: State) -> bool:
        indexed = State(self._index.subjects, self._index.samples, self._revision)
        return self._broken or indexed != state

    def _in_step(self) -> Index:
        """The index, rebuilt if it and the store have come apart. Called with `_changing` held."""
        if self._behind(self._store.state()):
            try:
                self._index, self._revision = self._build()
            except UserError as error:
                raise StoreError(str(error)) from error
            self._broken = False
        return self._index

    def _searchable(self) -> Index:
        if self._broken:
            with self._changing:
                return self._in_step()
        return self._index

    def _build(self) -> tuple[Index, int]:
        """A new index from the store, aside: searches go on in the old one."""
        index = Index(self._store.dimension, self._threads)
        state = self._store.state()
        for subject_ids, sample_ids, vectors_BD in self._store.samples():
            try:
                index.add(subject_ids, sample_ids, vectors_BD)
            except ValueError as error:
                raise UserError(
                    f"the store '{self._store.path}' holds a vector that cannot be one of an embedder's ({error}); "
                    "restore the store from a backup"
                ) from error
        if (index.subjects, index.samples) != (state.subjects, state.samples):
            raise UserError(
                f"the store '{self._store.path}' counts {state.subjects} subjects with {state.samples} samples but "
                f"gave {index.subjects} with {index.samples}; it was damaged: restore it from a backup"
            )
        return index, state.revision
