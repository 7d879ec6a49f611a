"""What operators see of the service over HTTP: readiness, metrics, request ids, documentation."""

import re

import jsonschema

from tests.serving.asking import enrol, file, identify
from trainer.embedder import Embedder


def test_request_ids(server):
    answer = server.http.get("/readyz", headers={"X-Request-ID": "job-7.a_b"})
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "job-7.a_b"
    for bad in ("a b", "<script>", "a" * 65, ""):
        answer = server.http.get("/readyz", headers={"X-Request-ID": bad})
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def test_ready(server, embedder):
    answer = server.http.get("/readyz").json()
    assert (answer["status"], answer["model_id"]) == ("ready", Embedder.open(embedder).model_id)
    answer = server.http.get("/healthz")
    assert answer.json() == {"status": "alive"}
    assert (answer.headers["cache-control"], answer.headers["x-content-type-options"]) == ("no-store", "nosniff")


def _metric(server, name, **labels):
    text = server.http.get("/metrics").text
    wanted = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    pattern = "^" + re.escape(name + (f"{{{wanted}}}" if labels else "")) + r" (\S+)$"
    found = re.search(pattern, text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_metrics_count(serve, photos):
    server = serve()
    enrol(server, "alice", photos(1), photos(1, 1))
    for person in (1, 1, 2):
        identify(server, photos(person, 5))
    server.http.post("/v1/verify", files=[file(photos(1), "probe"), file(photos(2), "reference")])
    server.http.get("/secret/alice")
    server.http.delete("/v1/subjects/alice")
    count = "hypersphere_requests_total"
    assert _metric(server, count, route="/v1/identify", method="POST", status="200") == 3
    assert _metric(server, count, route="/v1/subjects/{subject_id}/samples", method="POST", status="201") == 1
    assert _metric(server, count, route="/v1/subjects/{subject_id}", method="DELETE", status="204") == 1
    assert _metric(server, count, route="none", method="GET", status="404") == 1
    assert _metric(server, "hypersphere_decisions_total", operation="identify", decision="match") == 2
    assert _metric(server, "hypersphere_decisions_total", operation="identify", decision="unknown") == 1
    assert _metric(server, "hypersphere_decisions_total", operation="verify", decision="no_match") == 1
    assert _metric(server, "hypersphere_embedded_images_total") == 7
    assert _metric(server, "hypersphere_stage_seconds_count", stage="embed") == 5
    assert _metric(server, "hypersphere_stage_seconds_count", stage="search") == 3
    assert _metric(server, "hypersphere_request_seconds_count", route="/v1/identify") == 3
    assert _metric(server, "hypersphere_gallery_subjects", collection="default") == 0
    text = server.http.get("/metrics").text
    assert "alice" not in text


def test_the_openapi_page(server):
    schema = server.http.get("/openapi.json").json()
    assert schema["openapi"].startswith("3.1")
    own = {"/v1/collections", "/v1/collections/{collection}", "/v1/jobs", "/v1/jobs/{job_id}"}
    own |= {"/healthz", "/readyz", "/metrics", "/v1/audit"}
    of_default = {path for path in schema["paths"] if "{collection}" not in path} - own
    below = {path.replace("/v1/", "/v1/collections/{collection}/") for path in of_default}
    assert {"/v1/identify", "/v1/subjects/{subject_id}/samples"} < of_default
    assert set(schema["paths"]) == own | of_default | below
    named = [operation["operationId"] for path in schema["paths"].values() for operation in path.values()]
    assert len(named) == len(set(named))
    enrol = schema["paths"]["/v1/subjects/{subject_id}/samples"]
    assert enrol["put"]["deprecated"]
    patterns = {name["name"]: name["schema"] for name in enrol["post"]["parameters"]}
    assert re.search(patterns["subject_id"]["pattern"], "alice")
    assert not re.search(patterns["subject_id"]["pattern"], "..")
    assert "pattern" in str(patterns["Idempotency-Key"])
    components = {"components": schema["components"]}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert operation["description"], path
            named = {parameter["name"] for parameter in operation.get("parameters", ()) if parameter["in"] == "path"}
            assert named == set(re.findall(r"{(\w+)}", path))
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                jsonschema.Draft202012Validator.check_schema(content["schema"])
                if kind == "application/json":
                    jsonschema.validate(content["example"], content["schema"] | components)
    for name in ("VerifyAnswer", "IdentifyAnswer"):
        (example,) = schema["components"]["schemas"][name]["examples"]
        jsonschema.validate(example, {"$ref": f"#/components/schemas/{name}"} | components)
    answer = server.http.get("/readyz").json()
    jsonschema.validate(answer, {"$ref": "#/components/schemas/ReadyAnswer"} | components)
    error = server.http.get("/v1/subjects?limit=0").json()
    jsonschema.validate(error, {"$ref": "#/components/schemas/ErrorAnswer"} | components)


def test_the_documentation_needs_no_other_host(server):
    page = server.http.get("/docs").text
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert any(link.endswith(".js") for link in links)
    for link in links:
        assert link.startswith("/"), link
        asset = server.http.get(link)
        assert asset.status_code == 200, link
        assert len(asset.content) > 1000
    assert "http:" not in page
    assert "https:" not in page
