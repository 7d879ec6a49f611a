"""A service with a detector: photographs in, an answer for each face out."""

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.detectors import painted, placed, png, write_detector
from tests.serving.conftest import DIMENSION, SIDE, Server

# (identity, x, y, side, degrees): the largest first
GROUP = [(1, 140, 150, 190, 20), (5, 470, 330, 160, -100), (2, 470, 110, 130, 0)]


def photo(*faces: tuple[int, float, float, float, float]) -> bytes:
    return png(placed(faces)[0])


def alone(identity: int, side: float = 150, degrees: float = 0) -> bytes:
    return photo((identity, 320, 240, side, degrees))


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detector(tmp_path_factory.mktemp("detector") / "marks", SIDE)


@pytest.fixture(scope="module")
def server(embedder: Path, detector: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = tmp_path_factory.mktemp("store") / "gallery.db"
    running = Server(embedder=embedder, store=store, detector=detector, max_faces=3)
    for identity in (1, 2):
        answer = send(running, f"subjects/{identity}/samples", images=alone(identity, 200, 10))
        assert answer.status_code == 201, answer.text
    yield running
    assert running.end() == 0, "".join(running.output)


def send(
    server: Server, route: str, fields: dict[str, str] | None = None, **images: bytes | list[bytes]
) -> httpx.Response:
    every = {part: found if isinstance(found, list) else [found] for part, found in images.items()}
    files = [(part, (f"{part}.png", image)) for part, found in every.items() for image in found]
    return server.http.post(f"/v1/{route}", files=files, data=fields or {})


def error(answer: httpx.Response) -> tuple[int, str, str]:
    return answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["message"]


def test_each_face_of_a_photograph_is_identified(server: Server) -> None:
    answer = send(server, "identify", image=photo(*GROUP)).json()
    assert [face["decision"] for face in answer["faces"]] == ["match", "unknown", "match"]
    assert [[one["subject_id"] for one in face["candidates"]] for face in answer["faces"]] == [["1"], [], ["2"]]
    for face, (_, x, y, side, degrees) in zip(answer["faces"], GROUP, strict=True):
        left, top, right, bottom = face["face"]["box"]
        assert left < x < right
        assert top < y < bottom
        assert np.allclose(face["face"]["landmarks"], placed([(0, x, y, side, degrees)])[1][0], atol=3)
        assert face["face"]["detection_score"] > 0.5
        assert face["face"]["quality"]["size"] == pytest.approx(side, rel=0.1)
        assert face["face"]["quality"]["roll"] == pytest.approx(degrees, abs=5)
    # The rest of the answer is of the largest face.
    assert answer["decision"] == "match"
    assert answer["candidates"] == answer["faces"][0]["candidates"]
    assert answer["images"] == [answer["faces"][0]["face"]]


def test_of_several_faces_the_largest_can_be_asked_for(server: Server) -> None:
    answer = send(server, "identify", {"face": "largest"}, image=photo(*GROUP[::-1])).json()
    assert answer["faces"] == []
    assert answer["candidates"][0]["subject_id"] == "1"
    verified = send(server, "verify", {"face": "largest", "subject_id": "1"}, probe=photo(*GROUP)).json()
    assert (verified["decision"], verified["images"][0]["image"]) == ("match", "probe")
    enrolled = send(server, "subjects/largest/samples", {"face": "largest"}, images=photo(*GROUP[1:]))
    assert enrolled.status_code == 201
    assert send(server, "identify", image=alone(5, 170)).json()["candidates"][0]["subject_id"] == "largest"
    server.http.delete("/v1/subjects/largest")


@pytest.mark.parametrize("route", ["verify", "subjects/someone/samples", "identify"])
def test_where_one_face_is_meant_several_are_refused(server: Server, route: str) -> None:
    part = {"verify": "probe", "identify": "image"}.get(route, "images")
    fields = {"subject_id": "1"} if route == "verify" else {"face": "only"} if route == "identify" else {}
    answer = send(server, route, fields, **{part: photo(*GROUP)})
    assert error(answer)[:2] == (422, "several_faces")
    assert error(answer)[2] == (
        f"image '{part}' shows 3 faces, and one is allowed here; cut it out, or send face=largest"
    )
    assert answer.json()["error"]["details"] == {"part": part, "number": 1, "faces": 3}


@pytest.mark.parametrize("route", ["verify", "subjects/someone/samples", "identify", "embed"])
def test_a_photograph_without_a_face_is_refused(server: Server, route: str) -> None:
    part = {"verify": "probe", "identify": "image"}.get(route, "images")
    answer = send(server, route, {"subject_id": "1"} if route == "verify" else {}, **{part: photo()})
    assert error(answer) == (
        422, "no_face", f"image '{part}' shows no face that the detector finds; take another one"
    )  # fmt: skip


def test_verify_aligns_both(server: Server) -> None:
    answer = send(server, "verify", probe=alone(7, 120, 75), reference=alone(7, 260, -30)).json()
    assert answer["decision"] == "match"
    assert answer["score"] > 0.9
    assert [image["image"] for image in answer["images"]] == ["probe", "reference"]
    other = send(server, "verify", probe=alone(7, 160), reference=alone(8, 160)).json()
    assert other["decision"] == "no_match"


def test_several_photographs_of_one_person_are_one_probe(server: Server) -> None:
    answer = send(server, "identify", image=[alone(1), alone(1, 220, 40)]).json()
    assert (answer["probe_samples"], len(answer["images"]), answer["faces"]) == (2, 2, [])
    assert answer["candidates"][0]["subject_id"] == "1"
    both = send(server, "identify", {"face": "all"}, image=[alone(1), alone(1)])
    assert error(both)[:2] == (422, "invalid")
    second = send(server, "identify", image=[alone(1), photo(*GROUP)])
    assert "image 'image 2' shows 3 faces" in error(second)[2]


def test_a_batch_has_a_photograph_for_each_probe(server: Server) -> None:
    answer = send(server, "identify/batch", images=[alone(2), alone(1)]).json()
    assert [one["candidates"][0]["subject_id"] for one in answer["results"]] == ["2", "1"]
    assert [one["images"][0]["image"] for one in answer["results"]] == ["images 1", "images 2"]


def test_embed_gives_every_face_and_says_whose(server: Server) -> None:
    answer = send(server, "embed", images=[alone(3), photo(*GROUP)])
    body = answer.json()
    assert [image["image"] for image in body["images"]] == ["images 1", *["images 2"] * 3]
    assert len(body["embeddings"]) == 4
    raw = server.http.post(
        "/v1/embed", files=[("images", ("a.png", photo(*GROUP)))], headers={"Accept": "application/octet-stream"}
    )
    assert np.allclose(np.frombuffer(raw.content, "<f4").reshape(3, DIMENSION), body["embeddings"][1:], atol=1e-6)


def test_more_faces_than_are_looked_at_are_told(server: Server) -> None:
    crowd = [(n, 110 + 210 * (n % 3), 130 + 220 * (n // 3), 130, 0) for n in range(5)]
    answer = send(server, "identify", image=photo(*crowd)).json()
    assert len(answer["faces"]) == 3
    assert answer["faces"][0]["face"]["warning"] == "image 'image' shows 2 more faces than the 3 looked at"
    assert "shows 5 faces" in error(send(server, "subjects/x/samples", images=photo(*crowd)))[2]


@pytest.mark.parametrize(("route", "face"), [("identify", "both"), ("verify", "all"), ("embed", "")])
def test_a_face_that_cannot_be_asked_for_is_refused(server: Server, route: str, face: str) -> None:
    part = {"verify": "probe", "identify": "image"}.get(route, "images")
    fields = {"face": face} | ({"subject_id": "1"} if route == "verify" else {})
    answer = send(server, route, fields, **{part: alone(1)})
    assert answer.status_code == 422
    assert "face" in error(answer)[2]


def test_faces_are_counted_and_timed(server: Server) -> None:
    def value(name: str) -> float:
        lines = server.http.get("/metrics").text.splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " "))

    faces, looked = value("hypersphere_faces_total"), value('hypersphere_stage_seconds_count{stage="detect"}')
    send(server, "identify", image=photo(*GROUP))
    time.sleep(0.2)  # the text is written ten times a second
    assert value("hypersphere_faces_total") == faces + 3
    assert value('hypersphere_stage_seconds_count{stage="detect"}') == looked + 1
    assert value('hypersphere_queue{stage="decode"}') == 0


def test_a_face_of_too_little_quality_is_refused_with_the_measure(serve: Callable[..., Server], detector: Path) -> None:
    server = serve(detector=detector, min_quality="size=100,roll=45")
    small, leaning = alone(1, 80), alone(1, 160, 70)
    status, code, message = error(send(server, "subjects/a/samples", images=small))
    assert (status, code) == (422, "poor_quality")
    assert message.startswith("image 'images' is too small (size 8")
    assert message.endswith("at least 100 is asked for); take another one")
    assert "leaning too far (roll 7" in error(send(server, "verify", probe=leaning, reference=small))[2]
    assert send(server, "subjects/a/samples", images=alone(1, 160, 30)).status_code == 201
    answer = send(server, "identify", image=photo((2, 480, 120, 150, 80), (1, 150, 250, 140, 0))).json()
    (first, second) = answer["faces"]
    assert (first["decision"], first["candidates"]) == (None, [])
    assert first["face"]["faults"][0].startswith("leaning too far")
    assert second["decision"] == answer["decision"] == "match"
    assert answer["images"] == [second["face"]]
    assert error(send(server, "identify", image=small))[1] == "poor_quality"  # none is left


def test_the_manifests_can_ask_for_quality(serve: Callable[..., Server], tmp_path: Path) -> None:
    asking = write_detector(tmp_path / "asking", SIDE, quality={"size": 100})
    server = serve(detector=asking, min_quality="manifest")
    assert error(send(server, "embed", images=alone(1, 80)))[1] == "poor_quality"
    assert send(server, "embed", images=alone(1, 160)).status_code == 200


def test_detection_has_a_time_of_its_own(serve: Callable[..., Server], detector: Path) -> None:
    server = serve(detector=detector, detect_cpu_s=0.001)
    assert error(send(server, "embed", images=alone(1)))[1] == "decoding_too_long"
    assert server.http.get("/healthz").status_code == 200


def test_without_a_detector_a_photograph_is_warned_of(serve: Callable[..., Server]) -> None:
    server = serve()
    answer = send(server, "embed", images=[alone(1), png(painted(1).resize((24, 24)))]).json()
    assert answer["images"][0]["warning"] == (
        "image 'images 1' of 640 x 480 pixels was stretched to 16 x 16: this service has no detector and expects crops "
        "like those of the training; faces must be aligned"
    )
    assert answer["images"][1]["warning"] is None
    assert answer["images"][0]["box"] is None
    assert answer["images"][1]["quality"]["size"] == 24


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"side": 24}, "aligns faces to 24 x 24 pixels, and the model reads 16 x 16"),
        ({"detector": "nowhere"}, "'nowhere' is not a detector: 'manifest.json' cannot be read"),
        ({"min_quality": "beauty=1"}, "'beauty=1' asks for no quality"),
        ({"min_quality": "yaw=30"}, "asks for yaw, which only a detector tells"),
        ({"min_quality": "norm=30"}, "asks for norm, which this model does not tell"),
    ],
)
def test_what_cannot_be_used_ends_the_start(
    embedder: Path, tmp_path: Path, settings: dict[str, object], told: str
) -> None:
    if side := settings.pop("side", None):
        settings["detector"] = write_detector(tmp_path / "d", int(str(side)))
    with pytest.raises(AssertionError, match="the server did not start") as caught:
        Server(embedder=embedder, store=tmp_path / "gallery.db", **settings)
    assert told in str(caught.value)


def test_faces_are_turned_back_as_they_would_be_by_hand(server: Server) -> None:
    """The embedding of a turned face is that of the same face, cut out upright."""
    plain = send(server, "embed", images=alone(6, 200)).json()["embeddings"][0]
    for degrees in (30, 120, -90):
        turned = send(server, "embed", images=alone(6, 200, degrees)).json()["embeddings"][0]
        assert np.dot(plain, turned) > 0.95
    aside = Image.open(io.BytesIO(alone(6, 200))).rotate(90)
    assert np.dot(plain, send(server, "embed", images=png(aside)).json()["embeddings"][0]) > 0.95
