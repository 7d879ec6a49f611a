import json
import subprocess
import sys
from collections.abc import Callable

from serving.telemetry import logs
from tests.serving.conftest import Server


def records(output: list[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in output if line.startswith("{")]


def test_each_request_is_an_object_with_its_id_and_no_name(
    serve: Callable[..., Server], photos: Callable[..., bytes]
) -> None:
    server = serve(log_format="json")
    files = {"images": ("a.png", photos(1))}
    server.http.post("/v1/subjects/secret-name/samples", files=files, headers={"X-Request-ID": "known-1"})
    server.http.get("/v1/nowhere/secret-name", headers={"X-Request-ID": "known-2"})
    for number in range(40):  # more than are let through of a warning's kind
        server.http.get("/v1/subjects", headers={"X-Request-ID": f"page-{number}"})
    assert server.end() == 0
    found = {str(one.get("request_id")): one for one in records(server.output) if one["message"] == "answered"}
    assert found["known-1"]["route"] == "/v1/subjects/{subject_id}/samples"
    assert (found["known-1"]["method"], found["known-1"]["status"]) == ("POST", 201)
    assert (found["known-2"]["route"], found["known-2"]["status"]) == ("none", 404)
    assert {f"page-{number}" for number in range(40)} <= set(found)
    assert float(str(found["page-1"]["milliseconds"])) > 0
    assert "secret-name" not in "".join(server.output)
    assert all(line.startswith(("{", "Model ", "Serving on ")) for line in server.output), server.output


def test_lines_for_people_have_no_line_a_request(serve: Callable[..., Server]) -> None:
    server = serve()
    server.http.get("/v1/subjects")
    assert server.end() == 0
    assert records(server.output) == []
    assert "answered" not in "".join(server.output)


def logged(program: str) -> list[str]:
    """What a process writes to stderr that logs in JSON."""
    start = "import logging, logging.config; from serving.telemetry import logs\n"
    start += "logging.config.dictConfig(logs.config('json'))\n"
    line = [sys.executable, "-c", start + program]
    return subprocess.run(line, capture_output=True, text=True, check=True).stderr.splitlines()


def test_a_record_of_a_request_carries_its_id_and_a_traceback_stays_one_line() -> None:
    (line,) = logged(
        """
logs.REQUEST.set("abc")
try:
    raise ValueError("a\\nb")
except ValueError:
    logging.getLogger("hypersphere.serving").exception("it failed: %s", "why\\nso")
"""
    )
    told = json.loads(line)
    assert (told["request_id"], told["message"], told["level"]) == ("abc", "it failed: why\nso", "ERROR")
    assert "ValueError: a\nb" in told["exception"]
    assert told["time"].endswith("Z")


def test_many_of_a_kind_are_left_out() -> None:
    lines = logged("for n in range(100): logging.getLogger('hypersphere.serving').warning('again %d', n)")
    assert len(lines) == logs.LINES_A_MINUTE + 1
    assert "left out until" in lines[-1]
