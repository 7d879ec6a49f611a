import hashlib
import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.serving.conftest import onnx_model, write_embedder
from trainer.embedder import Embedder, model_id, read_cohort, write_cohort, write_manifest
from trainer.errors import UserError
from trainer.evaluation.normalise import Normaliser


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return write_embedder(tmp_path_factory.mktemp("embedder") / "tiny", onnx_model())


def pictures(count):
    """uint8 [count, 1, 16, 16]."""
    return np.random.default_rng(1).integers(0, 256, (count, 1, 16, 16), dtype=np.uint8)


def _with_model(folder, source, content):
    """A copy of an Embedder whose ONNX file is `content`, with a manifest that fits its digest."""
    manifest = Embedder.open(source).manifest
    folder.mkdir()
    (folder / "model.onnx").write_bytes(content)
    fitting = manifest.model_copy(update={"model_id": model_id(content, manifest.preprocessing), "calibration": None})
    write_manifest(folder, fitting)
    return folder


def test_vectors_are_those_of_the_formula(embedder):
    opened = Embedder.open(embedder)
    pixels_BCHW = pictures(3)
    weights = np.random.default_rng(0).normal(size=(256, 32)).astype(np.float32)
    x_BD = opened.embed(pixels_BCHW)
    for pixels, x_D in zip(pixels_BCHW.reshape(3, -1).astype(np.float64), x_BD, strict=True):
        expected_D = (pixels - pixels.mean()) @ weights.astype(np.float64)
        np.testing.assert_allclose(x_D, expected_D / np.linalg.norm(expected_D), atol=1e-5)
    assert x_BD.dtype == np.float32
    assert (opened.manifest.dimension, opened.model_id) == (
        32,
        model_id((embedder / "model.onnx").read_bytes(), opened.preprocessing),
    )


def test_batches_do_not_change_the_vectors(embedder):
    at_once, in_twos = Embedder.open(embedder), Embedder.open(embedder, batch_size=2)
    np.testing.assert_allclose(in_twos.embed(pictures(7)), at_once.embed(pictures(7)), atol=1e-6)
    assert at_once.embed(np.zeros((0, 1, 16, 16), np.uint8)).shape == (0, 32)


@pytest.mark.parametrize(
    "images",
    [np.zeros((1, 3, 16, 16), np.uint8), np.zeros((1, 1, 16, 16), np.float32), np.zeros((1, 16, 16), np.uint8)],
)
def test_other_shapes_and_types_are_refused(embedder, images):
    with pytest.raises(UserError, match=r"the model takes uint8 \[B, 1, 16, 16\]"):
        Embedder.open(embedder).embed(images)


def test_an_image_without_direction_is_refused(embedder):
    images = np.full((2, 1, 16, 16), 7, np.uint8)
    images[0] = np.arange(256, dtype=np.uint8).reshape(16, 16)
    with pytest.raises(UserError, match="the model gave sample 1 a vector of length"):
        Embedder.open(embedder).embed(images)


def test_a_changed_model_is_refused(embedder, tmp_path):
    shutil.copytree(embedder, tmp_path / "changed")
    content = bytearray((embedder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "changed/model.onnx").write_bytes(content)
    with pytest.raises(UserError, match="was changed after export"):
        Embedder.open(tmp_path / "changed")


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(range(256)) * 40])
def test_bytes_that_are_no_model_are_refused(embedder, tmp_path, content):
    with pytest.raises(UserError, match="export the embedder again"):
        Embedder.open(_with_model(tmp_path / "bad", embedder, content))


def test_truncated_models_are_refused(embedder, tmp_path):
    content = (embedder / "model.onnx").read_bytes()
    for number, length in enumerate((1, 100, len(content) // 2, len(content) - 1)):
        with pytest.raises(UserError, match="export the embedder again"):
            Embedder.open(_with_model(tmp_path / str(number), embedder, content[:length]))


def test_a_model_that_does_not_normalise_is_refused(tmp_path):
    with pytest.raises(UserError, match="an embedder normalises them to 1"):
        Embedder.open(write_embedder(tmp_path / "long", onnx_model(normalise=False)))


def test_another_signature_is_refused(embedder, tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Cast", ["pixels"], ["embeddings"], to=TensorProto.FLOAT)],
        "other",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["B", 32])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["B", 32])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    with pytest.raises(UserError, match="an embedder of images takes uint8 'images'"):
        Embedder.open(_with_model(tmp_path / "other", embedder, model.SerializeToString()))


def test_weights_outside_the_file_are_refused(embedder, tmp_path):
    """They would not be covered by the digest."""
    model = onnx.load_from_string((embedder / "model.onnx").read_bytes())
    onnx.save(model, tmp_path / "split.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    folder = _with_model(tmp_path / "split", embedder, (tmp_path / "split.onnx").read_bytes())
    shutil.copy(tmp_path / "weights.bin", folder)
    with pytest.raises(UserError, match="export the embedder again"):
        Embedder.open(folder)


def test_a_wrong_dimension_is_refused(embedder, tmp_path):
    shutil.copytree(embedder, tmp_path / "lying")
    manifest = Embedder.open(embedder).manifest
    write_manifest(tmp_path / "lying", manifest.model_copy(update={"dimension": 64}))
    with pytest.raises(UserError, match="its manifest names dimension 64"):
        Embedder.open(tmp_path / "lying")


@pytest.fixture
def normalised(embedder, tmp_path):
    """An Embedder with a cohort, and the cohort's file."""
    folder = shutil.copytree(embedder, tmp_path / "normalised")
    manifest = Embedder.open(folder).manifest
    cohort_KD = Embedder.open(folder).embed(pictures(24))
    told = write_cohort(folder, Normaliser("as", cohort_KD))
    write_manifest(folder, manifest.model_copy(update={"normalisation": told}))
    return folder, folder / told.file


def _normaliser(folder):
    """What the service reads; the Embedder itself is opened without, so that it can be calibrated again."""
    return read_cohort(folder, Embedder.open(folder).manifest)


def test_a_cohort_travels_with_the_embedder(embedder, normalised):
    folder, _ = normalised
    assert _normaliser(embedder) is None
    found = _normaliser(folder)
    assert found.kind == "as"
    np.testing.assert_array_equal(found.cohort_KD, Embedder.open(folder).embed(pictures(24)))


def _other_shape(file):
    np.save(file, np.zeros((24, 7), np.float32))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda file: file.unlink(),
            "is missing or too large: scores cannot be normalised; calibrate the embedder again",
        ),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "is not the cohort that the manifest names"),
        (_other_shape, "is not the cohort that the manifest names"),
    ],
)
def test_a_damaged_cohort_is_named(normalised, damage, message):
    folder, file = normalised
    damage(file)
    with pytest.raises(UserError, match=message):
        _normaliser(folder)


@pytest.mark.parametrize(
    ("content", "message"), [(np.zeros((24, 7), np.float32), "has shape"), (np.array([{}], object), "is no array of")]
)
def test_a_cohort_that_is_none_is_refused_whatever_its_digest(normalised, content, message):
    folder, file = normalised
    np.save(file, content, allow_pickle=True)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["normalisation"]["sha256"] = digest
    (folder / "manifest.json").write_text(json.dumps(manifest))
    file.rename(folder / f"cohort-{digest[:16]}.npy")
    with pytest.raises(UserError, match=message):
        _normaliser(folder)
