"""The index of a gallery, kept in step with the store.

If the two come apart, because the second step of a change failed or another program changed the store, the index is
built anew aside, while searches and changes go on with the old one. An erased subject is hidden in that one whatever
happened.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from serving.search.blocks import Vectors, digest, of_sample, of_subjects
from serving.search.codes import Form
from serving.search.index import Index
from serving.search.keeping import Keeper
from serving.search.templates import Template
from serving.storage.changes import Enrolment, State, StoreError
from serving.storage.reading import Piece
from serving.storage.rows import NOBODY
from serving.storage.store import Store
from trainer.errors import UserError
from trainer.evaluation.normalise import Normaliser

FAILURES = (StoreError, UserError, MemoryError, RuntimeError)  # the last is FAISS's
PAUSE_S = 0.01  # between two pieces of a store that is verified beside the searches
AGAIN_S = 30.0  # after which it is begun anew where changes came between
RETRY_S = 60.0  # between two tries to build an index from a store that does not let itself be read
log = logging.getLogger("hypersphere.serving")


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


class Projection:
    """What a gallery searches in. Methods may be called from several threads.

    Attributes:
        index: changes only while `changing` is entered, or by another one taking its place.
        revision: of the store, that the index has reached.
        status: how far it is; nothing is waited for.
    """

    def __init__(
        self,
        store: Store,
        threads: int,
        normaliser: Normaliser | None = None,
        form: Form = "exact",
        template: Template = "maximum",
    ) -> None:
        """Nothing is read yet: see `load`. `threads`: cores that one search uses. `normaliser`: of the scores. `form`:
        see `Index`. `template`: that a snapshot is of."""
        self._store, self._threads, self._normaliser, self._form = store, threads, normaliser, form
        self._template, self._keeper = template, Keeper(store, normaliser, template)
        self.index = self._empty()
        self.revision, self.status = 0, Status("loading")
        self._lock = threading.Lock()  # held by a change from the store's commit to the index
        self._closing = threading.Event()
        self._apart = True  # the index may lack what the store has
        self._loaded = False
        self._rebuilding: threading.Thread | None = None
        self._examining: threading.Thread | None = None
        self._changed: set[str] = set()  # subjects that were changed while an index was being built
        self._failed_at = 0.0

    def load(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Build the index from a snapshot, or from the store, which is verified; `status` tells how far it is.

        After a start from a snapshot the store is verified in the background; damage is told by `check` then.

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
                self.status = Status("loading", 0, self._store.state().samples)
                index = self._empty()
                resumed = self._keeper.resume(index, self._put, self._threads)
                if not resumed:
                    self._store.verify(ending)
                    index = self._build(ending, settled=True)
                self._install(index)
                self._loaded = True
                if resumed:
                    self._examining = threading.Thread(target=self._examine, name="examine", daemon=True)
                    self._examining.start()
            except FAILURES as error:
                if ending():
                    raise Stopped("loading was stopped") from error
                self.status = Status("failed", reason=_reason(error))
                raise UserError(self.status.reason) from error

    @property
    def samples(self) -> int:
        """Enrolled, as far as they can be found."""
        return self.index.samples

    def close(self) -> None:
        """End what is under way in the background, take a last snapshot, and close the store. Idempotent."""
        ended = self._closing.is_set()
        self._closing.set()
        for thread in (self._rebuilding, self._examining):
            if thread:
                thread.join()
        with self._lock:
            self._keeper.close(None if ended or self._apart else self.index, self.revision)
            self._store.close()

    def check(self) -> State:
        """The store's counts, after making sure that it answers from the files that were opened.

        Where the index is not in step with it, building a new one is begun in the background. A change under way is not
        waited for. Called about once a second.
        """
        self.refuse_loading()
        state = self._store.check()
        if self._lock.acquire(blocking=False):
            try:
                self._mend()
                if not self._apart:
                    self._keeper.tend(self.index, self.revision)
            finally:
                self._lock.release()
        self._refuse_failed()
        return state

    def refuse_loading(self) -> None:
        """Raises GalleryLoading as long as there is no index to search in, StoreError where there will be none."""
        if not self._loaded:
            self._refuse_failed()
            raise GalleryLoading(self.status.done, self.status.total)

    def _refuse_failed(self) -> None:
        if self.status.state == "failed":
            raise StoreError(self.status.reason)

    @contextmanager
    def changing(self, *subject_ids: str) -> Iterator[None]:
        """Alone with the store and the index, to change both. What fails between the two is found out and mended."""
        self.refuse_loading()
        with self._lock:
            self._mend()
            self._refuse_failed()
            self._changed.update(subject_ids)
            sound = False
            try:
                yield
                sound = True
            finally:
                if not sound:
                    self._distrust(subject_ids)

    def add(self, done: Sequence[tuple[Enrolment, Vectors]]) -> None:
        """Take over one change of the store, inside `changing`: what it did to subjects, and their new vectors."""
        if done:
            names = [one.subject_id for one, vectors_BD in done for _ in vectors_BD]
            sample_ids = [uuid.UUID(sample_id).bytes for one, _ in done for sample_id in one.sample_ids]
            numbers_B = np.array([one.number for one, vectors_BD in done for _ in vectors_BD], np.int64)
            self.index.add(names, sample_ids, np.concatenate([x_BD for _, x_BD in done]), numbers_B - NOBODY)
        self.revision += 1

    def remove(self, subject_id: str) -> None:
        """Take over one change of the store, inside `changing`: a deletion. It is off the disk when this returns."""
        numbers = self.index.numbers([subject_id])
        self.index.remove(subject_id)
        self._keeper.erase(of_subjects(numbers))
        self.revision += 1

    def remove_sample(self, subject_id: str, sample_id: str) -> None:
        """As `remove`, of one sample."""
        numbers, sample = self.index.numbers([subject_id]), uuid.UUID(sample_id).bytes
        self.index.remove_sample(subject_id, sample)
        self._keeper.erase(of_sample(numbers, sample))
        self.revision += 1

    def merge(self, into: str, other: str) -> None:
        """Take over one change of the store, inside `changing`: the samples of `other` are those of `into`."""
        numbers = self.index.numbers([into, other])
        self.index.merge(into, other)
        if len(numbers) == 2:  # else the index lacks one, and is built anew
            self._keeper.relabel(*numbers[::-1].tolist())
        self.revision += 1

    def confirm(self) -> None:
        """Raises GalleryLoading as long as the index may lack what a repeated answer tells of."""
        if self._apart:
            raise GalleryLoading(self.status.done, self.status.total)

    def _distrust(self, subject_ids: Sequence[str]) -> None:
        """A change ended in an error, perhaps after it was committed. If it was a deletion, it must hold."""
        try:
            if self._store.state().revision == self.revision:
                return
            erased = [subject_id for subject_id in subject_ids if self._store.samples_of(subject_id) is None]
        except (StoreError, UserError):
            erased = list(subject_ids)  # nobody knows
        self._apart = True
        for subject_id in erased:
            self.index.hide(subject_id)
        if erased:
            self._keeper.drop("a deletion ended in an error")

    def _mend(self) -> None:
        """Begin to build a new index where the old one is not in step. Called with the lock held."""
        if self._rebuilding is not None or self._closing.is_set():
            return
        state = self._store.state()
        held = self.revision, self.index.subjects, self.index.samples
        self._apart = self._apart or (state.revision, *self._rows(state)) != held
        if not self._apart:
            self._changed.clear()
        elif self.status.state != "failed" or time.monotonic() >= self._failed_at + RETRY_S:
            self._changed.clear()
            self.status = Status("rebuilding", 0, state.samples)
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
            self.status = Status("failed", reason=f"the index cannot be built: {_reason(error)}")
        finally:
            self._rebuilding = None

    def _examine(self) -> None:
        """Verify the store beside everything else, and compare the index with it.

        Where the store changes while it is read, the sums of its rows are left alone.
        """
        while not self._closing.is_set():
            revision, total = self._store.state().revision, 0
            try:
                self._store.verify(self._closing.is_set, beside=True)
                for piece in self._store.samples(settled=True):
                    samples_B = np.frombuffer(b"".join(piece.sample_ids), np.uint8).reshape(-1, 16)
                    total += digest(piece.numbers_B - NOBODY, samples_B)
                    if self._closing.wait(PAUSE_S):
                        return
                self._compare(revision, total % 2**64)
                log.info("all of the store '%s' was read, and is sound", self._store.path)
                return
            except UserError as error:
                if self._store.state().revision == revision or "checksum" in str(error):
                    log.error("%s", error)
                    self.status = Status("failed", reason=str(error))
                    return
            except StoreError:  # something was erased meanwhile
                pass
            self._closing.wait(AGAIN_S)

    def _compare(self, revision: int, total: int) -> None:
        """Have the index built anew where it holds other samples than the store, which had these at a revision."""
        with self._lock:
            same = self.revision == revision == self._store.state().revision
            if same and self._template == "maximum" and self.index.digest() != total:
                log.error("the index does not hold what the store '%s' does, and is built anew", self._store.path)
                self._keeper.drop("it was not what the store holds")
                self._apart = True

    def _build(self, ending: Callable[[], bool], settled: bool = False) -> Index:
        """A new index from the store; `status` counts. `settled`: nobody changes the store meanwhile."""
        index = self._empty()
        for piece in self._pieces(settled):
            if ending():
                raise Stopped("the service is being stopped")
            self._put(index, piece)
            self.status = replace(self.status, done=index.samples)
        return index

    def _empty(self) -> Index:
        return Index(self._store.dimension, self._threads, self._normaliser, self._form)

    def _rows(self, state: State) -> tuple[int, int]:
        """The subjects and rows that an index of a store in this state has."""
        return state.subjects, state.samples

    def _pieces(self, settled: bool) -> Iterator[Piece]:
        return self._store.samples(settled)

    def _put(self, index: Index, piece: Piece) -> None:
        try:
            index.add(piece.subject_ids, piece.sample_ids, piece.vectors_BD, piece.numbers_B - NOBODY)
        except ValueError as error:
            raise UserError(
                f"the store '{self._store.path}' holds a vector that cannot be one of an embedder's ({error}); "
                "restore the store from a backup"
            ) from error

    def _install(self, index: Index) -> None:
        """Search in this one from now on. Called with the lock held."""
        state = self._store.state()
        if (index.subjects, index.samples) != self._rows(state):
            raise UserError(
                f"the store '{self._store.path}' counts {state.subjects} subjects with {state.samples} samples but "
                f"gave {index.subjects} with {index.samples}; it was damaged: restore it from a backup"
            )
        self.index, self.revision, self._apart = index, state.revision, False
        self.status = Status("ready", index.samples, index.samples)


def _reason(error: Exception) -> str:
    return "there is not enough memory for the index" if isinstance(error, MemoryError) else str(error)
