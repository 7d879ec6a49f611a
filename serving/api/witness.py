"""The witness: an ASGI middleware that writes every request with a caller into the audit log, before it is answered.

An answer to a change goes when its line is on the disk; where the disk refuses the line, 503 goes in its place.
"""

import asyncio
import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.access.audit import AuditLog, Event
from serving.access.scopes import COLLECTION, DEFAULT_COLLECTION
from serving.access.scopes import Scope as Need
from serving.api.routing import ScopedRoute
from serving.api.security import as_response
from serving.errors import ApiError

NAME = re.compile(f"(?:{COLLECTION})?")  # whatever else a client sends as one stays out of the log
CHANGING = frozenset({Need.ENROL, Need.ADMIN})


class Witness:
    """Sees what the Guard has let in.

    A route says in `request.state.subjects` whom it was about beside its path, and in `request.state.collection` about
    which collection, where its path does not.
    """

    def __init__(self, app: ASGIApp, audit: AuditLog) -> None:
        self._app, self._audit = app, audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["state"]["audit"] = self._audit  # which the route asks before anything is done
        seen = refused = False

        async def answer(message: Message) -> None:
            nonlocal seen, refused
            if message["type"] == "http.response.start":
                seen, refused = True, not await self._noted(scope, message["status"])
                if refused:
                    told = "the audit log cannot be written, so that nobody can tell whether this was done; ask again"
                    error = ApiError(503, "audit_unavailable", told, headers={"retry-after": "5"})
                    await as_response(error, scope["state"]["request_id"])(scope, receive, send)
            if not refused:
                await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            if not seen:  # a fault of the program, or a client that has gone
                await self._noted(scope, 500)

    async def _noted(self, scope: Scope, status: int) -> bool:
        """Whether the answer may go. What no route of ours was asked for, or an open one, is not of interest."""
        route = scope.get("route")
        if not isinstance(route, ScopedRoute) or (needed := route.needs.scope) is None:
            return True
        state, named = scope["state"], scope["path_params"]
        subjects = [*([named["subject_id"]] if "subject_id" in named else []), *state.get("subjects", ())]
        usual = DEFAULT_COLLECTION if route.needs.of == "collection" else ""
        collection = state.get("collection") or named.get("collection", usual)
        event = Event(
            at=time.time(),
            key_id=state["caller"].key_id,
            do=f"{scope['method']} {route.path}",
            collection=collection if NAME.fullmatch(collection) else "?",
            subjects=subjects,
            status=status,
            request_id=state["request_id"],
        )
        if needed not in CHANGING or status >= 400:
            self._audit.note(event)
            return True
        try:
            await asyncio.wrap_future(self._audit.keep(event))
        except OSError:
            return False
        return True
