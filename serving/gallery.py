"""The Gallery: enrolled subjects, kept by the store, searched by its projection, decided on by a threshold."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serving.index import Candidate
from serving.projection import GalleryLoading, Projection, Status, Stopped
from serving.store import Deletion, Enrolment, IdempotencyKey, State, Store, SubjectRow, SubjectUnknown, never
from trainer.embedder import EmbedderManifest
from trainer.errors import UserError
from trainer.evaluation.report import Threshold

__all__ = ["Gallery", "GalleryLoading", "Identification", "Rule", "Status", "Stopped", "Verification", "rules"]


@dataclass(frozen=True)
class Rule:
    """Scores at or above `value` are a match.

    Attributes:
        source: where the value came from, in words.
        rate: the FMR (verify) or FPIR (identify) it was calibrated for; None: set by hand, not known.
        interval: bounds of the rate that the calibration reached.
        gallery_size: subjects in the gallery it was calibrated for (identify).
    """

    value: float
    source: str
    rate: float | None = None
    interval: tuple[float, float] | None = None
    gallery_size: int | None = None

    def matches(self, score: float) -> bool:
        return score >= self.value

    def rate_at(self, gallery_size: int) -> float | None:
        """FPIR to expect in a gallery of another size: 1 - (1 - FPIR)^(N / N0).

        This is FPIR = 1 - (1 - FMR)^N, which holds for independent comparisons, solved for FMR at the calibrated N0.
        Real comparisons of one probe depend on each other, so it is an upper bound for N > N0.
        """
        if self.rate is None or self.gallery_size is None:
            return None
        return float(1.0 - (1.0 - self.rate) ** (gallery_size / self.gallery_size))

    def explain(self, gallery_size: int) -> str:
        """`source`, and what it means that the gallery holds `gallery_size` subjects now."""
        expected = self.rate_at(gallery_size)
        if expected is None or gallery_size == self.gallery_size:
            return self.source
        advice = " or less: calibrate for this size" if gallery_size > (self.gallery_size or 0) else ""
        return (
            f"{self.source}; it was calibrated for {self.gallery_size} subjects and the gallery holds {gallery_size}, "
            f"where FPIR is about {expected:.2g}{advice}"
        )


def rules(manifest: EmbedderManifest, verify: float | None, identify: float | None) -> tuple[Rule, Rule]:
    """The rules for verify (1:1) and identify (1:N): the operator's values where given, else the calibration's.

    A threshold is never guessed.

    Raises:
        UserError: a value is missing, cannot be a similarity, or was calibrated for another model.
    """
    calibration = manifest.calibration
    return (
        _rule(manifest, "verify", verify, calibration.verify if calibration else None),
        _rule(manifest, "identify", identify, calibration.identify if calibration else None),
    )


def _rule(manifest: EmbedderManifest, use: str, by_hand: float | None, calibrated: Threshold | None) -> Rule:
    if by_hand is not None:
        if not -1.0 <= by_hand <= 1.0001:
            raise UserError(f"the {use} threshold {by_hand} is not a cosine similarity; allowed is -1 to 1.0001")
        return Rule(by_hand, "set by the operator, not calibrated: its error rates are not known")
    if calibrated is None:
        raise UserError(
            f"the embedder {manifest.model_id} has no calibration, so there is no threshold to {use} by; "
            f"run 'hypersphere calibrate' on it, or give one with --{use}-threshold"
        )
    if calibrated.model_id != manifest.model_id:
        raise UserError(
            f"the {use} threshold was calibrated for model {calibrated.model_id}, but the embedder is model "
            f"{manifest.model_id}; run 'hypersphere calibrate' on this embedder"
        )
    wanted, size = ("FMR", None) if use == "verify" else ("FPIR", calibrated.gallery_size)
    if calibrated.target != wanted:
        raise UserError(
            f"the {use} threshold was calibrated for {calibrated.target}; {use} needs one for {wanted}: "
            "run 'hypersphere calibrate' again"
        )
    source = f"calibrated for {wanted} {calibrated.rate:g}: {calibrated.source}"
    return Rule(calibrated.value, source, calibrated.rate, (calibrated.low, calibrated.high), size)


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

    Each raises StoreError when the disk fails (what was acknowledged before is not lost by it), each that needs the
    index raises GalleryLoading before `load` has ended, and each that takes vectors raises ValueError where one is not
    finite, not of length 1, or not of the gallery's dimension.
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
        self.model_id, self.dimension = store.model_id, store.dimension
        self._store, self._projection = store, Projection(store, threads)
        self._max_samples = max_samples

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

    def load(self, stopping: Callable[[], bool] = never) -> None:
        """Verify the store and build the index from it; `status` tells how far it is.

        Args:
            stopping: asked several times a second; true ends the loading.

        Raises:
            UserError: the store is damaged.
            Stopped: `stopping` returned true, or the gallery was closed.
        """
        self._projection.load(stopping)

    def close(self) -> None:
        """End what is under way in the background, and close the store. Idempotent."""
        self._projection.close()

    def enrol(self, subject_id: str, vectors_BD: NDArray[np.float32], key: IdempotencyKey | None = None) -> Enrolment:
        """Add samples to a subject, new or known. When this returns, they are on disk and found by the next search.

        Raises:
            KeyReused, SubjectFull: see `Store.enrol`.
        """
        with self._projection.changing(subject_id):
            self._projection.index.check(vectors_BD)  # before the store has them
            done = self._store.enrol(subject_id, vectors_BD, self._max_samples, key)
            if done.replayed:
                self._projection.confirm()
            else:
                self._projection.add(subject_id, done.sample_ids, vectors_BD)
            return done

    def replay(self, key: IdempotencyKey, subject_id: str) -> Enrolment | None:
        """What an enrolment of `subject_id` under this key did, if it was done; the next search finds it.

        Raises:
            KeyReused: the key stands for another request.
        """
        with self._projection.changing(subject_id):  # waits for one that is committed but not yet in the index
            done = self._store.recall(key, subject_id)
            if done is not None:
                self._projection.confirm()
            return done

    def delete(self, subject_id: str, key: IdempotencyKey | None = None) -> Deletion:
        """Erase a subject. When this returns, it is off the disk and no later search finds it.

        Raises:
            SubjectUnknown, KeyReused: see `Store.delete`.
        """
        with self._projection.changing(subject_id):
            done = self._store.delete(subject_id, key)
            if not done.replayed:
                self._projection.remove(subject_id)
            return done

    def subjects(self, after: int, limit: int) -> list[SubjectRow]:
        """A page of the subjects, in order of enrolment, behind position `after` (0: from the start)."""
        self._projection.refuse_loading()
        return self._store.subjects(after, limit)

    def identify(self, probe_D: NDArray[np.float32], top_k: int) -> Identification:
        """The `top_k` nearest subjects; a match if the nearest reaches the threshold."""
        self._projection.refuse_loading()
        index = self._projection.index
        size = index.subjects
        (candidates,) = index.search(probe_D[None], top_k)
        known = bool(candidates) and self.identify_rule.matches(candidates[0].score)
        return Identification(candidates, "match" if known else "unknown", size)

    def verify(self, probe_D: NDArray[np.float32], reference_D: NDArray[np.float32]) -> Verification:
        """Compare two vectors; needs no index."""
        self._projection.index.check(np.stack([probe_D, reference_D]))
        return self._verified(max(-1.0, min(1.0, float(probe_D @ reference_D))), None)

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

    def check(self) -> State:
        """The store's counts, after making sure that it answers from the files that were opened.

        Where the index is not in step with it, building a new one is begun in the background. A change under way is not
        waited for. Called about once a second.
        """
        return self._projection.check()

    def _verified(self, score: float, sample_id: str | None) -> Verification:
        return Verification(score, "match" if self.verify_rule.matches(score) else "no_match", sample_id)
