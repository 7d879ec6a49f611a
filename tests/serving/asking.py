"""Requests to the service that many tests make, and the one shape of its refusals."""

import itertools

identities = itertools.count(1000)  # every test has people of its own


def file(content, name="image"):
    return (name, ("photo.png", content, "image/png"))


def enrol(server, subject_id, *images, **options):
    return server.http.post(f"/v1/subjects/{subject_id}/samples", files=[file(i, "images") for i in images], **options)


def identify(server, image, **fields):
    return server.http.post("/v1/identify", files=[file(image)], data=fields)


def refused(answer, status, code):
    """Every error has one shape, and its request id in the header too."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error", "request_id"}
    assert set(body["error"]) == {"code", "message", "details"}
    assert body["error"]["code"] == code
    assert body["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    return body["error"]
