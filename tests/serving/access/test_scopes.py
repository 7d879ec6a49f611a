"""What keys are for: every route of the service against every scope and collection."""

import pytest
from fastapi import APIRouter, FastAPI

from serving.access.scopes import ANONYMOUS, Caller, Needs, Scope, authorise
from serving.api.routing import ScopedRoute, refuse_undeclared
from serving.errors import ApiError
from serving.wire.openapi import OPEN_PATHS


def test_a_route_that_declares_nothing_is_not_served():
    async def forgotten():
        raise AssertionError

    with pytest.raises(TypeError, match="forgotten"):
        APIRouter(route_class=ScopedRoute).get("/forgotten")(forgotten)
    app, plain = FastAPI(), APIRouter()
    plain.get("/forgotten")(forgotten)
    app.include_router(plain)
    with pytest.raises(TypeError, match="/forgotten"):
        refuse_undeclared(app.routes, OPEN_PATHS)


@pytest.mark.parametrize("scope", Scope)
def test_a_scope_includes_no_other(scope):
    for other in Scope:
        if other is scope:
            authorise(Caller("k", frozenset({scope})), Needs(other), "faces")
        else:
            with pytest.raises(ApiError, match=f"scope '{other}'"):
                authorise(Caller("k", frozenset({scope})), Needs(other), "faces")


@pytest.mark.parametrize(
    ("of", "collection", "allowed"),
    [
        *(("collection", "faces", True), ("collection", "cars", False), ("collection", "default", False)),
        *(("service", "faces", False), ("own", "cars", True)),
    ],
)
def test_a_key_for_one_collection(of, collection, allowed):
    caller = Caller("k", frozenset(Scope), frozenset({"faces"}))
    if allowed:
        authorise(caller, Needs(Scope.READ, of), collection)
    else:
        with pytest.raises(ApiError) as refused:
            authorise(caller, Needs(Scope.READ, of), collection)
        assert (refused.value.status, refused.value.code) == (403, "collection_refused")
    authorise(ANONYMOUS, Needs(Scope.READ, of), collection)
