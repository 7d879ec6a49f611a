"""The routes of jobs: look for duplicates, how far a job is, cancel it."""

from fastapi import Request, Response

from serving.access.scopes import needs
from serving.answering.jobs import Job
from serving.api.bodies import read_document
from serving.api.requests import Key, Routes, SingleRoutes, change, collection_of, compute, service_of
from serving.wire import openapi, operations, requests
from serving.wire.parsing import idempotency_key, read_json

starting = Routes("jobs")
jobs = SingleRoutes("jobs")


@starting.post("/duplicates", status_code=202, openapi_extra=openapi.DUPLICATES)
@needs("admin")
async def find_duplicates(request: Request, response: Response, key: Key = None) -> operations.JobAnswer:
    """Look for subjects who look like one another, in the background; searches go first."""
    collection, service = collection_of(request), service_of(request)
    document = await read_document(request)
    body = read_json(requests.DuplicatesRequest, document)
    once = idempotency_key(key, "POST duplicates", collection.name, [document])
    job = await change(request, response, lambda: service.jobs.start(collection, body.threshold, body.limit, once))
    response.headers["location"] = f"/v1/jobs/{job.job_id}"
    return _described(request, job)


@jobs.get("/v1/jobs", name="jobs")
@needs("admin", of="own")
async def list_(request: Request) -> operations.JobsAnswer:
    """The jobs since the service was started, without what they found."""
    reaches = request.state.caller.reaches
    found = [_facts(job) for job in service_of(request).jobs.all() if reaches(job.collection)]
    return operations.JobsAnswer(jobs=found, request_id=request.state.request_id)


@jobs.get("/v1/jobs/{job_id}", name="job")
@needs("admin", of="own")
async def get(request: Request, job_id: str) -> operations.JobAnswer:
    """How far a job is, and what it has found so far."""
    job = _job(request, job_id)
    answer = await compute(request, lambda: _described(request, job))
    request.state.subjects = list(dict.fromkeys(person for pair in answer.pairs for person in pair.subject_ids))
    return answer


@jobs.delete("/v1/jobs/{job_id}", status_code=204)
@needs("admin", of="own")
async def cancel_job(request: Request, job_id: str) -> None:
    """End a job; what it had found stays. One that has ended stays as it is."""
    service_of(request).jobs.cancel(_job(request, job_id))


def _job(request: Request, job_id: str) -> Job:
    """A job on a collection that the caller's key reaches; another one is not there for it. Raises ApiError 404."""
    found = service_of(request).jobs.get(job_id, request.state.caller.reaches)
    request.state.collection = found.collection
    return found


def _facts(job: Job) -> operations.JobFacts:
    return operations.JobFacts.model_validate(job, from_attributes=True)


def _described(request: Request, job: Job) -> operations.JobAnswer:
    """Pairs of whom one was erased meanwhile are not told."""
    found, holds = job.pairs.best(job.most), job.of.gallery.holds
    pairs = [
        operations.DuplicateAnswer(subject_ids=pair, score=score) for pair, score in found if all(map(holds, pair))
    ]
    truncated = job.pairs.truncated or len(job.pairs.scores) > job.most
    facts = _facts(job).model_dump()
    return operations.JobAnswer(**facts, pairs=pairs, truncated=truncated, request_id=request.state.request_id)
