"""Subjects and single samples, without the web framework: what is read of the gallery, and changes to what is enrolled.

Every function waits for the disk, so the API calls it in a thread of its pool. Those that change something also give
whether it is the answer of an earlier request with the same idempotency key.
"""

import json
from typing import Any

from serving.answering.collections import Collection
from serving.answering.cursors import Cursors
from serving.errors import ApiError, invalid
from serving.storage.changes import (
    IdempotencyKey,
    Metadata,
    RevisionConflict,
    SampleRow,
    SubjectRow,
    SubjectUnknown,
    Update,
)
from serving.wire import requests, schemas
from serving.wire.parsing import idempotency_key, known, read_json

TRIES = 5  # of a change that is made of what was read before


def page(
    collection: Collection, cursor: str | None, limit: int, where: Metadata | None, request_id: str
) -> schemas.SubjectsAnswer:
    """A page of the enrolled subjects; with `where`, of those whose metadata has all of it."""
    gallery, cursors = collection.gallery, Cursors(collection.gallery.sign, where)
    rows = gallery.subjects(cursors.read(cursor), limit + 1, where)  # one more tells whether there is a next page
    return schemas.SubjectsAnswer(
        subjects=[schemas.SubjectAnswer.model_validate(row, from_attributes=True) for row in rows[:limit]],
        next_cursor=cursors.write(rows[limit - 1].position) if len(rows) > limit else None,
        gallery_size=gallery.size,
        **collection.signed(request_id),
    )


def describe(collection: Collection, subject_id: str, request_id: str) -> schemas.SubjectDetail:
    """A subject and what is known of its samples."""
    row, samples = collection.gallery.subject(known(subject_id))
    return schemas.SubjectDetail(
        **_told(row), samples=[_sample(sample) for sample in samples], **collection.signed(request_id)
    )


def sample(
    collection: Collection, subject_id: str, sample_id: str, embedding: bool, request_id: str
) -> schemas.SampleDetail:
    """What is known of a sample; with `embedding`, its vector too."""
    row, vector_D = collection.gallery.sample(known(subject_id), sample_id)
    told = vector_D.tolist() if embedding else None
    return schemas.SampleDetail(
        **_sample(row).model_dump(), subject_id=subject_id, embedding=told, **collection.signed(request_id)
    )


def image(collection: Collection, subject_id: str, sample_id: str) -> bytes:
    """The image that a sample was made of. Raises ApiError 404 where it was not kept."""
    found = collection.gallery.image(known(subject_id), sample_id)
    if found is None:
        told = f"no image of sample '{sample_id[:36]}' was kept; the operator says --keep-images for those to come"
        raise ApiError(404, "no_image", told)
    return found


def update(
    collection: Collection, subject_id: str, document: bytes, expected: int | None, key: str | None, request_id: str
) -> tuple[schemas.ChangeAnswer, bool]:
    """Change a subject's metadata by a merge patch (RFC 7396): what is null goes, what is not named stays."""
    subject_id, gallery = known(subject_id), collection.gallery
    patch = read_json(requests.SubjectPatch, document).metadata
    once = idempotency_key(key, "PATCH", subject_id, [document])
    for tries in range(TRIES):
        metadata, revision = _as_it_is(collection, subject_id)
        merged = {name: value for name, value in {**metadata, **patch}.items() if value is not None}
        try:
            done = gallery.update(subject_id, merged, once, revision if expected is None else expected)
        except RevisionConflict:
            if expected is not None or tries == TRIES - 1:
                raise
        else:
            return _changed(collection, done, request_id)
    raise AssertionError("the last try returns or raises")


def merge(
    collection: Collection, into: str, other: str, expected: int | None, key: str | None, request_id: str
) -> tuple[schemas.ChangeAnswer, bool]:
    """Make another subject's samples those of `into`; the other one is erased."""
    into, other = known(into), known(other)
    if other == into:
        raise invalid(("subject_id", f"'{other}' cannot be merged into itself; name another subject"))
    once = idempotency_key(key, "POST merge", into, [other.encode()])
    return _changed(collection, collection.gallery.merge(into, other, once, expected), request_id)


def delete(collection: Collection, subject_id: str, expected: int | None, key: str | None) -> tuple[None, bool]:
    """Erase a subject."""
    subject_id = known(subject_id)
    once = idempotency_key(key, "DELETE", subject_id, ())
    return None, collection.gallery.delete(subject_id, once, expected).replayed


def delete_sample(
    collection: Collection, subject_id: str, sample_id: str, expected: int | None, key: str | None
) -> tuple[None, bool]:
    """Erase one sample of a subject that has others."""
    subject_id = known(subject_id)
    once: IdempotencyKey | None = idempotency_key(key, "DELETE sample", subject_id, [sample_id.encode()])
    return None, collection.gallery.delete_sample(subject_id, sample_id, once, expected).replayed


def read_where(text: str | None) -> Metadata | None:
    """A filter from a query or a form. Raises ApiError 422."""
    if text is None:
        return None
    return read_json(requests.Where, json.dumps({"where": text}).encode()).where


def _as_it_is(collection: Collection, subject_id: str) -> tuple[Metadata, int]:
    """Metadata and revision; of nobody, what lets the store say so, or find what was done under the key before."""
    try:
        row, _ = collection.gallery.subject(subject_id)
    except SubjectUnknown:
        return {}, 0
    return row.metadata, row.revision


def _changed(collection: Collection, done: Update, request_id: str) -> tuple[schemas.ChangeAnswer, bool]:
    answer = schemas.ChangeAnswer(
        subject_id=done.subject_id,
        subject_samples=done.samples,
        revision=done.revision,
        **collection.signed(request_id),
    )
    return answer, done.replayed


def _told(row: SubjectRow) -> dict[str, Any]:
    return {name: value for name, value in vars(row).items() if name not in ("position", "samples")}


def _sample(row: SampleRow) -> schemas.SampleFacts:
    return schemas.SampleFacts.model_validate(row, from_attributes=True)
