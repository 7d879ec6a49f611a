"""The Gallery: enrolled subjects, kept by the store, searched by its projection, decided on by a threshold.

Order of a change, under one lock: commit in the store (on disk), then apply to the index, then answer. A search between
the two steps does not see the change, which nobody has been told of yet.

If the second step fails, or another program changed the store, the two have come apart. Then the index is built anew
aside, while searches and changes go on with the old one. An erased subject is hidden in that one whatever happened.
"""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serving.index import Candidate, Index
from serving.store import Deletion, Enrolment, IdempotencyKey, State, Store, StoreError, SubjectRow, SubjectUnknown
from serving.threshold import Rule
from trainer.errors import UserError
from trainer.evaluation.normalise import Normaliser

FAILURES = (StoreError, UserError, MemoryError, RuntimeError)  # the last is FAISS's
RETRY_S = 60.0  # between two tries to build an index from a store that does not let itself be read


class GalleryLoading(Exception):
    """The index is being built; `done` of `total` samples are in it. Ask again later."""

    def __init__(self, done: int, total: int) -> None:
        super().__init__(f"the gallery is being loaded: {done} of {total} samples are; try again in a moment")
        self.done, self.total = done, total


class Stopped(Exception):
    """Loading was ended early because the caller wanted it."""


@dataclass(frozen=True)
class Status:
    """How far the index is: samples in it, and in all. `reason`: why it could not be built."""

    state: Literal["loading", "ready", "rebuilding", "failed"]
    done: int = 0
    total: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Identification:
    """The answer to "who is this?": the best subjects, best first, and whether the first is a match by the rule."""

    candidates: list[Candidate]
    decision: Literal["match", "unknown"]
    gallery_size: int
    rule: Rule


@dataclass(frozen=True)
class Verification:
    """The answer to "are these the same?". `sample_id`: the subject's sample that scored, when one was compared."""

    score: float
    decision: Literal["match", "no_match"]
    sample_id: str | None = None


class Gallery:
    """All methods may be called from several threads.

    Each raises StoreError when the disk fails (what was acknowledged before is not lost by it), each that needs the
    index GalleryLoading before `load` has ended, each that takes a key KeyReused where it stands for another request,
    and each that takes vectors ValueError where one is not finite, of length 1, and of the gallery's dimension.
    """

    def __init__(
        self,
        store: Store,
        verify_rule: Rule,
        identify_rule: Rule,
        threads: int = 1,
        max_samples: int = 100,
        normaliser: Normaliser | None = None,
    ) -> None:
        """Nothing is read yet: see `load`. `threads`: cores of one search. `max_samples`: per subject."""
        self.verify_rule, self.identify_rule = verify_rule, identify_rule
        self.model_id, self.dimension = store.model_id, store.dimension
        self.revision = 0  # of the store, that the index has reached
        self._store, self._threads, self._max_samples = store, threads, max_samples
        self._normaliser = normaliser
        self._index = Index(store.dimension, threads, normaliser)
        self._status = Status("loading")
        self._lock = threading.Lock()  # held by a change from the store's commit to the index
        self._closing = threading.Event()
        self._apart = True  # the index may lack what the store has
        self._loaded = False
        self._rebuilding: threading.Thread | None = None
        self._changed: set[str] = set()  # subjects that were changed while an index was being built
        self._failed_at = 0.0

    @property
    def size(self) -> int:
        """Enrolled subjects; 0 before they are loaded."""
        return self._index.subjects

    @property
    def samples(self) -> int:
        return self._index.samples

    def enrolled(self) -> State:
        """The store's counts, which it knows before the gallery is loaded."""
        return self._store.state()

    def status(self) -> Status:
        """What stands in memory; nothing is waited for."""
        return self._status

    def load(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Verify the store and build the index from it; `status` tells how far it is.

        Args:
            stopping: asked several times a second; true ends the loading.

        Raises:
            UserError: the store is damaged.
            Stopped: `stopping` returned true, or the gallery was closed.
        """

        def ending() -> bool:
            return stopping() or self._closing.is_set()

        with self._lock:
            try:
                self._status = Status("loading", 0, self._store.state().samples)
                self._store.verify(ending)
                self._install(self._build(ending, settled=True))
                self._loaded = True
            except FAILURES as error:
                if ending():
                    raise Stopped("loading was stopped") from error
                self._status = Status("failed", reason=_reason(error))
                raise UserError(self._status.reason) from error

    def close(self) -> None:
        """End what is under way in the background, and close the store. Idempotent."""
        self._closing.set()
        if rebuilding := self._rebuilding:
            rebuilding.join()
        with self._lock:
            self._store.close()

    def enrol(self, subject_id: str, vectors_BD: NDArray[np.float32], key: IdempotencyKey | None = None) -> Enrolment:
        """Add samples to a subject, new or known. When this returns, they are on disk and found by the next search.

        Raises:
            SubjectFull: the subject would hold more than `max_samples`.
        """
        with self._changing(subject_id):
            self._index.check(vectors_BD)  # before the store has them
            done = self._store.enrol(subject_id, vectors_BD, self._max_samples, key)
            if done.replayed:
                self._confirm()
            else:
                sample_ids = [uuid.UUID(item).bytes for item in done.sample_ids]
                self._index.add([subject_id] * len(sample_ids), sample_ids, vectors_BD)
                self.revision += 1
            return done

    def replay(self, key: IdempotencyKey, subject_id: str) -> Enrolment | None:
        """What an enrolment of `subject_id` under this key did, if it was done; the next search finds it."""
        with self._changing(subject_id):  # waits for one that is committed but not yet in the index
            done = self._store.recall(key, subject_id)
            if done is not None:
                self._confirm()
            return done

    def delete(self, subject_id: str, key: IdempotencyKey | None = None) -> Deletion:
        """Erase a subject. When this returns, it is off the disk and no later search finds it.

        Raises:
            SubjectUnknown: nobody of that id is enrolled.
        """
        with self._changing(subject_id):
            done = self._store.delete(subject_id, key)
            if not done.replayed:
                self._index.remove(subject_id)
                self.revision += 1
            return done

    def subjects(self, after: int, limit: int) -> list[SubjectRow]:
        """A page of the subjects, in order of enrolment, behind position `after` (0: from the start)."""
        self._refuse_loading()
        return self._store.subjects(after, limit)

    def identify(self, probe_D: NDArray[np.float32], top_k: int) -> Identification:
        """The `top_k` nearest subjects; a match if the nearest reaches the threshold of a gallery of this size."""
        self._refuse_loading()
        index = self._index  # a new one may take its place meanwhile
        size = index.subjects
        (candidates,) = index.search(probe_D[None], top_k)
        rule = self.identify_rule.at(size)
        known = bool(candidates) and rule.matches(candidates[0].score)
        return Identification(candidates, "match" if known else "unknown", size, rule)

    def verify(self, probe_D: NDArray[np.float32], reference_D: NDArray[np.float32]) -> Verification:
        """Compare two vectors; needs no index."""
        return self._verified(self._index.score(probe_D, reference_D), None)

    def verify_subject(self, probe_D: NDArray[np.float32], subject_id: str) -> Verification:
        """Compare a vector with the best of a subject's samples.

        Raises:
            SubjectUnknown: nobody of that id is enrolled.
        """
        self._refuse_loading()
        candidate = self._index.compare(probe_D, subject_id)
        if candidate is None:
            raise SubjectUnknown(f"no subject '{subject_id}' is enrolled; GET /v1/subjects lists them")
        return self._verified(candidate.score, candidate.sample_id)

    def check(self) -> State:
        """The store's counts, after making sure that it answers from the files that were opened.

        Where the index is not in step with it, building a new one is begun in the background. A change under way is not
        waited for. Called about once a second.
        """
        self._refuse_loading()
        state = self._store.check()
        if self._lock.acquire(blocking=False):
            try:
                self._mend()
            finally:
                self._lock.release()
        self._refuse_failed()
        return state

    def _verified(self, score: float, sample_id: str | None) -> Verification:
        return Verification(score, "match" if self.verify_rule.matches(score) else "no_match", sample_id)

    def _refuse_loading(self) -> None:
        """Raises GalleryLoading as long as there is no index to search in, StoreError where there will be none."""
        if not self._loaded:
            self._refuse_failed()
            raise GalleryLoading(self._status.done, self._status.total)

    def _refuse_failed(self) -> None:
        if self._status.state == "failed":
            raise StoreError(self._status.reason)

    @contextmanager
    def _changing(self, subject_id: str) -> Iterator[None]:
        """Alone with the store and the index, to change both. What fails between the two is found out and mended."""
        self._refuse_loading()
        with self._lock:
            self._mend()
            self._refuse_failed()
            self._changed.add(subject_id)
            sound = False
            try:
                yield
                sound = True
            finally:
                if not sound:
                    self._distrust(subject_id)

    def _confirm(self) -> None:
        """Raises GalleryLoading as long as the index may lack what a repeated answer tells of."""
        if self._apart:
            raise GalleryLoading(self._status.done, self._status.total)

    def _distrust(self, subject_id: str) -> None:
        """A change ended in an error, perhaps after it was committed. If it was a deletion, it must hold."""
        try:
            if self._store.state().revision == self.revision:
                return
            erased = self._store.samples_of(subject_id) is None
        except (StoreError, UserError):
            erased = True  # nobody knows
        self._apart = True
        if erased:
            self._index.hide(subject_id)

    def _mend(self) -> None:
        """Begin to build a new index where the old one is not in step. Called with the lock held."""
        if self._rebuilding is not None or self._closing.is_set():
            return
        state = self._store.state()
        self._apart = self._apart or state != State(self._index.subjects, self._index.samples, self.revision)
        if not self._apart:
            self._changed.clear()
        elif self._status.state != "failed" or time.monotonic() >= self._failed_at + RETRY_S:
            self._changed.clear()
            self._status = Status("rebuilding", 0, state.samples)
            self._rebuilding = threading.Thread(target=self._rebuild, name="rebuild", daemon=True)
            self._rebuilding.start()

    def _rebuild(self) -> None:
        """Build an index aside. What was changed meanwhile is read again in the end, with further changes kept out."""
        try:
            index = self._build(self._closing.is_set)
            with self._lock:
                index.remove(*self._changed)
                for subject_id in self._changed:
                    if piece := self._store.samples_of(subject_id):
                        self._put(index, piece)
                self._install(index)
        except (*FAILURES, Stopped) as error:
            self._failed_at = time.monotonic()
            self._status = Status("failed", reason=f"the index cannot be built: {_reason(error)}")
        finally:
            self._rebuilding = None

    def _build(self, ending: Callable[[], bool], settled: bool = False) -> Index:
        """A new index from the store; `status` counts. `settled`: nobody changes the store meanwhile."""
        index = Index(self._store.dimension, self._threads, self._normaliser)
        for piece in self._store.samples(settled):
            if ending():
                raise Stopped("the service is being stopped")
            self._put(index, piece)
            self._status = replace(self._status, done=index.samples)
        return index

    def _put(self, index: Index, piece: tuple[list[str], list[bytes], NDArray[np.float32]]) -> None:
        try:
            index.add(*piece)
        except ValueError as error:
            raise UserError(
                f"the store '{self._store.path}' holds a vector that cannot be one of an embedder's ({error}); "
                "restore the store from a backup"
            ) from error

    def _install(self, index: Index) -> None:
        """Search in this one from now on. Called with the lock held."""
        state = self._store.state()
        if (index.subjects, index.samples) != (state.subjects, state.samples):
            raise UserError(
                f"the store '{self._store.path}' counts {state.subjects} subjects with {state.samples} samples but "
                f"gave {index.subjects} with {index.samples}; it was damaged: restore it from a backup"
            )
        self._index, self.revision, self._apart = index, state.revision, False
        self._status = Status("ready", index.samples, index.samples)


def _reason(error: Exception) -> str:
    return "there is not enough memory for the index" if isinstance(error, MemoryError) else str(error)
