"""Views: the samples that they show, and Embedders whose vectors are means over them."""

import json
import shutil

import numpy as np
import pytest
from scipy.ndimage import affine_transform, shift
from typer.testing import CliRunner

from serving.cli import app
from tests.serving.conftest import onnx_model, write_embedder
from trainer.embedder import Embedder, EmbedderManifest, write_with_views
from trainer.errors import UserError
from trainer.views import checked, seen


def pictures(count=3, side=16):
    return np.random.default_rng(5).integers(0, 256, (count, 1, side, side), np.uint8)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_embedder(tmp_path_factory.mktemp("views") / "plain", onnx_model())


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ("same", lambda x: x),
        ("flip", lambda x: x[..., ::-1]),
        ("left2", lambda x: shift(x, (0, 0, 0, -2), order=0, mode="nearest")),
        ("right3", lambda x: shift(x, (0, 0, 0, 3), order=0, mode="nearest")),
        ("up1", lambda x: shift(x, (0, 0, -1, 0), order=0, mode="nearest")),
        ("down4", lambda x: shift(x, (0, 0, 4, 0), order=0, mode="nearest")),
        ("turn90", lambda x: np.rot90(x, axes=(2, 3))),
        ("turn-90", lambda x: np.rot90(x, -1, axes=(2, 3))),
        ("turn180", lambda x: x[..., ::-1, ::-1]),
        ("flip+turn90", lambda x: np.rot90(x[..., ::-1], axes=(2, 3))),
        ("turn90+flip", lambda x: np.rot90(x, axes=(2, 3))[..., ::-1]),
        ("left2+flip+up1", lambda x: shift(x, (0, 0, -1, -2), order=0, mode="nearest")[..., ::-1]),
    ],
)
def test_views_that_move_whole_pixels_are_exact(view, expected):
    for samples in (pictures(), pictures().astype(np.float32) / 7):
        found = seen(samples, view)
        np.testing.assert_array_equal(found, expected(samples))
        assert found.dtype == samples.dtype


@pytest.mark.parametrize("view", ["turn12.5", "turn-3", "zoom1.2", "zoom0.8", "left0.5"])
def test_values_between_pixels_are_those_of_scipy(view):
    """The oracle is another program's bilinear interpolation, pulled about the same middle."""
    samples = pictures(2, 21)[:, :, :, :18].astype(np.float32)
    amount = float(view.lstrip("turnzomlef"))
    angle, factor, left = 0.0, 1.0, 0.0
    if view.startswith("turn"):
        angle = np.deg2rad(amount)
    elif view.startswith("zoom"):
        factor = amount
    else:
        left = amount
    pull = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / factor  # of (y, x)
    middle = np.array([10, 8.5])
    offset = middle - pull @ middle + [0, left]
    wanted = [affine_transform(one[0], pull, offset, order=1, mode="nearest") for one in samples]
    np.testing.assert_allclose(seen(samples, view)[:, 0], wanted, atol=2e-3)
    np.testing.assert_allclose(seen(np.rint(samples).astype(np.uint8), view)[:, 0], wanted, atol=0.502)


@pytest.mark.parametrize(
    "views",
    [["sideways"], ["flip+"], ["+flip"], ["flip+sideways"],
     ["left"], ["flip2"], ["zoom3"], ["zoom"], ["turn181"], ["left-1"], ["LEFT1"], [""], ["same", "same"],
     [f"turn{degrees}" for degrees in range(33)], ["left1\n"], ["left1e1"], ["turn٣"]],
)  # fmt: skip
def test_what_is_no_view_is_refused(views):
    with pytest.raises(UserError, match=r"is no view of a sample; allowed: same|name each once, 32 at most"):
        checked(views)


def test_vectors_are_the_normalised_means_over_views(plain, tmp_path):
    views = ("same", "flip", "left2", "turn10")
    made = write_with_views(plain, tmp_path / "mean", views, overwrite=False)
    before, after = Embedder.open(plain, batch_size=2), Embedder.open(tmp_path / "mean", batch_size=2)
    samples = pictures(5)
    sums_BD = np.zeros((5, 32))
    for view in views:
        sums_BD += before.embed(seen(samples, view))
    np.testing.assert_allclose(after.embed(samples), sums_BD / np.linalg.norm(sums_BD, axis=1)[:, None], atol=1e-6)
    assert after.model_id == made.model_id != before.model_id
    assert made.calibration is None
    assert made.dimension == 32


def test_views_of_other_identities_are_laid_one_behind_the_other(plain, tmp_path):
    views = ("same", "turn90", "flip+turn90")
    made = write_with_views(plain, tmp_path / "joined", views, overwrite=False, join="concatenate")
    before, after = Embedder.open(plain), Embedder.open(tmp_path / "joined", batch_size=2)
    samples = pictures(5)
    parts = [before.embed(seen(samples, view)) for view in views]
    np.testing.assert_allclose(after.embed(samples), np.hstack(parts) / np.sqrt(3), atol=1e-6)
    assert made.dimension == after.embed(samples).shape[1] == 3 * 32
    assert after.embed(samples[:0]).shape == (0, 3 * 32)
    means = write_with_views(tmp_path / "joined", tmp_path / "mean", views, overwrite=False)
    alone = write_with_views(tmp_path / "joined", tmp_path / "alone", (), overwrite=False, join="concatenate")
    assert (means.dimension, alone.dimension, alone.model_id) == (32, 32, before.model_id)
    assert len({made.model_id, means.model_id, before.model_id}) == 3
    path = tmp_path / "joined/manifest.json"
    told = json.loads(path.read_text())
    for change, words in (
        ({"join": "mean"}, "was changed after export"),
        ({"dimension": 32}, "names dimension 32"),
        ({"join": "sum"}, "is not an embedder's manifest"),
    ):
        path.write_text(json.dumps(told | change))
        with pytest.raises(UserError, match=words):
            Embedder.open(tmp_path / "joined")


def test_views_that_the_manifest_did_not_have_are_noticed(plain, tmp_path):
    """Vectors of other views are those of another model."""
    write_with_views(plain, tmp_path / "mean", ("same", "flip"), overwrite=False)
    path = tmp_path / "mean/manifest.json"
    told = json.loads(path.read_text())
    for views in (["same", "left1"], [], ["flip", "same"]):
        path.write_text(json.dumps(told | {"views": views}))
        with pytest.raises(UserError, match="was changed after export"):
            Embedder.open(tmp_path / "mean")


def test_manifests_without_views_are_read_as_before(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "old")
    path = tmp_path / "old/manifest.json"
    told = json.loads(path.read_text())
    del told["views"], told["join"]
    path.write_text(json.dumps(told))
    old, new = Embedder.open(tmp_path / "old"), Embedder.open(plain)
    assert old.model_id == new.model_id
    np.testing.assert_array_equal(old.embed(pictures()), new.embed(pictures()))


def test_an_image_whose_view_has_nothing_in_it_is_refused(plain, tmp_path):
    write_with_views(plain, tmp_path / "far", ("same", "left15"), overwrite=False)
    samples = pictures(2)
    samples[1, :, :, -1] = 7  # all that is left when it has moved
    with pytest.raises(UserError, match="the model gave sample 1 a vector of length 0"):
        Embedder.open(tmp_path / "far").embed(samples)


def test_vectors_have_no_views():
    form = {"content": "vector", "shape": [4]}
    with pytest.raises(ValueError, match="views are of images and spectrograms"):
        EmbedderManifest(model_id="0", dimension=4, preprocessing=form, views=["flip"])


def test_the_command_writes_another_embedder(plain, tmp_path):
    out = tmp_path / "seen"
    call = ["export", "--embedder", str(plain), "--out", str(out), "--views", "same, left1, right1"]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert "means over same, left1, right1" in done.output.replace("\n", " ")
    assert Embedder.open(out).manifest.views == ("same", "left1", "right1")
    again = CliRunner().invoke(app, call)
    assert isinstance(again.exception, UserError)
    assert "is an embedder already" in str(again.exception)
    joined = CliRunner().invoke(app, [*call, "--overwrite", "--join", "concatenate"])
    assert joined.exit_code == 0, joined.output
    assert "96 dimensions, one behind the other of same, left1, right1" in joined.output.replace("\n", " ")
    assert Embedder.open(out).manifest.join == "concatenate"
    alone = CliRunner().invoke(app, ["export", "--embedder", str(plain), "--views", "flip"])
    assert "--out NEW" in str(alone.exception)
