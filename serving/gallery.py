"""The Gallery: enrolled subjects, kept by the store, searched by its projection, decided on by a threshold.

Order of a change, under one lock: commit in the store (on disk), then apply to the index, then answer. A search between
the two steps does not see the change, which nobody has been told of yet.

`Projection` finds out and mends what fails between the two.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serving.batching import Batcher
from serving.search.averages import Averages
from serving.search.codes import Form
from serving.search.index import Candidate
from serving.search.projection import Projection, Status
from serving.search.templates import Template
from serving.storage.changes import (
    Attached,
    BulkEnrolment,
    Deletion,
    Enrolment,
    IdempotencyKey,
    Metadata,
    SampleRow,
    State,
    StoreError,
    SubjectRow,
    SubjectUnknown,
    Update,
)
from serving.storage.reading import Piece
from serving.storage.store import PLAIN, Store
from serving.threshold import Rule
from trainer.evaluation.normalise import Normaliser


@dataclass(frozen=True)
class Probe:
    """Whom to search for: a unit vector, how many subjects to return, and among whom to search (None: all).

    Probes that name the same collection of subjects, not an equal one, are searched together.
    """

    vector_D: NDArray[np.float32]
    top_k: int
    among: Collection[str] | None = None


@dataclass(frozen=True)
class Identification:
    """The answer to "who is this?": the best subjects, best first, and whether the first is a match by the rule.

    `gallery_size`: subjects that were searched; the rule is the one for so many.
    """

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
        form: Form = "exact",
        template: Template = "maximum",
    ) -> None:
        """Nothing is read yet: see `load`. `threads`: cores of one search. `max_samples`: per subject. `form`: see
        `Index`. `template`: what of a subject is searched."""
        self.verify_rule, self.identify_rule = verify_rule, identify_rule
        self.path, self.model_id, self.dimension = store.path, store.model_id, store.dimension
        self._store, self._max_samples = store, max_samples
        kind = Projection if template == "maximum" else Averages
        self._projection = kind(store, threads, normaliser, form, template)
        self._searches, self._fault = Batcher(self._search), ""
        self.on_search: Callable[[int, float], object] = lambda size, seconds: None

    @property
    def uid(self) -> str:
        """Tells the store from any other."""
        return self._store.uid.hex()

    @property
    def revision(self) -> int:
        """Of the store, that searches have reached."""
        return self._projection.revision

    @property
    def size(self) -> int:
        """Enrolled subjects; 0 before they are loaded."""
        return self._projection.index.subjects

    @property
    def samples(self) -> int:
        return self._projection.samples

    @property
    def waiting(self) -> int:
        """Searches that wait for a pass over the gallery."""
        return self._searches.waiting

    def enrolled(self) -> State:
        """The store's counts, which it knows before the gallery is loaded."""
        return self._store.state()

    def status(self) -> Status:
        """What stands in memory; nothing is waited for. Where the last `check` failed, so has the gallery."""
        return Status("failed", reason=self._fault) if self._fault else self._projection.status

    def load(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """See `Projection.load`."""
        self._projection.load(stopping)

    def check(self) -> State:
        """See `Projection.check`."""
        try:
            state = self._projection.check()
        except StoreError as error:
            self._fault = str(error)
            raise
        self._fault = ""
        return state

    def close(self) -> None:
        """End what is under way in the background, and close the store. Idempotent."""
        self._searches.close()
        self._projection.close()

    def enrol(
        self,
        subject_id: str,
        vectors_BD: NDArray[np.float32],
        key: IdempotencyKey | None = None,
        attached: Attached = PLAIN,
        expected: int | None = None,
    ) -> Enrolment:
        """Add samples to a subject, new or known. When this returns, they are on disk and found by the next search.
        `expected`, and what it raises: see `Store`.

        Raises:
            SubjectFull: the subject would hold more than `max_samples`.
        """
        with self._projection.changing(subject_id):
            self._projection.index.check(vectors_BD)  # before the store has them
            done = self._store.enrol(subject_id, vectors_BD, self._max_samples, key, attached, expected)
            if done.replayed:
                self._projection.confirm()
            else:
                self._projection.add([(done, vectors_BD)])
            return done

    def enrol_many(
        self,
        items: Sequence[tuple[str, NDArray[np.float32]]],
        key: IdempotencyKey | None = None,
        attached: Sequence[Attached] = (),
    ) -> BulkEnrolment:
        """`enrol` for many subjects at once, in one change; an item that is refused leaves the others alone."""
        with self._projection.changing(*(subject_id for subject_id, _ in items)):
            for _, vectors_BD in items:
                self._projection.index.check(vectors_BD)
            done = self._store.enrol_many(items, self._max_samples, key, attached)
            if done.replayed:
                self._projection.confirm()
                return done
            pairs = zip(done.results, items, strict=True)
            self._projection.add([(one, vectors_BD) for one, (_, vectors_BD) in pairs if isinstance(one, Enrolment)])
            return done

    def replay(self, key: IdempotencyKey, subject_id: str) -> Enrolment | None:
        """What an enrolment of `subject_id` under this key did, if it was done; the next search finds it."""
        with self._projection.changing(subject_id):  # waits for one that is committed but not yet in the index
            done = self._store.recall(key, subject_id)
            if done is not None:
                self._projection.confirm()
            return done

    def delete(self, subject_id: str, key: IdempotencyKey | None = None, expected: int | None = None) -> Deletion:
        """Erase a subject. When this returns, it is off the disk and no later search finds it.

        Raises:
            SubjectUnknown: nobody of that id is enrolled.
        """
        with self._projection.changing(subject_id):
            done = self._store.delete(subject_id, key, expected)
            if not done.replayed:
                self._projection.remove(subject_id)
            return done

    def update(
        self, subject_id: str, metadata: Metadata, key: IdempotencyKey | None = None, expected: int | None = None
    ) -> Update:
        """Give a subject this metadata in place of what it has. `expected`, and what is raised: see `Store`."""
        with self._projection.changing(subject_id):
            done = self._store.update(subject_id, metadata, key, expected)
            self._projection.revision += not done.replayed
            return done

    def merge(self, into: str, other: str, key: IdempotencyKey | None = None, expected: int | None = None) -> Update:
        """Make the samples of `other` those of `into`; see `Store.merge`. No later search finds `other`."""
        with self._projection.changing(into, other):
            done = self._store.merge(into, other, self._max_samples, key, expected)
            if not done.replayed:
                self._projection.merge(into, other)
            return done

    def delete_sample(
        self, subject_id: str, sample_id: str, key: IdempotencyKey | None = None, expected: int | None = None
    ) -> Update:
        """Erase one sample, but not the last one; see `Store.delete_sample`. No later search finds it."""
        with self._projection.changing(subject_id):
            done = self._store.delete_sample(subject_id, sample_id, key, expected)
            if not done.replayed:
                self._projection.remove_sample(subject_id, sample_id)
            return done

    def subjects(self, after: int, limit: int, where: Metadata | None = None) -> list[SubjectRow]:
        """A page of the subjects, in order of enrolment, behind position `after` (0: from the start).

        `where`: only those whose metadata has all these keys with these values.
        """
        self._projection.refuse_loading()
        return self._store.subjects(after, limit, where)

    def subject(self, subject_id: str) -> tuple[SubjectRow, list[SampleRow]]:
        """A subject and its samples. Raises SubjectUnknown."""
        self._projection.refuse_loading()
        return self._store.subject(subject_id)

    def sample(self, subject_id: str, sample_id: str) -> tuple[SampleRow, NDArray[np.float32]]:
        """One sample and its vector. Raises SubjectUnknown, SampleUnknown."""
        self._projection.refuse_loading()
        return self._store.sample(subject_id, sample_id)

    def image(self, subject_id: str, sample_id: str) -> bytes | None:
        """What a sample was made of, None where it was not kept. Raises SubjectUnknown, SampleUnknown."""
        self._projection.refuse_loading()
        return self._store.image(subject_id, sample_id)

    def matching(self, where: Metadata) -> list[str]:
        """The subjects whose metadata has all of this, for `Probe.among`."""
        self._projection.refuse_loading()
        return self._store.matching(where)

    def sign(self, value: bytes) -> bytes:
        """16 bytes that only this gallery can make of a value."""
        return self._store.sign(value)

    def holds(self, subject_id: str) -> bool:
        """Whether a search can find the subject; known from memory."""
        return len(self._projection.index.numbers((subject_id,))) > 0

    def pieces(self) -> Iterator[Piece]:
        """Every sample, in pieces; what changes meanwhile may be in it or not."""
        self._projection.refuse_loading()
        yield from self._store.samples()

    def nearest(self, queries_QD: NDArray[np.float32], top_k: int) -> list[list[Candidate]]:
        """The `top_k` nearest subjects of each query at once, beside the searches that wait for each other."""
        return self._projection.index.search(queries_QD, top_k)

    def identify(
        self, probe_D: NDArray[np.float32], top_k: int, among: Collection[str] | None = None
    ) -> Identification:
        """The `top_k` nearest subjects; a match if the nearest reaches the threshold of a gallery of this size.

        Args:
            among: the only subjects that are looked for; the threshold is that of a gallery of as many as are enrolled.
        """
        return self.submit(Probe(probe_D, top_k, among)).result()

    def submit(self, probe: Probe) -> Future[Identification]:
        """`identify` in a while; searches that wait at the same time go through the index together."""
        self._projection.refuse_loading()
        self._projection.index.check(probe.vector_D[None])
        return self._searches.submit(probe)

    def _search(self, probes: Sequence[Probe]) -> list[Identification]:
        groups: dict[int, list[int]] = {}
        for place, probe in enumerate(probes):
            groups.setdefault(id(probe.among), []).append(place)
        found: dict[int, Identification] = {}
        for places in groups.values():
            found |= zip(places, self._search_alike([probes[place] for place in places]), strict=True)
        return [found[place] for place in range(len(probes))]

    def _search_alike(self, probes: Sequence[Probe]) -> list[Identification]:
        """Search for probes with the same filter in one pass."""
        start, index, among = time.perf_counter(), self._projection.index, probes[0].among  # a new one may come
        allowed_S = None if among is None else index.numbers(among)
        size, found = index.subjects if allowed_S is None else len(allowed_S), []
        rule, top_k = self.identify_rule.at(size), max(probe.top_k for probe in probes)
        together = index.search(np.stack([probe.vector_D for probe in probes]), top_k, allowed_S)
        for probe, candidates in zip(probes, together, strict=True):
            known = bool(candidates) and rule.matches(candidates[0].score)
            found.append(Identification(candidates[: probe.top_k], "match" if known else "unknown", size, rule))
        self.on_search(len(probes), time.perf_counter() - start)
        return found

    def verify(self, probe_D: NDArray[np.float32], reference_D: NDArray[np.float32]) -> Verification:
        """Compare two vectors; needs no index."""
        return self._verified(self._projection.index.score(probe_D, reference_D), None)

    def verify_subject(self, probe_D: NDArray[np.float32], subject_id: str) -> Verification:
        """Compare a vector with the best of a subject's samples.

        Raises:
            SubjectUnknown: nobody of that id is enrolled.
        """
        self._projection.refuse_loading()
        candidate = self._projection.index.compare(probe_D, subject_id)
        if candidate is None:
            raise SubjectUnknown(f"no subject '{subject_id}' is enrolled; GET /v1/subjects lists them")
        return self._verified(candidate.score, candidate.sample_id)

    def _verified(self, score: float, sample_id: str | None) -> Verification:
        return Verification(score, "match" if self.verify_rule.matches(score) else "no_match", sample_id)
