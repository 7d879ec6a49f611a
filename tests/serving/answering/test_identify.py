"""What an identification can be asked: several samples, many probes, bytes, an FPIR of one's own; and what it says."""

import io
import json

import numpy as np
import pytest

from serving.threshold import Rule
from tests.serving.asking import enrol, file, refused
from tests.serving.conftest import onnx_model, write_embedder
from trainer.embedder import EmbedderManifest, write_manifest
from trainer.evaluation.curve import Curve
from trainer.evaluation.probability import MateProbability

RAW = {"content-type": "application/octet-stream"}


@pytest.fixture(scope="module")
def people(server, photos):
    """Ten subjects of one photo each, and what the service says of others."""
    for n in range(10):
        assert enrol(server, f"p{n}", photos(n)).status_code == 201

    def vectors(*of):
        rows = server.http.post("/v1/embed", files=[file(photos(n, k), "images") for n, k in of]).json()["embeddings"]
        return np.asarray(rows, np.float32)

    return vectors


def _plain(answer):
    """What was decided; scores of a batch and of one probe differ in their last bits."""
    left_out = ("request_id", "collection", "model_id", "faces")
    kept = {name: value for name, value in answer.items() if name not in left_out}
    return kept | {"candidates": [one | {"score": round(one["score"], 5)} for one in answer["candidates"]]}


def test_several_samples_of_a_probe_are_searched_by_their_mean(server, people, photos):
    x_BD = people((3, 1), (3, 2), (3, 3))
    mean_D = x_BD.astype(float).mean(0)
    by_json = server.http.post("/v1/identify", json={"embeddings": x_BD.tolist(), "top_k": 2}).json()
    assert by_json["probe_samples"] == 3
    assert (by_json["decision"], by_json["candidates"][0]["subject_id"]) == ("match", "p3")
    alone = server.http.post("/v1/identify", json={"embedding": (mean_D / np.linalg.norm(mean_D)).tolist()}).json()
    assert by_json["candidates"][0]["score"] == pytest.approx(alone["candidates"][0]["score"], abs=1e-6)
    each = [server.http.post("/v1/identify", json={"embedding": row.tolist()}).json() for row in x_BD]
    assert by_json["candidates"][0]["score"] > max(one["candidates"][0]["score"] for one in each)
    by_bytes = server.http.post("/v1/identify?top_k=2", content=x_BD.astype("<f4").tobytes(), headers=RAW).json()
    by_images = server.http.post("/v1/identify", files=[file(photos(3, k)) for k in (1, 2, 3)]).json()
    assert _plain(by_bytes) == _plain(by_json)
    assert by_images["candidates"][0]["score"] == pytest.approx(by_json["candidates"][0]["score"], abs=1e-6)
    refused(
        server.http.post("/v1/identify", json={"embeddings": [x_BD[0].tolist(), (-x_BD[0]).tolist()]}), 422, "invalid"
    )
    refused(server.http.post("/v1/identify", json={"embedding": [1], "embeddings": [[1]]}), 422, "invalid")
    refused(server.http.post("/v1/identify", json={"top_k": 3}), 422, "invalid")


def test_a_batch_answers_each_probe_as_if_it_came_alone(server, people, photos):
    x_BD = people((0, 1), (77, 0), (5, 2))
    alone = [_plain(server.http.post("/v1/identify", json={"embedding": row.tolist()}).json()) for row in x_BD]
    assert [one["decision"] for one in alone] == ["match", "unknown", "match"]
    probes = [{"embedding": row.tolist()} for row in x_BD]
    by_json = server.http.post("/v1/identify/batch", json={"probes": probes}).json()
    assert set(by_json) == {"results", "collection", "model_id", "request_id"}
    assert [_plain(one) for one in by_json["results"]] == alone
    by_bytes = server.http.post("/v1/identify/batch", content=x_BD.astype("<f4").tobytes(), headers=RAW).json()
    assert [_plain(one) for one in by_bytes["results"]] == alone
    files = [file(photos(*of), "images") for of in ((0, 1), (77, 0), (5, 2))]
    by_images = server.http.post("/v1/identify/batch", files=files, data={"top_k": "1"}).json()
    assert [one["decision"] for one in by_images["results"]] == ["match", "unknown", "match"]
    mixed = {"probes": [{"embeddings": x_BD[[0, 0]].tolist()}, probes[2]]}
    found = server.http.post("/v1/identify/batch", json=mixed).json()["results"]
    assert [one["probe_samples"] for one in found] == [2, 1]
    assert [one["candidates"][0]["subject_id"] for one in found] == ["p0", "p5"]
    many = np.repeat(x_BD[:1], 256, 0).astype("<f4").tobytes()
    assert len(server.http.post("/v1/identify/batch", content=many, headers=RAW).json()["results"]) == 256
    refused(server.http.post("/v1/identify/batch", content=many + many[:128], headers=RAW), 413, "raw_too_large")
    refused(server.http.post("/v1/identify/batch", json={"probes": []}), 422, "invalid")
    refused(server.http.post("/v1/identify/batch", json={"probes": probes[:1] * 33}), 422, "invalid")


def test_bytes_do_what_numbers_do(server, people, photos):
    x_BD = people((8, 1), (8, 2), (9, 1))
    raw = server.http.post(
        "/v1/embed", files=[file(photos(8, 1), "images")], headers={"accept": "application/octet-stream"}
    )
    assert raw.headers["content-type"] == "application/octet-stream"
    np.testing.assert_array_equal(np.frombuffer(raw.content, "<f4"), x_BD[0])
    assert raw.headers["x-model-id"] == server.http.get("/readyz").json()["model_id"]
    pairs = [x_BD[[0, 1]], x_BD[[0, 2]]]
    by_bytes = [server.http.post("/v1/verify", content=pair.tobytes(), headers=RAW).json() for pair in pairs]
    assert [one["decision"] for one in by_bytes] == ["match", "no_match"]
    subject = server.http.post("/v1/verify?subject_id=p8", content=x_BD[0].tobytes(), headers=RAW).json()
    assert (subject["decision"], subject["subject_id"]) == ("match", "p8")
    refused(server.http.post("/v1/verify", content=x_BD[0].tobytes(), headers=RAW), 422, "invalid")
    refused(server.http.post("/v1/verify?subject_id=p8", content=pairs[0].tobytes(), headers=RAW), 422, "invalid")
    done = server.http.post("/v1/subjects/raw/samples", content=x_BD[:2].tobytes(), headers=RAW)
    assert (done.status_code, len(done.json()["samples"])) == (201, 2)
    server.http.delete("/v1/subjects/raw")


@pytest.mark.parametrize(
    ("content", "query", "status", "code"),
    [
        (b"", "", 422, "invalid"),
        (b"abc", "", 422, "invalid"),
        (bytes(127), "", 422, "invalid"),
        (bytes(128), "", 422, "not_a_unit_vector"),
        (np.full(32, np.nan, "<f4").tobytes(), "", 422, "not_a_unit_vector"),
        (np.full(32, np.inf, "<f4").tobytes(), "", 422, "not_a_unit_vector"),
        (np.full(32, 3e38, "<f4").tobytes(), "", 422, "not_a_unit_vector"),
        (np.full(32, 32**-0.5, "<f4").tobytes(), "?top_k=0", 422, "invalid"),
        (np.full(32, 32**-0.5, "<f4").tobytes(), "?top_k=1&top_k=2", 422, "invalid"),
        (np.full(32, 32**-0.5, "<f4").tobytes(), "?evil=1", 422, "invalid"),
        (np.full(32, 32**-0.5, "<f4").tobytes(), "?fpir=nan", 422, "invalid"),
        (np.full(32, 32**-0.5, "<f4").tobytes(), "?model_id=other", 409, "wrong_model"),
        (bytes(33 * 128), "", 413, "raw_too_large"),
    ],
)
def test_bytes_that_are_no_embeddings_are_refused(server, content, query, status, code):
    refused(server.http.post(f"/v1/identify{query}", content=content, headers=RAW), status, code)


@pytest.fixture(scope="module")
def curved(tmp_path_factory):
    """An embedder whose calibration has a curve and a probability."""
    folder = write_embedder(tmp_path_factory.mktemp("embedder") / "curved", onnx_model())
    manifest = EmbedderManifest.model_validate_json((folder / "manifest.json").read_text())
    tiny = tuple(tuple(1e-4 * (i == j) for j in range(3)) for i in range(3))
    curve = Curve(
        **{"target": "FPIR", "start": 0.3, "share": 0.01, "scale": 0.1, "shape": 0.0, "clumping": 0.0},
        **{"by_subjects": tiny, "by_pairs": tiny, "by_prior": (0.0, 0.0), "dominance": 0.1},
        **{"subjects_vary": 0.1, "gallery_varies": 0.0, "freedom": 50.0, "subjects": 300, "trials": 900},
    )
    platt = {"prior": 0.5, "slope": 20.0, "offset": -10.0, "scores": [0.0], "ratios": [0.0], "method": "platt"}
    probability = MateProbability(**platt, ece_platt=0.01, ece_isotonic=0.02, mated_pairs=100)
    calibration = manifest.calibration.model_copy(update={"curve": curve, "probability": probability})
    write_manifest(folder, manifest.model_copy(update={"calibration": calibration}))
    return folder


def test_a_request_may_choose_an_fpir_that_the_calibration_knows(serve, curved, photos):
    server = serve(embedder=curved)
    for n in range(5):
        enrol(server, f"p{n}", photos(n))
    probe = {"embedding": server.http.post("/v1/embed", files=[file(photos(2, 1), "images")]).json()["embeddings"][0]}
    asked = {fpir: server.http.post("/v1/identify", json=probe | {"fpir": fpir}).json() for fpir in (0.002, 0.01, 0.1)}
    thresholds = [one["threshold"] for one in asked.values()]
    assert thresholds == sorted(thresholds, reverse=True)
    assert len(set(thresholds)) == 3
    for fpir, one in asked.items():
        assert one["fpir_target"] == fpir
        assert one["fpir_interval"][0] < fpir < one["fpir_interval"][1]
        assert f"for FPIR {fpir:g} at 5 enrolled" in one["threshold_source"]
        assert one["extrapolated"] is False
    error = refused(server.http.post("/v1/identify", json=probe | {"fpir": 1e-6}), 422, "fpir_not_known")
    low, high = error["details"]["lowest"], error["details"]["highest"]
    assert server.http.post("/v1/identify", json=probe | {"fpir": low}).status_code == 200
    refused(server.http.post("/v1/identify", json=probe | {"fpir": low * 0.9}), 422, "fpir_not_known")
    assert server.http.post("/v1/identify", files=[file(photos(2, 1))], data={"fpir": str(high)}).status_code == 200
    for wrong in (0, -1, 0.3, "often"):
        refused(server.http.post("/v1/identify", json=probe | {"fpir": wrong}), 422, "invalid")
    best = asked[0.01]["candidates"][0]
    odds = np.exp(20 * best["score"] - 10) * 0.1 / 0.9  # a prior of 0.5, shared out among 5
    assert best["mate_probability"] == pytest.approx(odds / (1 + odds), abs=1e-6)


def test_no_fpir_shows_what_the_operator_hides(serve, curved, people):
    server = serve(embedder=curved, below_threshold="never")
    probe = {"embedding": people((1, 1))[0].tolist()}
    assert server.http.post("/v1/identify", json=probe | {"fpir": 0.01}).status_code == 200
    error = refused(server.http.post("/v1/identify", json=probe | {"fpir": 0.02}), 403, "below_threshold_hidden")
    assert error["details"] == {"sent": 0.02, "highest": 0.01}


def test_without_a_curve_only_the_calibrated_fpir_is_known(server, people):
    probe = {"embedding": people((1, 1))[0].tolist()}
    assert server.http.post("/v1/identify", json=probe | {"fpir": 0.01}).status_code == 200
    error = refused(server.http.post("/v1/identify", json=probe | {"fpir": 0.02}), 422, "fpir_not_known")
    assert error["details"]["calibrated"] == 0.01
    assert "the calibration knows 0.01" in error["message"]


def test_the_words_for_other_sizes_are_bounds():
    rule = Rule(0.7, "calibrated", 0.01, (0.005, 0.02), 100)
    assert "FPIR is at least about 0.001" in rule.explain(10)
    assert "FPIR is at most about 0.096" in rule.explain(1000)
    assert rule.explain(100) == "calibrated"


def test_images_of_one_probe_are_bounded(server, photos):
    files = [file(photos(1)) for _ in range(33)]
    assert server.http.post("/v1/identify", files=files).status_code in (400, 422)
    body = io.StringIO()
    json.dump({"embeddings": [[1.0] + [0.0] * 31] * 33}, body)
    answer = server.http.post("/v1/identify", content=body.getvalue(), headers={"content-type": "application/json"})
    assert answer.status_code == 422
