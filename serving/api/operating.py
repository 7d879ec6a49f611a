"""The routes for operators: alive, ready, metrics, the audit log."""

import functools
from typing import Annotated

from fastapi import Query, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from serving.access import chain
from serving.access.audit import AuditLog
from serving.access.scopes import needs
from serving.api.requests import SingleRoutes, compute, service_of
from serving.errors import ApiError, invalid
from serving.wire import operations, schemas

operating = SingleRoutes("operate")


@operating.get("/healthz")
@needs(None)
async def healthz() -> operations.HealthAnswer:
    """The process is alive. Touches nothing else."""
    return operations.HealthAnswer()


@operating.get("/readyz", response_model_exclude_none=True)
@needs(None)
async def readyz(request: Request) -> operations.ReadyAnswer:
    """The stores answer and the indexes are in step with them; 503 otherwise. Without the key it says no more."""
    return service_of(request).ready(request.state.trusted, request.state.request_id)


@operating.get("/v1/audit")
@needs("audit", of="service")
async def audit(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1000, description="lines a page")] = 100,
    cursor: Annotated[str, Query(pattern=r"^\d{1,9}-\d{1,18}$", description="next_cursor of the page before")] = "0-0",
) -> schemas.AuditAnswer:
    """The audit log: who did what, in pages, the oldest line first. Subjects stand in it as pseudonyms."""
    log: AuditLog | None = request.app.state.audit
    if log is None:
        raise ApiError(404, "no_audit", "this service keeps no audit log; its operator can with --audit FOLDER")
    file, offset = map(int, cursor.split("-"))
    try:
        lines, place = await compute(
            request, functools.partial(chain.page, log.folder, chain.Place(file, offset), limit)
        )
    except ValueError as error:
        raise invalid(("cursor", f"{error}; take next_cursor of the page before, or leave it out")) from error
    return schemas.AuditAnswer(
        lines=[schemas.AuditLine(**line) for line in lines],
        next_cursor=f"{place.file}-{place.offset}",
        request_id=request.state.request_id,
    )


@operating.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
@needs("audit", of="service")
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)
