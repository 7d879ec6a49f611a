"""Identify, verify, embed, without the web framework: from what was sent to vectors, the gallery, and the answer.

`probe` and `identified` are quick; the others compute, so the API calls them in a thread of its pool.
"""

from pydantic import TypeAdapter

from serving import schemas
from serving.collections import Collection
from serving.errors import ApiError, invalid
from serving.gallery import Identification, Probe
from serving.parsing import Sent, known, read_field, read_json

_TOP_K: TypeAdapter[int] = TypeAdapter(schemas.TopK)
_FLAG: TypeAdapter[bool] = TypeAdapter(bool)


def probe(collection: Collection, sent: Sent) -> tuple[Probe, bool]:
    """Whom an identification asks for, and whether its answer shows candidates below the threshold."""
    if sent.document is None:
        top_k = read_field(sent, "top_k", _TOP_K, "5", "not a whole number from 1 to 100")
        asked = read_field(sent, "below_threshold", _FLAG, "false", "neither true nor false")
        below = _may_see_below(collection, asked)
        (probe_D,) = collection.model.embed(sent.files, "image")
    else:
        body = read_json(schemas.IdentifyRequest, sent.document)
        top_k, below = body.top_k, _may_see_below(collection, body.below_threshold)
        (probe_D,) = collection.model.vectors([body.embedding], body.model_id, "embedding")
    return Probe(probe_D, top_k), below


def identified(collection: Collection, found: Identification, below: bool, request_id: str) -> schemas.IdentifyAnswer:
    """The answer to an identification."""
    collection.metrics.decisions.labels("identify", found.decision).inc()
    if found.candidates:
        collection.metrics.scores.observe(found.candidates[0].score)
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
        model_id=collection.model.model_id,
        request_id=request_id,
    )


def verify(collection: Collection, sent: Sent, request_id: str) -> schemas.VerifyAnswer:
    """Compare a probe with a reference, or with an enrolled subject."""
    model, gallery = collection.model, collection.gallery
    if sent.document is None:
        subject_id = sent.fields.get("subject_id")
        if (subject_id is None) != ("reference" in sent.files):
            raise invalid(("reference", "give either a 'reference' image or a 'subject_id'"))
        vectors = model.embed(sent.files, "probe", "reference")
    else:
        body = read_json(schemas.VerifyRequest, sent.document)
        subject_id = body.subject_id
        both = [body.probe] if body.reference is None else [body.probe, body.reference]
        vectors = model.vectors(both, body.model_id, "probe and reference")
    if subject_id is None:
        found = gallery.verify(vectors[0], vectors[1])
    else:
        subject_id = known(subject_id)
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
        model_id=model.model_id,
        request_id=request_id,
    )


def embed(collection: Collection, sent: Sent, request_id: str) -> schemas.EmbedAnswer:
    """Unit vectors of images."""
    model = collection.model
    rows = model.embed(sent.files, "images").tolist()
    return schemas.EmbedAnswer(
        embeddings=rows, dimension=model.dimension, model_id=model.model_id, request_id=request_id
    )


def _may_see_below(collection: Collection, asked: bool) -> bool:
    """Whether an answer shows candidates below the threshold."""
    rule = collection.settings.below_threshold
    if asked and rule == "never":
        message = "this service does not show candidates below the threshold; leave below_threshold out"
        raise ApiError(403, "below_threshold_hidden", message)
    return asked or rule == "always"
