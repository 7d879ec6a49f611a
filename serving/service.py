"""What the routes do, without the web framework: sent parts to vectors, vectors to the gallery, results to answers.

Every public method but `ready` computes or waits for the disk, so the API calls it in a thread of its pool.
"""

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from serving import schemas
from serving.bulk import items
from serving.changes import Enrolment, StoreError, SubjectFull
from serving.decoding import Decoders, DecodersClosed, ImageRefused, Limits
from serving.errors import ApiError, invalid, stopping
from serving.gallery import Gallery, Identification, Probe
from serving.index import NORM_TOLERANCE
from serving.metrics import Metrics
from serving.parsing import Sent, enrollable, idempotency_key, known, read_cursor, read_field, read_json, write_cursor
from serving.projection import Stopped
from serving.settings import Settings
from serving.store import Store
from serving.threshold import rules
from trainer.data.image import Preprocessing
from trainer.embedder import Embedder, read_cohort
from trainer.errors import UserError

WATCH_EVERY_S = 1.0
WATCH_LATE_S = 10.0  # a store that has not answered for so long is not ready
Vectors = NDArray[np.float32]
_TOP_K: TypeAdapter[int] = TypeAdapter(schemas.TopK)
_FLAG: TypeAdapter[bool] = TypeAdapter(bool)


class Service:
    """An opened embedder and gallery, and the metrics of what is done with them."""

    def __init__(self, settings: Settings) -> None:
        """Open the embedder and the store. The gallery answers once `load` has been through.

        Raises:
            UserError: one of them cannot be used, they belong to different models, or there is no threshold.
        """
        self.settings = settings
        self.embedder = Embedder.open(settings.embedder, settings.threads)
        manifest = self.embedder.manifest
        verify, identify = rules(manifest, settings.verify_threshold, settings.identify_threshold)
        model = manifest.model_id, manifest.dimension
        normaliser = read_cohort(settings.embedder, manifest)
        store = Store(settings.store, *model, settings.idempotency_hours, settings.restored)
        searched = settings.threads, settings.max_samples, normaliser, settings.index
        self.gallery = Gallery(store, verify, identify, *searched)
        limits = Limits(seconds=settings.decode_cpu_s, pixels=settings.max_pixels)
        form = self.embedder.preprocessing
        self._decoders = Decoders(form, settings.workers, limits) if isinstance(form, Preprocessing) else None
        self.metrics = Metrics(self.gallery)
        self.gallery.on_search = self.metrics.searched
        self._closing = threading.Event()
        self._watched, self._fault = time.monotonic(), ""

    def close(self) -> None:
        """Stop what is under way, at once where it can be, and close the store. Idempotent."""
        self.stop()
        self.gallery.close()

    def stop(self) -> None:
        """End loading and decoding; requests that wait for them are refused."""
        self._closing.set()
        if self._decoders is not None:
            self._decoders.close()

    def keep(self, on_fault: Callable[[UserError], object]) -> None:
        """Check the store and build the index, then watch the store until `stop`. Requests are refused until loaded."""
        try:
            self.gallery.load(stopping=self._closing.is_set)
        except Stopped:
            return
        except UserError as error:
            on_fault(error)
            return
        self.watch()
        while not self._closing.wait(WATCH_EVERY_S):
            self.watch()

    def watch(self) -> None:
        """Ask the store whether it answers and is in step with the index; `ready` tells the outcome."""
        try:
            self.gallery.check()
            self._fault = ""
        except StoreError as error:
            self._fault = str(error)
        self._watched = time.monotonic()

    def probe(self, sent: Sent) -> tuple[Probe, bool]:
        """Whom an identification asks for, and whether its answer shows candidates below the threshold."""
        if sent.document is None:
            top_k = read_field(sent, "top_k", _TOP_K, "5", "not a whole number from 1 to 100")
            below = self._may_see_below(read_field(sent, "below_threshold", _FLAG, "false", "neither true nor false"))
            (probe_D,) = self._embed(sent, "image")
        else:
            body = read_json(schemas.IdentifyRequest, sent.document)
            top_k, below = body.top_k, self._may_see_below(body.below_threshold)
            (probe_D,) = self._vectors([body.embedding], body.model_id, "embedding")
        return Probe(probe_D, top_k), below

    def identified(self, found: Identification, below: bool, request_id: str) -> schemas.IdentifyAnswer:
        """The answer to an identification."""
        self.metrics.decisions.labels("identify", found.decision).inc()
        if found.candidates:
            self.metrics.scores.observe(found.candidates[0].score)
        rule = found.rule
        shown = [candidate for candidate in found.candidates if below or rule.matches(candidate.score)]
        return schemas.IdentifyAnswer(
            candidates=[schemas.CandidateAnswer(**vars(candidate)) for candidate in shown],
            decision=found.decision,
            threshold=rule.value,
            threshold_source=rule.explain(found.gallery_size),
            fpir_target=rule.rate,
            fpir_interval=rule.interval,
            fpir_expected=rule.rate_at(found.gallery_size),
            gallery_size=found.gallery_size,
            calibrated_gallery_size=rule.gallery_size,
            model_id=self.gallery.model_id,
            request_id=request_id,
        )

    def verify(self, sent: Sent, request_id: str) -> schemas.VerifyAnswer:
        if sent.document is None:
            subject_id = sent.fields.get("subject_id")
            if (subject_id is None) != ("reference" in sent.files):
                raise invalid(("reference", "give either a 'reference' image or a 'subject_id'"))
            vectors = self._embed(sent, "probe", "reference")
        else:
            body = read_json(schemas.VerifyRequest, sent.document)
            subject_id = body.subject_id
            both = [body.probe] if body.reference is None else [body.probe, body.reference]
            vectors = self._vectors(both, body.model_id, "probe and reference")
        if subject_id is None:
            found = self.gallery.verify(vectors[0], vectors[1])
        else:
            subject_id = known(subject_id)
            found = self.gallery.verify_subject(vectors[0], subject_id)
        self.metrics.decisions.labels("verify", found.decision).inc()
        rule = self.gallery.verify_rule
        return schemas.VerifyAnswer(
            score=found.score,
            decision=found.decision,
            threshold=rule.value,
            threshold_source=rule.source,
            fmr_target=rule.rate,
            fmr_interval=rule.interval,
            mate_probability=self._mate_probability(found.score),
            subject_id=subject_id,
            sample_id=found.sample_id,
            model_id=self.gallery.model_id,
            request_id=request_id,
        )

    def _mate_probability(self, score: float) -> float | None:
        calibration = self.embedder.manifest.calibration
        model = calibration.probability if calibration else None
        return model.probability(score) if model else None

    def enrol(self, subject_id: str, sent: Sent, key: str | None, request_id: str) -> tuple[schemas.EnrolAnswer, bool]:
        """The answer, and whether it is that of an earlier request with the same idempotency key."""
        subject_id = enrollable(subject_id)
        parts = sent.files["images"] if sent.document is None else [sent.document]
        once = idempotency_key(key, "PUT", subject_id, parts)  # for POST, too: both verbs are one request
        done = self.gallery.replay(once, subject_id) if once else None  # spares embedding again
        if done is None:
            if sent.document is None:
                vectors_BD = self._embed(sent, "images")
            else:
                body = read_json(schemas.EnrolRequest, sent.document)
                vectors_BD = self._vectors(body.embeddings, body.model_id, "embeddings")
            done = self.gallery.enrol(subject_id, vectors_BD, once)
        answer = schemas.EnrolAnswer(
            subject_id=done.subject_id,
            samples=[schemas.SampleAnswer(sample_id=sample_id) for sample_id in done.sample_ids],
            subject_created=done.subject_created,
            subject_samples=done.subject_samples,
            gallery_size=done.gallery_size,
            model_id=self.gallery.model_id,
            request_id=request_id,
        )
        return answer, done.replayed

    def enrol_many(self, sent: Sent, key: str | None, request_id: str) -> tuple[schemas.BulkAnswer, bool]:
        """The answer, and whether it is that of an earlier request with the same idempotency key."""
        once = idempotency_key(key, "POST", "", [sent.document or b""])
        refused, good, names = dict[int, ApiError](), list[tuple[str, Vectors]](), list[str]()
        for item in items(sent, self.gallery.dimension):
            names.append(item.subject_id)
            try:
                vectors_BD = self._vectors(item.embeddings, item.model_id, "embeddings", self.settings.max_samples)
                good.append((enrollable(item.subject_id), vectors_BD))
            except ApiError as error:
                refused[len(names) - 1] = error
        done = self.gallery.enrol_many(good, once)
        outcomes, results = iter(done.results), []
        for place, name in enumerate(names):
            one = refused.get(place) or next(outcomes)
            results.append(_bulk_result(name, one))
        answer = schemas.BulkAnswer(
            results=results,
            enrolled=sum(result.status == "enrolled" for result in results),
            refused=sum(result.status == "refused" for result in results),
            gallery_size=done.gallery_size,
            model_id=self.gallery.model_id,
            request_id=request_id,
        )
        return answer, done.replayed

    def delete(self, subject_id: str, key: str | None) -> bool:
        """Whether an earlier request with the same idempotency key did it."""
        subject_id = known(subject_id)
        return self.gallery.delete(subject_id, idempotency_key(key, "DELETE", subject_id, ())).replayed

    def subjects(self, cursor: str | None, limit: int, request_id: str) -> schemas.SubjectsAnswer:
        rows = self.gallery.subjects(read_cursor(cursor), limit + 1)  # one more tells whether there is a next page
        return schemas.SubjectsAnswer(
            subjects=[schemas.SubjectAnswer.model_validate(row, from_attributes=True) for row in rows[:limit]],
            next_cursor=write_cursor(rows[limit - 1].position) if len(rows) > limit else None,
            gallery_size=self.gallery.size,
            model_id=self.gallery.model_id,
            request_id=request_id,
        )

    def embed(self, sent: Sent, request_id: str) -> schemas.EmbedAnswer:
        rows, dimension = self._embed(sent, "images").tolist(), self.gallery.dimension
        return schemas.EmbedAnswer(
            embeddings=rows, dimension=dimension, model_id=self.gallery.model_id, request_id=request_id
        )

    def ready(self, trusted: bool, request_id: str) -> schemas.ReadyAnswer:
        """Whether the service can answer, from memory alone; counts only for those who may know them.

        Raises:
            ApiError: 503 while the gallery loads, and when the store has failed.
        """
        status = self.gallery.status()
        if status.state == "loading":
            raise loading(status.done, status.total)
        fault = status.reason if status.state == "failed" else self._fault
        if fault or time.monotonic() - self._watched > WATCH_LATE_S:
            told = fault if trusted and fault else "the store does not answer"
            raise ApiError(503, "store_unavailable", f"{told}; the log says more", headers={"retry-after": "5"})
        if not trusted:
            return schemas.ReadyAnswer(request_id=request_id)
        return schemas.ReadyAnswer(
            gallery_size=self.gallery.size,
            samples=self.gallery.samples,
            revision=self.gallery.revision,
            model_id=self.gallery.model_id,
            request_id=request_id,
        )

    def _may_see_below(self, asked: bool) -> bool:
        """Whether an answer shows candidates below the threshold."""
        rule = self.settings.below_threshold
        if asked and rule == "never":
            message = "this service does not show candidates below the threshold; leave below_threshold out"
            raise ApiError(403, "below_threshold_hidden", message)
        return asked or rule == "always"

    def _embed(self, sent: Sent, *parts: str) -> Vectors:
        """Unit vectors of the image files in these parts, in order; the message of a fault says which file."""
        if self._decoders is None:
            reads = self.embedder.preprocessing.reads
            message = f"the model of this service reads {reads}, not images; send embeddings, as application/json"
            raise ApiError(415, "no_images", message, {"reads": reads})
        limit = self.settings.max_image_bytes
        images = [(part, number, image) for part in parts for number, image in enumerate(sent.files.get(part, ()), 1)]
        names = [part if len(sent.files[part]) == 1 else f"{part} {number}" for part, number, _ in images]
        for (part, number, image), name in zip(images, names, strict=True):
            if len(image) > limit:
                message = f"image '{name}' has {len(image)} bytes; at most {limit} are allowed: send it smaller"
                facts = {"part": part, "number": number, "max_bytes": limit}
                raise ApiError(413, "image_too_large", message, facts)
        try:
            pixels_BCHW = self._decoders.decode([image for _, _, image in images], names)
        except ImageRefused as error:
            part, number, _ = images[error.number]
            status = 415 if error.code == "not_an_image" else 422
            raise ApiError(status, error.code, error.message, {"part": part, "number": number}) from error
        except DecodersClosed as error:
            raise stopping() from error
        try:
            with self.metrics.embedding.time():
                vectors_BD = self.embedder.embed(pixels_BCHW)
        except UserError as error:
            raise ApiError(422, "bad_image", str(error), {"parts": list(parts)}) from error
        self.metrics.images.inc(len(images))
        return vectors_BD

    def _vectors(
        self, embeddings: Vectors | Sequence[Sequence[float]], model_id: str | None, part: str, most: int | None = None
    ) -> Vectors:
        """Embeddings that a client sent, checked and brought to length 1 exactly."""
        if model_id is not None and model_id != self.gallery.model_id:
            message = (
                f"the embeddings are of model {model_id}, but this service runs model {self.gallery.model_id}, and "
                "vectors of two models cannot be compared; make them with POST /v1/embed of this service"
            )
            raise ApiError(409, "wrong_model", message, {"sent": model_id, "served": self.gallery.model_id})
        if len(embeddings) > (most := most or self.settings.max_images):
            problem = f"{len(embeddings)} embeddings were sent; at most {most} fit one"
            raise invalid((part, problem))
        allowed = self.gallery.dimension
        for length in map(len, embeddings):
            if length != allowed:
                message = f"an embedding in '{part}' has {length} numbers; model {self.gallery.model_id} has {allowed}"
                raise ApiError(422, "wrong_dimension", message, {"part": part, "sent": length, "allowed": allowed})
        x_BD = np.asarray(embeddings, np.float64)
        lengths_B = np.linalg.norm(x_BD, axis=1)
        if not (np.abs(lengths_B - 1) <= NORM_TOLERANCE).all():
            worst = float(lengths_B[np.abs(lengths_B - 1).argmax()])
            message = f"an embedding in '{part}' has length {worst:.4g}; it must be 1: divide it by its length"
            facts = {"part": part, "length": worst if np.isfinite(worst) else str(worst)}
            raise ApiError(422, "not_a_unit_vector", message, facts)
        unit_BD: Vectors = (x_BD / lengths_B[:, None]).astype(np.float32)
        return unit_BD


def _bulk_result(subject_id: str, outcome: Enrolment | SubjectFull | ApiError) -> schemas.BulkResult:
    if isinstance(outcome, Enrolment):
        samples = [schemas.SampleAnswer(sample_id=sample_id) for sample_id in outcome.sample_ids]
        return schemas.BulkResult(
            subject_id=subject_id, status="enrolled", samples=samples, subject_created=outcome.subject_created
        )
    error = ApiError(409, "too_many_samples", str(outcome)) if isinstance(outcome, SubjectFull) else outcome
    body = schemas.ErrorBody(code=error.code, message=error.message, details=dict(error.details))
    return schemas.BulkResult(subject_id=subject_id, status="refused", error=body)


def loading(done: int, total: int) -> ApiError:
    """503 while the gallery is read; the progress is a share, since the numbers are not everybody's to know."""
    share = round(done / total, 3) if total else 0.0
    message = f"the gallery is loading, {share:.0%} done; ask /readyz, and try again"
    return ApiError(503, "loading", message, {"progress": share}, {"retry-after": "1"})
