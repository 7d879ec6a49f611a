"""The routes for operators: alive, ready, metrics."""

from fastapi import Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from serving import schemas
from serving.api.requests import SingleRoutes, service_of

operating = SingleRoutes("operate")


@operating.get("/healthz")
async def healthz() -> schemas.HealthAnswer:
    """The process is alive. Touches nothing else."""
    return schemas.HealthAnswer()


@operating.get("/readyz", response_model_exclude_none=True)
async def readyz(request: Request) -> schemas.ReadyAnswer:
    """The stores answer and the indexes are in step with them; 503 otherwise. Without the key it says no more."""
    return service_of(request).ready(request.state.trusted, request.state.request_id)


@operating.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)
