"""An Embedder on a split: the vectors of each sample, in order, and what is found with them."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.serving.conftest import onnx_model, write_embedder
from trainer.assess import calibrate_on_split, embed_split, evaluate_split
from trainer.data.image import load_image
from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import
from trainer.data.manifest import Manifest
from trainer.embedder import Embedder
from trainer.errors import UserError
from trainer.evaluation.protocols import measure

IDENTITIES, SAMPLES = 60, 5


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for identity in range(IDENTITIES):
        face = np.random.default_rng(identity).integers(0, 256, (16, 16)).astype(float)
        (folder / f"p{identity:02d}").mkdir()
        for sample in range(SAMPLES):
            noise = np.random.default_rng((identity, sample)).normal(scale=15, size=face.shape)
            Image.fromarray((face + noise).clip(0, 255).astype(np.uint8)).save(folder / f"p{identity:02d}/{sample}.png")
    return folder


@pytest.fixture(scope="module")
def data(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("set") / "data"
    run_import("folder", images, out, ImportOptions(holdout_share=1, samples_per_shard=70))
    return out


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return Embedder.open(write_embedder(tmp_path_factory.mktemp("embedder") / "tiny", onnx_model()))


def test_every_sample_has_its_vector(images, data, embedder):
    told = []
    split = Manifest.read(data).split("val")
    assert (len(split.shards), split.samples) == (5, 300)  # more than one batch, and batches across shards
    vectors_ND, labels_N = embed_split(embedder, split, lambda *step: told.append(step))
    files = sorted(images.rglob("*.png"))
    assert [split.classes[label] for label in labels_N] == [file.parent.name for file in files]
    pixels = np.stack([load_image(file.read_bytes(), embedder.preprocessing) for file in files])
    np.testing.assert_allclose(vectors_ND, embedder.embed(pixels), atol=1e-6)
    assert told == [("embed", 256, 300), ("embed", 300, 300)]


def test_what_is_found_is_what_the_protocols_find(data, embedder):
    vectors_ND, labels_N = embed_split(embedder, Manifest.read(data).split("val"))
    names = Manifest.read(data).split("val").classes
    found = evaluate_split(embedder, data, "val", unenrolled=0.4, seed=3).measured.report
    said = {"source": "folder, split 'val'", "model_id": embedder.model_id}
    assert found == measure(vectors_ND, labels_N, names, unenrolled_share=0.4, seed=3, **said).report


def test_thresholds_name_the_model_the_split_and_the_gallery(data, embedder):
    found, normaliser = calibrate_on_split(embedder, data, "val", fpir=0.1, fmr=0.01)
    assert normaliser is None
    assert found.identify.gallery_size == IDENTITIES
    assert {found.verify.model_id, found.identify.model_id} == {embedder.model_id}
    assert found.verify.source.startswith("folder, split 'val': ")
    smaller, _ = calibrate_on_split(embedder, data, "val", fpir=0.1, fmr=0.01, gallery_size=20)
    assert smaller.identify.gallery_size == 20


def test_a_cohort_is_set_aside_to_normalise_by(data, embedder):
    with pytest.raises(UserError, match="a cohort of 12 vectors is too small to normalise by; take 20"):
        calibrate_on_split(embedder, data, "val", fpir=0.1, fmr=0.01, normalise="s")


def test_a_split_that_is_not_there_is_named(data, embedder):
    with pytest.raises(UserError, match="no split 'test'"):
        evaluate_split(embedder, data, "test")


def test_a_data_set_of_format_1_is_evaluated(tmp_path, embedder):
    old = shutil.copytree(Path(__file__).parent / "data" / "format1", tmp_path / "old")
    split = Manifest.read(old).split("val")
    vectors_ND, labels_N = embed_split(embedder, split)
    assert vectors_ND.shape[0] == split.samples == 9
    assert Counter(split.classes[label] for label in labels_N) == {"ada": 4, "fay": 5}
