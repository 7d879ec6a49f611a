"""The whole service over HTTP: uvicorn in a process of its own, SQLite, FAISS and ONNX Runtime as in production."""

import numpy as np
import pytest
from PIL import Image

from tests.serving.asking import enrol, file, identify, identities, refused
from trainer.data.image import Preprocessing, load_image
from trainer.embedder import Embedder

# Deciding


def test_a_mate_is_found_and_a_stranger_is_unknown(server, embedder, photos):
    mate, other, stranger = next(identities), next(identities), next(identities)
    enrolled = enrol(server, f"s{mate}", photos(mate, 0))
    assert enrolled.status_code == 201
    assert enrol(server, f"s{other}", photos(other, 0)).status_code == 201
    answer = identify(server, photos(mate, 1), top_k=2).json()
    assert answer["decision"] == "match"
    assert answer["candidates"][0]["subject_id"] == f"s{mate}"
    assert answer["candidates"][0]["sample_id"] == enrolled.json()["samples"][0]["sample_id"]
    assert answer["candidates"][0]["score"] >= answer["threshold"] == 0.7
    assert answer["threshold_source"].startswith("calibrated for FPIR 0.01: a test")
    assert (answer["fpir_target"], answer["fpir_interval"]) == (0.01, [0.005, 0.02])
    assert answer["calibrated_gallery_size"] == 4
    assert answer["gallery_size"] >= 2
    assert (len(answer["images"]), answer["faces"]) == (1, [])  # told once, where there is no detector
    assert answer["model_id"] == Embedder.open(embedder).model_id
    assert identify(server, photos(stranger), top_k=2).json()["candidates"] == []
    answer = identify(server, photos(stranger), top_k=2, below_threshold="true").json()
    assert answer["decision"] == "unknown"
    assert len(answer["candidates"]) == 2
    assert answer["candidates"][0]["score"] < answer["threshold"]


def test_several_samples_of_a_subject_are_one_candidate(server, photos):
    person = next(identities)
    enrol(server, f"s{person}", photos(person, 0), photos(person, 1))
    more = enrol(server, f"s{person}", photos(person, 2)).json()
    assert (more["subject_created"], more["subject_samples"], len(more["samples"])) == (False, 3, 1)
    answer = identify(server, photos(person, 2), top_k=100).json()
    found = [candidate["subject_id"] for candidate in answer["candidates"]]
    assert found[0] == f"s{person}"
    assert len(found) == len(set(found))
    assert answer["candidates"][0]["sample_id"] == more["samples"][0]["sample_id"]
    assert answer["candidates"][0]["score"] == pytest.approx(1, abs=1e-5)


def test_deleted_subjects_are_gone_from_the_next_search(server, photos):
    person = next(identities)
    enrol(server, f"s{person}", photos(person))
    assert identify(server, photos(person)).json()["candidates"][0]["subject_id"] == f"s{person}"
    answer = server.http.delete(f"/v1/subjects/s{person}")
    assert (answer.status_code, answer.content) == (204, b"")
    answer = identify(server, photos(person), top_k=100).json()
    assert f"s{person}" not in [candidate["subject_id"] for candidate in answer["candidates"]]
    refused(server.http.delete(f"/v1/subjects/s{person}"), 404, "no_subject")
    assert enrol(server, f"s{person}", photos(person)).json()["subject_created"] is True


def test_verify(server, photos):
    person, other = next(identities), next(identities)
    enrolled = enrol(server, f"s{person}", photos(person, 0)).json()
    same = server.http.post(
        "/v1/verify", files=[file(photos(person, 1), "probe"), file(photos(person, 2), "reference")]
    ).json()
    assert (same["decision"], same["threshold"], same["fmr_target"]) == ("match", 0.6, 0.01)
    assert same["threshold_source"] == "calibrated for FMR 0.01: a test"
    assert same["score"] >= same["threshold"]
    different = server.http.post(
        "/v1/verify", files=[file(photos(person, 1), "probe"), file(photos(other, 1), "reference")]
    ).json()
    assert different["decision"] == "no_match"
    assert different["score"] < different["threshold"]
    files, fields = [file(photos(person, 3), "probe")], {"subject_id": f"s{person}"}
    subject = server.http.post("/v1/verify", files=files, data=fields).json()
    assert (subject["decision"], subject["subject_id"]) == ("match", f"s{person}")
    assert subject["sample_id"] == enrolled["samples"][0]["sample_id"]
    refused(server.http.post("/v1/verify", files=files, data={"subject_id": "nobody"}), 404, "no_subject")
    refused(server.http.post("/v1/verify", files=files), 422, "invalid")
    files.append(file(photos(person), "reference"))
    refused(server.http.post("/v1/verify", files=files, data=fields), 422, "invalid")


def test_embeddings_do_what_images_do(server, embedder, photos):
    person = next(identities)
    answer = server.http.post("/v1/embed", files=[file(photos(person, k), "images") for k in range(3)]).json()
    x = np.asarray(answer["embeddings"], np.float32)
    form = Preprocessing(mode="L", height=16, width=16)
    pixels = np.stack([load_image(photos(person, k), form) for k in range(3)])
    np.testing.assert_allclose(x, Embedder.open(embedder).embed(pixels), atol=1e-6)
    assert (answer["dimension"], x.shape) == (32, (3, 32))
    first, second, third = answer["embeddings"]
    body = {"embeddings": [first, second], "model_id": answer["model_id"]}
    enrolled = server.http.post(f"/v1/subjects/s{person}/samples", json=body)
    assert (enrolled.status_code, len(enrolled.json()["samples"])) == (201, 2)
    by_embedding = server.http.post("/v1/identify", json={"embedding": third, "top_k": 1}).json()
    by_image = identify(server, photos(person, 2), top_k=1).json()
    assert by_embedding["decision"] == by_image["decision"] == "match"
    assert by_embedding["candidates"][0]["sample_id"] == by_image["candidates"][0]["sample_id"]
    assert by_embedding["candidates"][0]["score"] == pytest.approx(by_image["candidates"][0]["score"], abs=1e-6)
    pair = server.http.post("/v1/verify", json={"probe": first, "reference": third}).json()
    assert (pair["decision"], pair["subject_id"]) == ("match", None)
    assert pair["score"] == pytest.approx(float(x[0] @ x[2]), abs=1e-5)
    known = server.http.post("/v1/verify", json={"probe": third, "subject_id": f"s{person}"}).json()
    assert (known["decision"], known["subject_id"]) == ("match", f"s{person}")


def test_other_formats_and_sizes_are_read(server, photos, tmp_path):
    person = next(identities)
    enrol(server, f"s{person}", photos(person))
    (tmp_path / "a.png").write_bytes(photos(person))
    with Image.open(tmp_path / "a.png") as picture:
        picture.convert("RGB").resize((160, 160), Image.Resampling.BICUBIC).save(tmp_path / "a.webp", lossless=True)
        picture.save(tmp_path / "a.bmp")
    for name in ("a.webp", "a.bmp"):
        answer = identify(server, (tmp_path / name).read_bytes()).json()
        assert (answer["decision"], answer["candidates"][0]["subject_id"]) == ("match", f"s{person}")


# Lists


def test_pages_hold_every_subject_once(serve, vectors):
    server = serve()
    names = [f"subject {number}" for number in range(11)]
    for name, row in zip(names, vectors(11), strict=True):
        server.http.post(f"/v1/subjects/{name}/samples", json={"embeddings": [row.tolist()]})
    found, cursor = [], None
    for _ in range(4):
        answer = server.http.get("/v1/subjects", params={"limit": 4} | ({"cursor": cursor} if cursor else {})).json()
        found += [subject["subject_id"] for subject in answer["subjects"]]
        assert answer["gallery_size"] == 11
        if not found[4:]:  # what happens between two pages neither repeats nor skips one
            server.http.post("/v1/subjects/late/samples", json={"embeddings": [vectors(1, seed=9)[0].tolist()]})
            server.http.delete("/v1/subjects/subject 0")
        cursor = answer["next_cursor"]
        if cursor is None:
            break
    assert found == [*names, "late"]
    assert server.http.get("/v1/subjects").json()["next_cursor"] is None


@pytest.mark.parametrize(
    "query",
    ["cursor=nonsense", "cursor=%00", "cursor=cDEyMzQ1Njc4OTAxMjM0NTY3ODkw", "limit=0", "limit=1001", "limit=x"],
)
def test_bad_pages_are_refused(server, query):
    refused(server.http.get(f"/v1/subjects?{query}"), 422, "invalid")


# Once


def test_a_repeated_key_is_answered_alike_and_done_once(server, photos):
    person, key = next(identities), {"Idempotency-Key": "first-try"}
    first = enrol(server, f"s{person}", photos(person), headers=key)
    again = enrol(server, f"s{person}", photos(person), headers=key)
    assert first.status_code == again.status_code == 201
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert {**again.json(), "request_id": ""} == {**first.json(), "request_id": ""}
    assert again.json()["subject_samples"] == 1
    refused(enrol(server, f"s{person}", photos(person, 1), headers=key), 409, "idempotency_key_reused")
    refused(enrol(server, "other", photos(person), headers=key), 409, "idempotency_key_reused")
    refused(server.http.delete(f"/v1/subjects/s{person}", headers=key), 409, "idempotency_key_reused")
    gone = {"Idempotency-Key": "gone"}
    assert server.http.delete(f"/v1/subjects/s{person}", headers=gone).status_code == 204
    again = server.http.delete(f"/v1/subjects/s{person}", headers=gone)
    assert (again.status_code, again.headers["idempotent-replayed"]) == (204, "true")
    late = enrol(server, f"s{person}", photos(person), headers=key)
    assert late.headers["idempotent-replayed"] == "true"
    refused(server.http.delete(f"/v1/subjects/s{person}"), 404, "no_subject")
    refused(enrol(server, "other", photos(person), headers={"Idempotency-Key": "a b"}), 422, "invalid")
