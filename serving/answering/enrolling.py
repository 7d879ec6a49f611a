"""Enrolment, without the web framework: what was sent to a change of the gallery, and its answer.

Every function computes or waits for the disk, so the API calls it in a thread of its pool. Those that change something
also give whether it is the answer of an earlier request with the same idempotency key.
"""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from serving.answering.bulk import items
from serving.answering.collections import Collection
from serving.errors import ApiError, invalid
from serving.images.vectors import Crop, told
from serving.storage.changes import Attached, Enrolment, SubjectFull
from serving.storage.metadata import MetadataRefused, encode
from serving.wire import requests, schemas
from serving.wire.parsing import RAW, Sent, as_request, enrollable, face_of, idempotency_key, read_json

Vectors = NDArray[np.float32]


def enrol(
    collection: Collection, subject_id: str, sent: Sent, key: str | None, request_id: str, expected: int | None = None
) -> tuple[schemas.EnrolAnswer, bool]:
    """Add samples to a subject: new or known, or known and still at the revision that is expected."""
    subject_id, model, gallery = enrollable(subject_id), collection.model, collection.gallery
    most = collection.settings.max_images
    parts = sent.files["images"] if sent.document is None else [sent.document]
    if sent.fields:
        parts = [*parts, json.dumps(sent.fields, sort_keys=True).encode()]
    once = idempotency_key(key, "PUT", subject_id, parts)  # for POST, too: both verbs are one request
    done = gallery.replay(once, subject_id) if once else None
    crops = list[Crop]()
    if sent.document is None:  # also of a replay, which is answered alike
        crops = model.crops(sent.files, "images", which=face_of(sent))
    if done is None:
        body, images = None, list[bytes]()
        if sent.document is None:
            vectors_BD = np.stack([crop.vector_D for crop in crops])
            images = sent.files["images"] if collection.settings.keep_images else []
        elif sent.kind == RAW:
            vectors_BD = model.raw(sent.document, sent.fields.get("model_id"), "embeddings", most)
        else:
            body = read_json(requests.EnrolRequest, sent.document)
            vectors_BD = model.vectors(body.embeddings, body.model_id, "embeddings")
        attached = _attached(sent, body, images, len(vectors_BD))
        if crops:
            attached = replace(attached, qualities=[crop.worth for crop in crops])
        with collection.metrics.stage("store"):
            done = gallery.enrol(subject_id, vectors_BD, once, attached, expected)
    answer = schemas.EnrolAnswer(
        subject_id=done.subject_id,
        samples=[schemas.SampleAnswer(sample_id=sample_id) for sample_id in done.sample_ids],
        subject_created=done.subject_created,
        subject_samples=done.subject_samples,
        gallery_size=done.gallery_size,
        revision=done.revision,
        images=told(crops),
        **collection.signed(request_id),
    )
    return answer, done.replayed


def enrol_many(collection: Collection, sent: Sent, key: str | None, request_id: str) -> tuple[schemas.BulkAnswer, bool]:
    """Add samples to many subjects in one change; an item that is refused leaves the others alone."""
    once = idempotency_key(key, "POST", "", [sent.document or b""])
    model, gallery, most = collection.model, collection.gallery, collection.settings.max_samples
    refused, good, names = dict[int, ApiError](), list[tuple[str, Vectors]](), list[str]()
    attached = list[Attached]()
    for item in items(sent, model.dimension):
        names.append(item.subject_id)
        try:
            vectors_BD = model.vectors(item.embeddings, item.model_id, "embeddings", most)
            name, more = enrollable(item.subject_id), checked(item.attached)
            good.append((name, vectors_BD))
            attached.append(more)
        except ApiError as error:
            refused[len(names) - 1] = error
    with collection.metrics.stage("store"):
        done = gallery.enrol_many(good, once, attached)
    outcomes = iter(done.results)
    results = [_bulk_result(name, refused.get(place) or next(outcomes)) for place, name in enumerate(names)]
    answer = schemas.BulkAnswer(
        results=results,
        enrolled=sum(result.status == "enrolled" for result in results),
        refused=sum(result.status == "refused" for result in results),
        gallery_size=done.gallery_size,
        **collection.signed(request_id),
    )
    return answer, done.replayed


def _attached(sent: Sent, body: requests.EnrolRequest | None, images: Sequence[bytes], count: int) -> Attached:
    """What comes along with the vectors. Raises ApiError 422."""
    if body is None:
        return checked(Attached(as_request(requests.EnrolFields, sent.fields).metadata, images=images))
    for name, values in (("qualities", body.qualities), ("sample_metadata", body.sample_metadata)):
        if len(values) not in (0, count):
            raise invalid((name, f"{len(values)} were sent for {count} embeddings; send one for each, or none"))
    return checked(Attached(body.metadata, body.qualities, body.sample_metadata))


def checked(attached: Attached) -> Attached:
    """Raises ApiError 422 where metadata is not what it may be."""
    try:
        for metadata in (attached.metadata or {}, *attached.samples):
            encode(metadata)
    except MetadataRefused as error:
        raise invalid(("metadata", str(error))) from error
    return attached


def _bulk_result(subject_id: str, outcome: Enrolment | SubjectFull | ApiError) -> schemas.BulkResult:
    if isinstance(outcome, Enrolment):
        samples = [schemas.SampleAnswer(sample_id=sample_id) for sample_id in outcome.sample_ids]
        return schemas.BulkResult(
            subject_id=subject_id, status="enrolled", samples=samples, subject_created=outcome.subject_created
        )
    error = ApiError(409, "too_many_samples", str(outcome)) if isinstance(outcome, SubjectFull) else outcome
    body = schemas.ErrorBody(code=error.code, message=error.message, details=dict(error.details))
    return schemas.BulkResult(subject_id=subject_id, status="refused", error=body)
