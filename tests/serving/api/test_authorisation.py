"""The authorisation matrix: every route of the service against every scope, and every state of a key."""

import itertools
import signal
import time

import pytest
from fastapi.routing import iter_route_contexts

from serving.access.keys import keys_path, opened
from serving.access.scopes import DEFAULT_COLLECTION, Scope
from serving.api import create_app
from serving.api.routing import ScopedRoute
from serving.settings import from_values
from serving.storage.mark import asked_for_keys
from tests.serving.conftest import Server

# What is meant, written by hand. A route that is not here makes the first test fail.
POLICY = {
    **{
        f"{method} {start}{path}": (scope, "collection")
        for start in ("/v1", "/v1/collections/{collection}")
        for method, path, scope in (
            ("POST", "/verify", "read"),
            ("POST", "/identify", "read"),
            ("POST", "/identify/batch", "read"),
            ("POST", "/embed", "read"),
            ("GET", "/subjects", "read"),
            ("GET", "/subjects/{subject_id}", "read"),
            ("PATCH", "/subjects/{subject_id}", "enrol"),
            ("POST", "/subjects/{subject_id}/merge", "enrol"),
            ("GET", "/subjects/{subject_id}/samples/{sample_id}", "read"),
            ("GET", "/subjects/{subject_id}/samples/{sample_id}/image", "read"),
            ("DELETE", "/subjects/{subject_id}/samples/{sample_id}", "enrol"),
            ("POST", "/duplicates", "admin"),
            ("DELETE", "/subjects/{subject_id}", "enrol"),
            ("POST", "/subjects/{subject_id}/samples", "enrol"),
            ("PUT", "/subjects/{subject_id}/samples", "enrol"),
            ("POST", "/samples", "enrol"),
        )
    },
    "GET /v1/collections": ("read", "own"),
    "POST /v1/collections": ("admin", "own"),
    "GET /v1/collections/{collection}": ("read", "collection"),
    "DELETE /v1/collections/{collection}": ("admin", "collection"),
    "GET /v1/jobs": ("admin", "own"),
    "GET /v1/jobs/{job_id}": ("admin", "own"),
    "DELETE /v1/jobs/{job_id}": ("admin", "own"),
    "GET /v1/audit": ("audit", "service"),
    "GET /healthz": None,
    "GET /readyz": None,
    "GET /metrics": ("audit", "service"),
}
VALUES = {"collection": DEFAULT_COLLECTION, "subject_id": "nobody", "sample_id": "0" * 32, "job_id": "0" * 32}
# Keys that are refused whatever they are for, and with which code.
REFUSED = {"none": "key_missing", "wrong": "key_wrong", "expired": "key_expired", "revoked": "key_wrong"}


@pytest.fixture(scope="module")
def server(embedder, tmp_path_factory):
    running = Server(embedder=embedder, store=tmp_path_factory.mktemp("s") / "s", wrong_keys_a_minute=10_000)
    yield running
    running.kill()


@pytest.fixture(scope="module")
def keys(server):
    """A key for each scope and for: all collections, the right one, another one; and those that are no good."""
    made = {"none": "", "wrong": f"hsk_{12 * '0'}_{64 * '0'}"}
    with opened(keys_path(server.store), make=True) as file:
        reaches = {"all": None, "right": [DEFAULT_COLLECTION], "other": ["other"]}
        for scope, (reach, collections) in itertools.product(Scope, reaches.items()):
            made[f"{scope} {reach}"] = file.create("a test", [scope], collections)
        made["expired"] = file.create("a test", list(Scope), lifetime_s=-1)
        made["revoked"] = file.create("a test", list(Scope))
        file.revoke(made["revoked"].split("_")[1])
        made["rotated"] = file.create("a test", list(Scope))
        made["every scope"] = file.rotate(made["rotated"].split("_")[1], 3600)
    last = {"X-API-Key": made["every scope"]}
    while server.http.get("/metrics").status_code != 401 or server.http.get("/readyz", headers=last).status_code != 200:
        time.sleep(0.05)  # until the service has taken the file into use, and has read what was written last
    return made


def test_every_route_is_in_the_policy(embedder, tmp_path):
    app = create_app(from_values({"embedder": embedder, "store": tmp_path / "s"}))
    found = {}
    for context in iter_route_contexts(app.routes):
        route = context.original_route
        if isinstance(route, ScopedRoute):
            needed = route.needs
            meant = None if needed.scope is None else (str(needed.scope), needed.of)
            found |= {f"{method} {context.path}": meant for method in context.methods}
    app.state.service.close()
    assert found == POLICY


@pytest.mark.parametrize("route", POLICY)
def test_a_route_against_every_key(server, keys, route):
    method, path = route.split()
    for name, token in keys.items():
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        answer = server.http.request(method, path.format(**VALUES), headers=headers)
        code = answer.json()["error"]["code"] if answer.status_code in (401, 403, 404) else ""
        asked_for = POLICY[route]
        if asked_for is None:
            opens = path != "/readyz" or name not in REFUSED or name == "none"
            assert answer.status_code == (200 if opens else 401), (name, answer.text)
            knows = name in ("rotated", "every scope") or name.endswith(" all")  # how much is enrolled
            assert ("gallery_size" in answer.text) == (path == "/readyz" and knows), name
            continue
        scope, of = asked_for
        if name in REFUSED:
            assert (answer.status_code, code) == (401, REFUSED[name]), name
        elif name not in ("rotated", "every scope") and name.split()[0] != scope:
            assert (answer.status_code, code) == (403, "scope_missing"), name
        elif (name.endswith(" other") and of != "own") or (name.endswith(" right") and of == "service"):
            assert (answer.status_code, code) == (403, "collection_refused"), name
        else:
            assert answer.status_code not in (401, 403, 405, 429, 500), (name, answer.text)
            assert code != "no_route"


def test_a_service_whose_file_of_keys_is_lost_does_not_start(serve, tmp_path):
    store = tmp_path / "faces.db"
    with opened(tmp_path / "faces.db-keys", make=True) as file:
        file.create("a test", [Scope.READ])
    server, mark = serve(store=store), tmp_path / "faces.db-mark"
    end = time.monotonic() + 10
    while not asked_for_keys(mark) and time.monotonic() < end:
        time.sleep(0.05)
    server.end(signal.SIGTERM)
    (tmp_path / "faces.db-keys").unlink()
    with pytest.raises(AssertionError, match=r"faces\.db-keys' is missing; put it back"):
        serve(store=store)
    serve(store=store, anonymous=True)
