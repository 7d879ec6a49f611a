"""What the routes do, without the web framework: sent parts to vectors, vectors to the gallery, results to answers.

Every public method computes or waits for the disk, so the API calls it in a thread of its pool.
"""

import base64
import binascii
import contextlib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import UnidentifiedImageError
from pydantic import TypeAdapter, ValidationError

from serving.errors import ApiError
from serving.gallery import Gallery
from serving.index import NORM_TOLERANCE
from serving.metrics import Metrics
from serving.schemas import (
    CandidateAnswer,
    EmbedAnswer,
    EnrolAnswer,
    EnrolRequest,
    IdentifyAnswer,
    IdentifyRequest,
    ReadyAnswer,
    Request,
    SampleAnswer,
    SubjectAnswer,
    SubjectId,
    SubjectsAnswer,
    TopK,
    VerifyAnswer,
    VerifyRequest,
)
from serving.settings import Settings
from serving.store import Enrolment, IdempotencyKey, Store
from serving.threshold import rules
from trainer.data.image import load_image
from trainer.embedder import Embedder
from trainer.errors import UserError

KEY = re.compile(r"[\x21-\x7e]{1,255}")
_SUBJECT_ID: TypeAdapter[str] = TypeAdapter(SubjectId)
_TOP_K: TypeAdapter[int] = TypeAdapter(TopK)
Body = TypeVar("Body", bound=Request)
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Form:
    """A multipart request: files by part name, and the other fields."""

    files: dict[str, list[bytes]]
    fields: dict[str, str]


Sent = Form | bytes  # bytes: a JSON document


class Service:
    """An opened embedder and gallery, and the metrics of what is done with them."""

    def __init__(self, settings: Settings) -> None:
        """Open the embedder and the store, and build the index.

        Raises:
            UserError: one of them cannot be used, they belong to different models, or there is no threshold.
        """
        self.settings = settings
        self.embedder = Embedder.open(settings.embedder, settings.threads)
        manifest = self.embedder.manifest
        verify, identify = rules(manifest, settings.verify_threshold, settings.identify_threshold)
        with contextlib.ExitStack() as opened:
            store = Store(settings.store, manifest.model_id, manifest.dimension, settings.idempotency_hours)
            opened.callback(store.close)
            self.gallery = Gallery(store, verify, identify, settings.threads, settings.max_samples)
            opened.pop_all()
        self.metrics = Metrics(self.gallery)

    def close(self) -> None:
        self.gallery.close()

    def identify(self, sent: Sent, request_id: str) -> IdentifyAnswer:
        if isinstance(sent, Form):
            (probe_D,) = self._embed(sent, "image")
            top_k = _top_k(sent.fields.get("top_k", "5"))
        else:
            body = _parse(IdentifyRequest, sent)
            probe_D, top_k = self._vectors([body.embedding], body.model_id, "embedding")[0], body.top_k
        with self.metrics.searching():
            found = self.gallery.identify(probe_D, top_k)
        self.metrics.decided("identify", found.decision)
        if found.candidates:
            self.metrics.scored(found.candidates[0].score)
        rule = self.gallery.identify_rule
        return IdentifyAnswer(
            candidates=[CandidateAnswer(**vars(candidate)) for candidate in found.candidates],
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

    def verify(self, sent: Sent, request_id: str) -> VerifyAnswer:
        if isinstance(sent, Form):
            subject_id = sent.fields.get("subject_id")
            if (subject_id is None) != ("reference" in sent.files):
                raise _invalid("give either a 'reference' image or a 'subject_id'", "reference")
            vectors = self._embed(sent, "probe", "reference")
        else:
            body = _parse(VerifyRequest, sent)
            subject_id = body.subject_id
            both = [body.probe] if body.reference is None else [body.probe, body.reference]
            vectors = self._vectors(both, body.model_id, "probe and reference")
        if subject_id is None:
            found = self.gallery.verify(vectors[0], vectors[1])
        else:
            subject_id = _subject_id(subject_id)
            found = self.gallery.verify_subject(vectors[0], subject_id)
        self.metrics.decided("verify", found.decision)
        rule = self.gallery.verify_rule
        return VerifyAnswer(
            score=found.score,
            decision=found.decision,
            threshold=rule.value,
            threshold_source=rule.source,
            fmr_target=rule.rate,
            fmr_interval=rule.interval,
            subject_id=subject_id,
            sample_id=found.sample_id,
            model_id=self.gallery.model_id,
            request_id=request_id,
        )

    def enrol(self, subject_id: str, sent: Sent, key: str | None, request_id: str) -> tuple[EnrolAnswer, bool]:
        """The answer, and whether it is that of an earlier request with the same idempotency key."""
        subject_id = _subject_id(subject_id)
        parts = sent.files["images"] if isinstance(sent, Form) else [sent]
        once = _once(key, "PUT", subject_id, parts)
        done = self.gallery.replay(once) if once else None  # spares embedding again
        if done is None:
            if isinstance(sent, Form):
                vectors_BD = self._embed(sent, "images")
            else:
                body = _parse(EnrolRequest, sent)
                vectors_BD = self._vectors(body.embeddings, body.model_id, "embeddings")
            done = self.gallery.enrol(subject_id, vectors_BD, once)
        return self._enrolled(done, request_id), done.replayed

    def delete(self, subject_id: str, key: str | None) -> bool:
        """Whether an earlier request with the same idempotency key did it."""
        subject_id = _subject_id(subject_id)
        return self.gallery.delete(subject_id, _once(key, "DELETE", subject_id, ())).replayed

    def subjects(self, cursor: str | None, limit: int, request_id: str) -> SubjectsAnswer:
        rows = self.gallery.subjects(_position(cursor), limit + 1)  # one more tells whether there is a next page
        return SubjectsAnswer(
            subjects=[
                SubjectAnswer(subject_id=row.subject_id, samples=row.samples, created=row.created)
                for row in rows[:limit]
            ],
            next_cursor=_cursor(rows[limit - 1].position) if len(rows) > limit else None,
            gallery_size=self.gallery.size,
            model_id=self.gallery.model_id,
            request_id=request_id,
        )

    def embed(self, sent: Form, request_id: str) -> EmbedAnswer:
        vectors_BD = self._embed(sent, "images")
        return EmbedAnswer(
            embeddings=vectors_BD.tolist(),
            dimension=self.gallery.dimension,
            model_id=self.gallery.model_id,
            request_id=request_id,
        )

    def ready(self, request_id: str) -> ReadyAnswer:
        """Raises StoreError when the store does not answer."""
        state = self.gallery.check()
        return ReadyAnswer(
            gallery_size=state.subjects,
            samples=state.samples,
            revision=state.revision,
            model_id=self.gallery.model_id,
            request_id=request_id,
        )

    def _enrolled(self, done: Enrolment, request_id: str) -> EnrolAnswer:
        return EnrolAnswer(
            subject_id=done.subject_id,
            samples=[SampleAnswer(sample_id=sample_id) for sample_id in done.sample_ids],
            subject_created=done.subject_created,
            subject_samples=done.subject_samples,
            gallery_size=done.gallery_size,
            model_id=self.gallery.model_id,
            request_id=request_id,
        )

    def _embed(self, form: Form, *parts: str) -> Vectors:
        """Unit vectors of the image files in these parts, in order; the message of a fault says which file."""
        limit = self.settings.max_image_bytes
        pixels = []
        for part in parts:
            for number, image in enumerate(form.files.get(part, ()), 1):
                where: dict[str, object] = {"part": part, "number": number}
                name = part if len(form.files[part]) == 1 else f"{part} {number}"
                if len(image) > limit:
                    raise ApiError(
                        413,
                        "image_too_large",
                        f"image '{name}' has {len(image)} bytes; at most {limit} are allowed: send it smaller",
                        where | {"max_bytes": limit},
                    )
                try:
                    pixels.append(load_image(image, self.embedder.preprocessing, name))
                except UserError as error:
                    if isinstance(error.__cause__, UnidentifiedImageError):
                        raise ApiError(415, "not_an_image", str(error), where) from error
                    raise ApiError(422, "bad_image", str(error), where) from error
        with self.metrics.embedding(len(pixels)):
            try:
                return self.embedder.embed(np.stack(pixels))
            except UserError as error:
                raise ApiError(422, "bad_image", str(error), {"parts": list(parts)}) from error

    def _vectors(self, embeddings: Sequence[Sequence[float]], model_id: str | None, part: str) -> Vectors:
        """Embeddings that a client sent, checked and brought to length 1 exactly."""
        if model_id is not None and model_id != self.gallery.model_id:
            raise ApiError(
                409,
                "wrong_model",
                f"the embeddings are of model {model_id}, but this service runs model {self.gallery.model_id}, and "
                "vectors of two models cannot be compared; make them with POST /v1/embed of this service",
                {"sent": model_id, "served": self.gallery.model_id},
            )
        if len(embeddings) > self.settings.max_images:
            raise _invalid(f"{len(embeddings)} embeddings were sent; at most {self.settings.max_images} fit one", part)
        for embedding in embeddings:
            if len(embedding) != self.gallery.dimension:
                raise ApiError(
                    422,
                    "wrong_dimension",
                    f"an embedding in '{part}' has {len(embedding)} numbers; model {self.gallery.model_id} has "
                    f"{self.gallery.dimension}",
                    {"part": part, "sent": len(embedding), "allowed": self.gallery.dimension},
                )
        x_BD = np.asarray(embeddings, np.float64)
        lengths_B = np.linalg.norm(x_BD, axis=1)
        if not (np.abs(lengths_B - 1) <= NORM_TOLERANCE).all():
            worst = float(lengths_B[np.abs(lengths_B - 1).argmax()])
            raise ApiError(
                422,
                "not_a_unit_vector",
                f"an embedding in '{part}' has length {worst:.4g}; it must be 1: divide it by its length",
                {"part": part, "length": worst if np.isfinite(worst) else str(worst)},
            )
        unit_BD: Vectors = (x_BD / lengths_B[:, None]).astype(np.float32)
        return unit_BD


def _parse(model: type[Body], document: bytes) -> Body:
    try:
        return model.model_validate_json(document)
    except ValidationError as error:
        faults = error.errors(include_input=False, include_url=False, include_context=False)
        if faults[0]["type"] == "json_invalid":
            raise ApiError(400, "not_json", f"the body is not JSON ({faults[0]['msg']})") from error
        raise invalid_fields([(".".join(map(str, fault["loc"])), fault["msg"]) for fault in faults]) from error


def invalid_fields(faults: Sequence[tuple[str, str]]) -> ApiError:
    """422 for fields that are not as the schema wants them: (where, what is wrong). The first ten are told."""
    where, problem = faults[0]
    listed = [{"where": place, "problem": text} for place, text in faults[:10]]
    return ApiError(
        422, "invalid", f"{where or 'the request'}: {problem}; see /docs", {"faults": listed, "count": len(faults)}
    )


def _invalid(problem: str, where: str) -> ApiError:
    return invalid_fields([(where, problem)])


def _subject_id(text: str) -> str:
    try:
        return _SUBJECT_ID.validate_python(text)
    except ValidationError as error:
        raise _invalid(
            "1 to 128 characters are allowed, without slashes, control characters, or space at the ends", "subject_id"
        ) from error


def _top_k(text: str) -> int:
    try:
        return _TOP_K.validate_python(text)
    except ValidationError as error:
        raise _invalid(f"'{text[:20]}' is not a whole number from 1 to 100", "top_k") from error


def _once(key: str | None, method: str, subject_id: str, parts: Sequence[bytes]) -> IdempotencyKey | None:
    """The key with a digest of what it stands for: method, subject and the content of the parts in their order."""
    if key is None:
        return None
    if not KEY.fullmatch(key):
        raise _invalid("1 to 255 visible ASCII characters are allowed", "Idempotency-Key")
    digest = hashlib.sha256(f"{method}\0{subject_id}\0".encode())
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return IdempotencyKey(key, digest.digest())


def _cursor(position: int) -> str:
    return base64.urlsafe_b64encode(b"p%d" % position).decode().rstrip("=")


def _position(cursor: str | None) -> int:
    if cursor is None:
        return 0
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        text = b""
    if not re.fullmatch(rb"p[0-9]{1,18}", text):
        raise _invalid("this is not a cursor; take next_cursor of the page before, or leave it out", "cursor")
    return int(text[1:])
