"""The class of all routes: refuses whoever may not, before anything of the request is read."""

from collections.abc import Callable, Container, Iterable
from typing import Any

from fastapi.routing import APIRoute, iter_route_contexts
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

from serving.access.scopes import DEFAULT_COLLECTION, authorise, declared
from serving.access.scopes import Scope as Need


class ScopedRoute(APIRoute):
    """A route whose endpoint says with `@needs(...)` what it asks of a key. The Guard has found out whose key it is."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        self.needs = declared(endpoint)
        super().__init__(path, endpoint, **options)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in (self.methods or ()):
            collection = scope["path_params"].get("collection", DEFAULT_COLLECTION)
            authorise(scope["state"]["caller"], self.needs, collection)
            audit = scope["state"].get("audit")
            if audit is not None and self.needs.scope not in (None, Need.AUDIT):
                audit.admit()
        await super().handle(scope, receive, send)


def refuse_undeclared(routes: Iterable[BaseRoute], but: Container[str]) -> None:
    """Raises TypeError where a route would be served to anybody. `but`: paths that are meant to be."""
    for found in iter_route_contexts(list(routes)):
        route = found.original_route
        if isinstance(route, APIRoute) and not isinstance(route, ScopedRoute) and route.path not in but:
            raise TypeError(f"the route {route.path} is not of an APIRouter(route_class=ScopedRoute)")
