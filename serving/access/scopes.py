"""Scopes: what a key may be used for, what each route asks of it, and who is asking."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, TypeVar

from serving.errors import ApiError

COLLECTION = r"[a-z0-9][a-z0-9_-]{0,62}"  # the name of one, and of its file
DEFAULT_COLLECTION = "default"  # that of the routes that name none
_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])


class Scope(StrEnum):
    """`enrol` does not include `read`, nor `admin` the others: a camera's key need not be able to list people."""

    READ = "read"  # compare, search, list; changes nothing
    ENROL = "enrol"  # add, change and erase subjects and their samples
    ADMIN = "admin"  # make and drop collections, and jobs over them
    AUDIT = "audit"  # watch the service: metrics and the audit log


@dataclass(frozen=True)
class Needs:
    """What a route asks of whoever asks it.

    Attributes:
        scope: None for a route that is open to everybody.
        of: `collection`: the one that the path names, or else `default`. `service`: all of them. `own`: the route
            itself answers for those collections only that the caller `reaches`.
    """

    scope: Scope | None
    of: Literal["collection", "service", "own"] = "collection"


@dataclass(frozen=True)
class Caller:
    """Who is asking. `collections`: None for all."""

    key_id: str
    scopes: frozenset[Scope] = frozenset(Scope)
    collections: frozenset[str] | None = None

    def reaches(self, collection: str) -> bool:
        return self.collections is None or collection in self.collections


ANONYMOUS = Caller("anonymous")  # where the service asks for no key


def needs(
    scope: Literal["read", "enrol", "admin", "audit"] | None,
    of: Literal["collection", "service", "own"] = "collection",
) -> Callable[[_Endpoint], _Endpoint]:
    """Declares what the route below it needs; every route has one."""
    needed = Needs(None if scope is None else Scope(scope), of)

    def declare(endpoint: _Endpoint) -> _Endpoint:
        endpoint.needs = needed  # type: ignore[attr-defined]
        return endpoint

    return declare


def declared(endpoint: Callable[..., Any]) -> Needs:
    """Raises TypeError where a route declares nothing: it must not be served."""
    found = getattr(endpoint, "needs", None)
    if not isinstance(found, Needs):
        raise TypeError(f"the route '{endpoint.__name__}' does not declare what it needs: put @needs(...) above it")
    return found


def authorise(caller: Caller, needed: Needs, collection: str) -> None:
    """Raises ApiError 403 where the caller's key is not for this. `collection`: that of the path."""
    if needed.scope is None:
        return
    if needed.scope not in caller.scopes:
        have = ", ".join(sorted(caller.scopes)) or "none"
        told = f"this needs a key with the scope '{needed.scope}', and yours has: {have}; ask the operator for another"
        raise ApiError(403, "scope_missing", told, {"needs": needed.scope})
    if needed.of == "collection" and not caller.reaches(collection):
        told = "your key is not for this collection; ask the operator for one that is"
        raise ApiError(403, "collection_refused", told)  # the same whether or not it exists
    if needed.of == "service" and caller.collections is not None:
        told = (
            "this is about the whole service, and your key is for some collections only; ask the operator for another"
        )
        raise ApiError(403, "collection_refused", told)
