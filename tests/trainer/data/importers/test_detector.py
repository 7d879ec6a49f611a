"""Photographs imported through a detector: what is stored are the faces, aligned."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.detectors import painted, placed, png, write_detector
from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import
from trainer.errors import UserError

SIDE = 48
# Of three identities two photographs each, turned and scaled; the small one beside the first is somebody else.
PHOTOS = {
    "a/1.png": [(1, 200, 200, 220, 25), (9, 500, 380, 90, 0)],
    "a/2.png": [(1, 300, 240, 150, -60)],
    "b/1.jpg": [(2, 260, 220, 180, 0)],
    "b/2.png": [(2, 330, 250, 200, 170)],
    "c/1.png": [(3, 330, 250, 240, 10)],
    "c/2.png": [(3, 200, 250, 190, -10)],
}


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detector(tmp_path_factory.mktemp("detector") / "marks", SIDE)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for name, faces in PHOTOS.items():
        (root / name).parent.mkdir(exist_ok=True)
        placed(faces)[0].save(root / name)
    (root / "c/none.png").write_bytes(png(placed([])[0]))
    return root


def stored(folder: Path) -> dict[str, bytes]:
    """The image of each sample by its name in the source."""
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name, content in members.items():
            if name.endswith(".json"):
                key = name.removesuffix(".json")
                image = next(members[key + suffix] for suffix in (".png", ".jpg") if key + suffix in members)
                found[json.loads(content)["name"]] = image
    return found


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_largest_face_is_stored_upright(tmp_path: Path, photos: Path, detector: Path, jobs: int) -> None:
    options = ImportOptions(detector=str(detector), holdout_share=0, samples_per_shard=3, max_bad=0.2, jobs=jobs)
    manifest = run_import("folder", photos, tmp_path / "out", options)
    assert [(bad.name, bad.reason) for bad in manifest.bad] == [
        ("c/none.png", "image 'c/none.png' shows no face that the detector finds")
    ]
    assert len(manifest.provenance["detector"]) == 32
    found = stored(tmp_path / "out")
    assert set(found) == set(PHOTOS)
    for name, faces in PHOTOS.items():
        crop = Image.open(io.BytesIO(found[name]))
        assert (crop.size, crop.format) == ((SIDE, SIDE), "JPEG" if name.endswith("jpg") else "PNG")
        wanted = painted(faces[0][0]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        difference = np.abs(np.asarray(crop.convert("RGB"), float) - np.asarray(wanted, float))
        assert difference[3:-3, 3:-3].mean() < 9


def test_by_the_command_line(tmp_path: Path, photos: Path, detector: Path) -> None:
    line = [sys.executable, "-m", "serving.cli", "data", "import", str(photos), "--kind", "folder", "--max-bad", "0.2"]
    done = subprocess.run(
        [*line, "--detector", str(detector), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "left out: c/none.png" in done.stderr
    assert set(stored(tmp_path / "out")) == set(PHOTOS)


def test_another_detector_does_not_go_on_with_the_work_of_the_first(
    tmp_path: Path, photos: Path, detector: Path
) -> None:
    few = ImportOptions(detector=str(detector), holdout_share=0, samples_per_shard=2, max_bad=0, jobs=1)
    with pytest.raises(UserError, match="over the --max-bad"):
        run_import("folder", photos, tmp_path / "out", few)
    other = write_detector(tmp_path / "other", 32)
    options = ImportOptions(detector=str(other), holdout_share=0, samples_per_shard=2, max_bad=0.2, jobs=1)
    run_import("folder", photos, tmp_path / "out", options)
    assert {Image.open(io.BytesIO(one)).size for one in stored(tmp_path / "out").values()} == {(32, 32)}


@pytest.mark.parametrize("more", [{"in_place": True}, {"max_side": 100}, {"check": False}])
def test_what_does_not_go_together_is_refused(detector: Path, more: dict[str, object]) -> None:
    with pytest.raises(UserError, match="--detector stores crops of one size"):
        ImportOptions(detector=str(detector), **more)


def test_a_source_without_images_has_no_faces(tmp_path: Path, detector: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((8, 4), np.float32))
    np.save(tmp_path / "y.npy", np.arange(8) // 2)
    options = ImportOptions(detector=str(detector), labels=str(tmp_path / "y.npy"))
    with pytest.raises(UserError, match="the source holds vectors"):
        run_import("arrays", tmp_path / "x.npy", tmp_path / "out", options)


def test_what_is_no_detector_ends_the_import_at_once(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(UserError, match="is not a detector"):
        run_import("folder", photos, tmp_path / "out", ImportOptions(detector=str(tmp_path)))
    assert not (tmp_path / "out").exists()
