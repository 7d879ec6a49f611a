"""SIGTERM while the service is attacked: it ends in the time it was given, and keeps what it acknowledged."""

import threading
import time

from tests.serving.conftest import Server
from tests.serving.hostile import crowds
from tests.serving.hostile.images import ATTACKS
from tests.serving.hostile.site import ENROL, ROWS, THRESHOLDS, listed
from tests.serving.hostile.wire import address, http, image_form, json

SHUTDOWN_S, SLACK_S = 4, 3  # slack: for a machine with other work
BOMBS = ("jpeg: as many scans of colour as are allowed", "jpeg2000: noise of 3 MP", "png: 16 MP of 64-bit pixels")


def test_sigterm_is_obeyed_while_bombs_and_slow_clients_are_under_way(embedder, tmp_path):
    settings = {"embedder": embedder, "store": tmp_path / "gallery.db", **THRESHOLDS}
    server = Server(**settings, shutdown_s=SHUTDOWN_S)
    to = address(server.url)
    enrolled = set()
    for number in range(20):
        body = {"embeddings": [ROWS[number].tolist()]}
        assert server.http.request(ENROL, f"/v1/subjects/s{number}/samples", json=body).status_code == 201
        enrolled.add(f"s{number}")
    bombs = [image_form(ATTACKS[bomb]()) for bomb in BOMBS]
    members = [crowds.at_once(bomb) for bomb in bombs * 3]
    for _ in range(10):
        members += [crowds.drip(http("GET", "/healthz")), crowds.after_head(json(b" " * 1000)), crowds.nothing()]
    met: list[crowds.Met] = []
    attack = threading.Thread(target=lambda: met.extend(crowds.crowd(to, members, 30)))
    large = http("GET", "/docs-assets/swagger-ui-bundle.js").replace(b"close", b"keep-alive")
    with crowds.deaf(to, 10, large * 10):
        attack.start()
        time.sleep(1)
        start = time.monotonic()
        code = server.end()
        seconds = time.monotonic() - start
    attack.join()
    assert code == 0, "".join(server.output)
    assert seconds < SHUTDOWN_S + SLACK_S
    assert not {one.status for one in met} & {500, 502, 504}, "whoever is cut off is told so: 503"
    assert "Traceback" not in "".join(server.output)
    again = Server(**settings)
    assert enrolled == listed(again)
    again.end()
