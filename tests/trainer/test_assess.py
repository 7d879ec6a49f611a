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
from trainer.evaluation.normalise import Normaliser
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
    found, normaliser, remarks = calibrate_on_split(embedder, data, "val", fpir=0.1, fmr=0.01)
    assert (normaliser, remarks) == (None, [])
    assert found.identify.gallery_size == IDENTITIES
    assert {found.verify.model_id, found.identify.model_id} == {embedder.model_id}
    assert found.verify.source.startswith("folder, split 'val': ")
    smaller, _, _ = calibrate_on_split(embedder, data, "val", fpir=0.1, fmr=0.01, gallery_size=20)
    assert smaller.identify.gallery_size == 20


def test_a_cohort_is_set_aside_to_normalise_by(data, embedder):
    with pytest.raises(UserError, match="a cohort of 12 vectors is too small to normalise by; take 20"):
        calibrate_on_split(embedder, data, "val", fpir=0.1, fmr=0.01, normalise="s")


@pytest.mark.parametrize("kind", ["z", "t", "s", "as", "csls"])
def test_normalised_scores_are_measured_as_the_service_has_them(kind, data, embedder):
    """The oracle: rank-1 and open-set searches by a loop over the subjects that are not in the cohort."""
    vectors_ND, labels_N = embed_split(embedder, Manifest.read(data).split("val"))
    cohort = np.arange(0, 22 * SAMPLES, SAMPLES)  # the first sample of 22 subjects
    normaliser = Normaliser(kind, vectors_ND[cohort])
    found = evaluate_split(embedder, data, "val", normaliser=normaliser)
    report = found.measured.report
    assert (
        report.source
        == f"folder, split 'val', {kind.upper()}-norm by a cohort of 22, 22 identities of which are left out"
    )
    assert (report.identities, report.samples) == (IDENTITIES - 22, (IDENTITIES - 22) * SAMPLES)
    kept = vectors_ND[~np.isin(labels_N, labels_N[cohort])]
    scores = normaliser.probes(kept) @ normaliser.enrolled(kept).T
    first = np.arange(0, len(kept), SAMPLES)
    hits = [scores[row, first].argmax() == row // SAMPLES for row in range(len(kept)) if row not in first]
    assert report.one_shot.rank1 == pytest.approx(np.mean(hits))
    mated = [scores[i, j] for i in range(len(kept)) for j in range(i + 1, len(kept)) if i // SAMPLES == j // SAMPLES]
    others = [scores[i, j] for i in range(len(kept)) for j in range(i + 1, len(kept)) if i // SAMPLES != j // SAMPLES]
    auc = np.mean(np.array(mated)[:, None] > np.array(others))
    assert report.verification.auc == pytest.approx(auc, abs=1e-4)
    assert report.remarks == []
    rows = np.array([0, len(kept) - 1])
    np.testing.assert_allclose(embedder.embed(found.pixels(rows)), kept[rows], atol=1e-6)


def test_the_cohort_may_be_of_another_split(images, embedder, tmp_path):
    out = tmp_path / "two"
    run_import("folder", images, out, ImportOptions(holdout_share=0.5, samples_per_shard=70))
    found, normaliser, _ = calibrate_on_split(
        embedder, out, "val", fpir=0.1, fmr=0.01, normalise="csls", cohort="train"
    )
    assert found.identify.subjects == 30  # nobody is set aside
    assert "CSLS-norm by 30 subjects of split 'train'" in found.identify.source
    vectors_ND, labels_N = embed_split(embedder, Manifest.read(out).split("train"))
    nearest = (normaliser.cohort_KD @ vectors_ND.T).argmax(axis=1)
    assert sorted(labels_N[nearest].tolist()) == list(range(30))


def test_a_split_that_is_not_there_is_named(data, embedder):
    with pytest.raises(UserError, match="no split 'test'"):
        evaluate_split(embedder, data, "test")


def test_a_data_set_of_format_1_is_evaluated(tmp_path, embedder):
    old = shutil.copytree(Path(__file__).parent / "data" / "format1", tmp_path / "old")
    split = Manifest.read(old).split("val")
    vectors_ND, labels_N = embed_split(embedder, split)
    assert vectors_ND.shape[0] == split.samples == 9
    assert Counter(split.classes[label] for label in labels_N) == {"ada": 4, "fay": 5}
