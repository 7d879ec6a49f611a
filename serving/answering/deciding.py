"""Identify, verify, embed, without the web framework: from what was sent to vectors, the gallery, and the answer.

What embeds images, or takes long to read, is called by the API in a thread of its pool.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from serving.answering.collections import Collection
from serving.errors import ApiError, invalid
from serving.gallery import Identification, Probe
from serving.images.models import Vectors, mean
from serving.images.vectors import Crop, told
from serving.settings import Settings
from serving.storage.changes import Metadata
from serving.threshold import Rule
from serving.wire import requests, schemas
from serving.wire.parsing import RAW, Sent, as_request, face_of, known, read_json
from trainer.errors import UserError
from trainer.evaluation.curve import HIGHEST_RATE


@dataclass(frozen=True)
class Asked:
    """What a request for identification asks: whom to search for, and of how many samples each is the mean."""

    probes: list[Probe]
    samples: list[int]
    below: bool
    fpir: float | None
    where: Metadata | None
    crops: Sequence[Crop] = ()  # of the images, in order
    faces: bool = False  # each crop is a probe of its own, unless its quality is too low


def asked(collection: Collection, sent: Sent) -> Asked:
    """One probe: an image or embedding, or several of the same person."""
    model, most = collection.model, collection.settings.max_images
    if sent.document is None or sent.kind == RAW:
        options = as_request(requests.FormOptions, sent.fields)
        if sent.document is None:
            return _of_images(collection, options, sent)
        rows_BD = model.raw(sent.document, sent.fields.get("model_id"), "embeddings", most)
        return _asked(collection, options, rows_BD, [len(rows_BD)])
    body = read_json(requests.IdentifyRequest, sent.document)
    rows_BD = model.vectors(body.rows, body.model_id, "embedding")
    return _asked(collection, body, rows_BD, [len(rows_BD)])


def _of_images(collection: Collection, options: requests.FormOptions, sent: Sent) -> Asked:
    """The faces of a photograph, each a probe; or several images of one person."""
    photograph = collection.settings.detector is not None and len(sent.files["image"]) == 1
    which = options.face or ("all" if photograph else "only")
    crops = collection.model.crops(sent.files, "image", which=which)
    if which == "all":
        if len(sent.files["image"]) > 1:
            raise invalid(("face", "several images are of one person; send face=only, face=largest, or one image"))
        rows_BD = np.stack([crop.vector_D for crop in crops if not crop.faults])
        return _asked(collection, options, rows_BD, [1] * len(rows_BD), crops, faces=True)
    return _asked(collection, options, np.stack([crop.vector_D for crop in crops]), [len(crops)], crops)


def asked_many(collection: Collection, sent: Sent) -> Asked:
    """Many probes: an image or embedding each, or in JSON several."""
    model, settings = collection.model, collection.settings
    if sent.document is None or sent.kind == RAW:
        options = as_request(requests.FormOptions, sent.fields)
        crops = list[Crop]()
        if sent.document is None:
            crops = model.crops(sent.files, "images", which=face_of(sent))
            rows_BD = np.stack([crop.vector_D for crop in crops])
        else:
            rows_BD = model.raw(sent.document, sent.fields.get("model_id"), "embeddings", settings.max_probes)
        return _asked(collection, options, rows_BD, [1] * len(rows_BD), crops)
    body = read_json(requests.IdentifyManyRequest, sent.document)
    rows = [row for probe in body.probes for row in probe.rows]
    return _asked(
        collection, body, model.vectors(rows, body.model_id, "probes"), [len(probe.rows) for probe in body.probes]
    )


def _asked(
    collection: Collection,
    options: requests.Options,
    rows_BD: Vectors,
    samples: list[int],
    crops: Sequence[Crop] = (),
    faces: bool = False,
) -> Asked:
    probes = np.split(rows_BD, np.cumsum(samples[:-1])) if len(samples) > 1 else [rows_BD]
    found = [Probe(mean(one_BD, "embeddings"), options.top_k) for one_BD in probes]
    below = _may_see_below(collection, options.below_threshold)
    return Asked(found, samples, below, options.fpir, options.where, crops, faces)


def narrowed(collection: Collection, asked: Asked) -> Asked:
    """The same, to be searched for among the subjects of its filter only. Waits for the disk."""
    if asked.where is None:
        return asked
    among = collection.gallery.matching(asked.where)
    return replace(asked, probes=[replace(probe, among=among) for probe in asked.probes])


def identified(
    collection: Collection, asked: Asked, found: Sequence[Identification], request_id: str
) -> schemas.IdentifyAnswer:
    """The answer to an identification of one probe, or of each face in a photograph."""
    every = [_identified(collection, asked, one, samples) for one, samples in zip(found, asked.samples, strict=True)]
    if not asked.faces:
        return schemas.IdentifyAnswer(**every[0], images=told(asked.crops), **collection.signed(request_id))
    searched, faces = iter(every), []
    for crop, face in zip(asked.crops, told(asked.crops), strict=True):
        one = {"candidates": [], "decision": None} if crop.faults else next(searched)
        of_it = {name: one[name] for name in ("candidates", "decision")}
        faces.append(schemas.FaceAnswer(face=face, **of_it))
    images = [next(answer.face for answer in faces if answer.decision is not None)]
    return schemas.IdentifyAnswer(**every[0], images=images, faces=faces, **collection.signed(request_id))


def identified_many(
    collection: Collection, asked: Asked, found: Sequence[Identification], request_id: str
) -> schemas.IdentifyManyAnswer:
    """The answer to an identification of many."""
    images = [[image] for image in told(asked.crops)] or [[]] * len(found)
    results = [
        schemas.Identified(**_identified(collection, asked, one, samples), images=of_it)
        for one, samples, of_it in zip(found, asked.samples, images, strict=True)
    ]
    return schemas.IdentifyManyAnswer(results=results, **collection.signed(request_id))


def _identified(collection: Collection, asked: Asked, found: Identification, samples: int) -> dict[str, Any]:
    rule, size, best = found.rule, found.gallery_size, found.candidates[0] if found.candidates else None
    if asked.fpir is not None:
        rule = _rule_for(collection.settings, collection.gallery.identify_rule, size, asked.fpir)
    decision = "match" if best is not None and rule.matches(best.score) else "unknown"
    collection.metrics.decisions.labels("identify", decision).inc()
    if best is not None:
        collection.metrics.scores.observe(best.score)
        collection.drift.observe(best.score, rule.value, size)
    shown = [one for one in found.candidates if asked.below or rule.matches(one.score)]
    return {
        "candidates": [
            schemas.CandidateAnswer(**vars(one), mate_probability=collection.model.mate_probability(one.score, size))
            for one in shown
        ],
        "decision": decision,
        "threshold": rule.value,
        "threshold_source": rule.explain(size),
        "extrapolated": rule.extrapolated,
        "fpir_target": rule.rate,
        "fpir_interval": rule.interval,
        "fpir_expected": rule.rate_at(size),
        "gallery_size": size,
        "calibrated_gallery_size": rule.gallery_size,
        "probe_samples": samples,
    }


def _rule_for(settings: Settings, rule: Rule, size: int, fpir: float) -> Rule:
    """The rule for an FPIR that a request chooses, within what the calibration knows and the operator allows."""
    if settings.below_threshold == "never" and rule.rate is not None and fpir > rule.rate:
        message = f"this service shows no candidates beyond its own FPIR of {rule.rate:g}; choose that one or a lower"
        raise ApiError(403, "below_threshold_hidden", message, {"sent": fpir, "highest": rule.rate})
    try:
        return rule.at(size, fpir)
    except UserError as error:
        lowest = rule.lowest(size)
        known = f"{lowest:.2g} to {HIGHEST_RATE:g}" if lowest else f"{rule.rate:g}" if rule.rate else "none"
        message = f"FPIR {fpir:g} is not known with {size} enrolled; the calibration knows {known}: choose one of these"
        facts = {"sent": fpir, "lowest": lowest, "highest": HIGHEST_RATE if lowest else None, "calibrated": rule.rate}
        raise ApiError(422, "fpir_not_known", message, facts) from error


def verify(collection: Collection, sent: Sent, request_id: str, about: list[str]) -> schemas.VerifyAnswer:
    """Compare a probe with a reference, or with an enrolled subject, who is put into `about` even if not found."""
    model, gallery = collection.model, collection.gallery
    vectors, subject_id, crops = _compared(collection, sent)
    if subject_id is None:
        found = gallery.verify(vectors[0], vectors[1])
    else:
        about.append(subject_id := known(subject_id))
        found = gallery.verify_subject(vectors[0], subject_id)
    collection.metrics.decisions.labels("verify", found.decision).inc()
    rule = gallery.verify_rule
    return schemas.VerifyAnswer(
        score=found.score,
        decision=found.decision,
        threshold=rule.value,
        threshold_source=rule.source,
        fmr_target=rule.rate,
        fmr_interval=rule.interval,
        mate_probability=model.mate_probability(found.score),
        subject_id=subject_id,
        sample_id=found.sample_id,
        images=told(crops),
        **collection.signed(request_id),
    )


def _compared(collection: Collection, sent: Sent) -> tuple[Vectors, str | None, list[Crop]]:
    """The probe's vector and the reference's, or the probe's alone and the subject that it is compared with; and the
    images that they were made of."""
    model = collection.model
    if sent.document is None:
        subject_id = sent.fields.get("subject_id")
        if (subject_id is None) != ("reference" in sent.files):
            raise invalid(("reference", "give either a 'reference' image or a 'subject_id'"))
        crops = model.crops(sent.files, "probe", "reference", which=face_of(sent))
        return np.stack([crop.vector_D for crop in crops]), subject_id, crops
    if sent.kind == RAW:
        subject_id = sent.fields.get("subject_id")
        vectors = model.raw(sent.document, sent.fields.get("model_id"), "probe and reference", 2)
        if (len(vectors) == 1) != (subject_id is not None):
            raise invalid(("", "send a probe and a reference, or a probe alone and ?subject_id="))
        return vectors, subject_id, []
    body = read_json(requests.VerifyRequest, sent.document)
    both = [body.probe] if body.reference is None else [body.probe, body.reference]
    return model.vectors(both, body.model_id, "probe and reference"), body.subject_id, []


def embed(collection: Collection, sent: Sent) -> list[Crop]:
    """Unit vectors of images, or of the faces in them."""
    return collection.model.crops(sent.files, "images", which=face_of(sent, "all"))


def embedded(collection: Collection, crops: Sequence[Crop], request_id: str) -> schemas.EmbedAnswer:
    """The answer as JSON."""
    rows, dimension = [crop.vector_D.tolist() for crop in crops], collection.model.dimension
    return schemas.EmbedAnswer(
        embeddings=rows, dimension=dimension, images=told(crops), **collection.signed(request_id)
    )


def _may_see_below(collection: Collection, asked: bool) -> bool:
    """Whether an answer shows candidates below the threshold."""
    rule = collection.settings.below_threshold
    if asked and rule == "never":
        message = "this service does not show candidates below the threshold; leave below_threshold out"
        raise ApiError(403, "below_threshold_hidden", message)
    return asked or rule == "always"
