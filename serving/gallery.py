"""The Gallery: enrolled subjects, kept by the store, searched by its projection, decided on by a threshold."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serving.index import Candidate
from serving.projection import GalleryLoading, Progress, Projection, Status, Stopped
from serving.store import Deletion, Enrolment, IdempotencyKey, State, Store, SubjectRow, SubjectUnknown, never
from serving.threshold import Rule

__all__ = ["Gallery", "GalleryLoading", "Identification", "Status", "Stopped", "Verification"]


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

    Each raises StoreError when the disk fails (what was acknowledged before is not lost by it), and each that needs the
    index raises GalleryLoading before `load` has ended.
    """

    def __init__(
        self, store: Store, verify_rule: Rule, identify_rule: Rule, threads: int = 1, max_samples: int = 100
    ) -> None:
        """Nothing is read yet: see `load`.

        Args:
            threads: cores that one search uses.
            max_samples: per subject.
        """
        self.verify_rule, self.identify_rule = verify_rule, identify_rule
        self._store = store
        self._projection = Projection(store, threads)
        self._max_samples = max_samples

    @property
    def model_id(self) -> str:
        return self._store.model_id

    @property
    def dimension(self) -> int:
        return self._store.dimension

    @property
    def size(self) -> int:
        """Enrolled subjects; 0 before they are loaded."""
        return self._projection.index.subjects

    @property
    def samples(self) -> int:
        return self._projection.index.samples

    @property
    def revision(self) -> int:
        """Changes that the index has been through."""
        return self._projection.revision

    def enrolled(self) -> State:
        """The store's counts, which it knows before the gallery is loaded."""
        return self._store.state()

    def status(self) -> Status:
        """What stands in memory; nothing is waited for."""
        return self._projection.status

    def load(self, progress: Progress | None = None, stopping: Callable[[], bool] = never) -> None:
        """Verify the store and build the index from it.

        Args:
            progress: told of samples done and in all.
            stopping: asked several times a second; true ends the loading.

        Raises:
            UserError: the store is damaged.
            Stopped: `stopping` returned true, or the gallery was closed.
        """
        self._projection.load(progress, stopping)

    def close(self) -> None:
        """End what is under way in the background, and close the store. Idempotent."""
        self._projection.close()

    def enrol(self, subject_id: str, vectors_BD: NDArray[np.float32], key: IdempotencyKey | None = None) -> Enrolment:
        """Add samples to a subject, new or known. When this returns, they are on disk and found by the next search.

        Raises:
            ValueError: a vector is not finite, not of length 1, or not of the gallery's dimension.
            KeyReused, SubjectFull: see `Store.enrol`.
        """
        with self._projection.changing(subject_id) as change:
            change.index.check(vectors_BD)  # before the store has them
            done = self._store.enrol(subject_id, vectors_BD, self._max_samples, key)
            if done.replayed:
                change.confirm()
            else:
                change.add(subject_id, done.sample_ids, vectors_BD)
            return done

    def replay(self, key: IdempotencyKey, subject_id: str) -> Enrolment | None:
        """What an enrolment of `subject_id` under this key did, if it was done; the next search finds it.

        Raises:
            KeyReused: the key stands for another request.
        """
        # An enrolment that is committed but not yet in the index is waited for.
        with self._projection.changing(subject_id) as change:
            done = self._store.recall(key, subject_id)
            if done is not None:
                change.confirm()
            return done

    def delete(self, subject_id: str, key: IdempotencyKey | None = None) -> Deletion:
        """Erase a subject. When this returns, it is off the disk and no later search finds it.

        Raises:
            SubjectUnknown, KeyReused: see `Store.delete`.
        """
        with self._projection.changing(subject_id) as change:
            done = self._store.delete(subject_id, key)
            if not done.replayed:
                change.remove(subject_id)
            return done

    def subjects(self, after: int, limit: int) -> list[SubjectRow]:
        """A page of the subjects, in order of enrolment, behind position `after` (0: from the start)."""
        self._projection.refuse_loading()
        return self._store.subjects(after, limit)

    def identify(self, probe_D: NDArray[np.float32], top_k: int) -> Identification:
        """The `top_k` nearest subjects; a match if the nearest reaches the threshold.

        Raises:
            ValueError: the probe is not a unit vector of the gallery's dimension.
        """
        index = self._projection.searchable()
        size = index.subjects
        (candidates,) = index.search(probe_D[None], top_k)
        known = bool(candidates) and self.identify_rule.matches(candidates[0].score)
        return Identification(candidates, "match" if known else "unknown", size)

    def verify(self, probe_D: NDArray[np.float32], reference_D: NDArray[np.float32]) -> Verification:
        """Compare two vectors; needs no index.

        Raises:
            ValueError: as `identify`.
        """
        self._projection.index.check(np.stack([probe_D, reference_D]))
        return self._verified(max(-1.0, min(1.0, float(probe_D @ reference_D))), None)

    def verify_subject(self, probe_D: NDArray[np.float32], subject_id: str) -> Verification:
        """Compare a vector with the best of a subject's samples.

        Raises:
            ValueError: as `identify`.
            SubjectUnknown: nobody of that id is enrolled.
        """
        candidate = self._projection.searchable().compare(probe_D, subject_id)
        if candidate is None:
            raise SubjectUnknown(f"no subject '{subject_id}' is enrolled; GET /v1/subjects lists them")
        return self._verified(candidate.score, candidate.sample_id)

    def check(self) -> State:
        """The store's counts, after making sure that it answers from the files that were opened.

        Where the index is not in step with it, building a new one is begun in the background. A change under way is not
        waited for. Called about once a second.

        Raises:
            StoreError: the store does not answer, is damaged, or its files were moved.
        """
        return self._projection.check()

    def _verified(self, score: float, sample_id: str | None) -> Verification:
        return Verification(score, "match" if self.verify_rule.matches(score) else "no_match", sample_id)
