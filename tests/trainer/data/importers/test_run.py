import json
import shutil
import tarfile
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import ExifTags, Image

from trainer.data.image import decode
from trainer.data.importers import ImportOptions, shards, share_held_out
from trainer.data.importers.run import run_import
from trainer.data.manifest import Manifest
from trainer.data.verify import verify
from trainer.errors import UserError

WHOLE = ImportOptions(holdout_share=0, samples_per_shard=10)


def stored(folder: Path, manifest: Manifest, split: str = "train") -> dict[str, tuple[str, int, bytes]]:
    """By the name of the source: suffix, label and bytes of each image."""
    found = {}
    for entry in manifest.splits[split].shards:
        with tarfile.open(folder / entry.name) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        for name, data in files.items():
            key, suffix = name.split(".")
            if suffix in ("png", "jpg"):
                described = json.loads(files[f"{key}.json"])
                assert manifest.split(split).classes[int(files[f"{key}.cls"])] == described["identity"]
                found[described["name"]] = (suffix, int(files[f"{key}.cls"]), data)
    return found


@pytest.fixture
def people(tmp_path: Path, image_folder: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(image_folder, tmp_path / "people"))


def test_everything_arrives(data_set: Path, manifest: Manifest, image_folder: Path):
    split = manifest.split("train")
    assert split.classes.names() == ["ada", "bob", "cy", "dot", "eve", "fay", "gus"]
    assert split.classes.counts().tolist() == [9, 4, 7, 5, 12, 4, 6]
    assert [entry.samples for entry in split.shards] == [10, 10, 10, 10, 7]
    assert (manifest.kind, manifest.image_mode, manifest.bad) == ("folder", "L", [])
    found = stored(data_set, manifest)
    assert len(found) == 47
    for name, (suffix, label, data) in found.items():
        assert (suffix, data) == ("png", (image_folder / name).read_bytes())
        assert split.classes[label] == name.split("/")[0]
    verify(manifest)


def test_same_input_gives_the_same_bytes(tmp_path: Path, data_set: Path, people: Path):
    for path in sorted(people.rglob("*.png"), reverse=True):  # another order and other times on the disk
        path.write_bytes(path.read_bytes())
    run_import("folder", people, tmp_path / "again", WHOLE)
    names = sorted(path.name for path in data_set.iterdir())
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (data_set / name).read_bytes()


def test_another_seed_gives_another_order(tmp_path: Path, image_folder: Path, manifest: Manifest):
    options = ImportOptions(holdout_share=0, samples_per_shard=10, seed=1)
    other = run_import("folder", image_folder, tmp_path / "set", options)
    assert other.splits["train"].shards[0].sha256 != manifest.splits["train"].shards[0].sha256


def test_identities_are_held_out_whole(tmp_path: Path, image_folder: Path):
    made = run_import("folder", image_folder, tmp_path / "set", ImportOptions(holdout_share=0.4))
    train, val = made.split("train"), made.split("val")
    assert (len(train.classes), len(val.classes)) == (4, 3)
    assert not set(train.classes) & set(val.classes)
    assert train.samples + val.samples == 47
    assert len(stored(tmp_path / "set", made, "val")) == val.samples
    assert [entry.name for entry in val.shards] == ["val-000000.tar"]


def test_unreadable_images_are_named_counted_and_left_out(tmp_path: Path, people: Path):
    whole = (people / "eve" / "03.png").read_bytes()
    (people / "eve" / "03.png").write_bytes(whole[: len(whole) // 2])
    (people / "gus" / "00.png").write_text("a cat, from memory")
    made = run_import("folder", people, tmp_path / "set", ImportOptions(holdout_share=0, max_bad=0.05))
    assert [bad.name for bad in made.bad] == ["eve/03.png", "gus/00.png"]
    assert "damaged" in made.bad[0].reason
    assert "not an image" in made.bad[1].reason
    assert made.splits["train"].samples == 45
    assert Manifest.read(tmp_path / "set").model_dump() == made.model_dump()


def test_too_many_unreadable_images_fail(tmp_path: Path, people: Path):
    (people / "gus" / "00.png").write_text("a cat, from memory")
    with pytest.raises(UserError, match=r"1 or more of 47 samples .* --max-bad 0\.01 .*gus/00\.png"):
        run_import("folder", people, tmp_path / "set", WHOLE)
    assert not (tmp_path / "set").exists()


def test_share_of_bad_images_that_is_just_allowed(tmp_path: Path, people: Path):
    (people / "gus" / "00.png").write_text("a cat, from memory")
    assert len(run_import("folder", people, tmp_path / "a", ImportOptions(max_bad=1 / 47)).bad) == 1
    with pytest.raises(UserError, match="max-bad"):
        run_import("folder", people, tmp_path / "b", ImportOptions(max_bad=0.99 / 47))


def test_identity_without_readable_images_is_no_class(tmp_path: Path, people: Path):
    (people / "hal").mkdir()
    (people / "hal" / "0.png").write_bytes(b"")
    made = run_import("folder", people, tmp_path / "set", ImportOptions(holdout_share=0, max_bad=0.05))
    assert "hal" not in made.split("train").classes
    assert [bad.name for bad in made.bad] == ["hal/0.png"]
    assert sum(entry.samples for entry in made.splits["train"].shards) == 47
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == [
        "manifest.json", "train-000000.idx", "train-000000.tar", "train.by_class.npy", "train.classes.arrow",
    ]  # fmt: skip


def test_small_identities_can_be_left_out(tmp_path: Path, people: Path):
    for path in (people / "dot").glob("0[0-1].png"):  # 5 become 3 readable ones
        path.write_bytes(b"")
    options = ImportOptions(holdout_share=0, min_samples=5, max_bad=0.1)
    made = run_import("folder", people, tmp_path / "set", options)
    assert made.split("train").classes.names() == ["ada", "cy", "eve", "gus"]
    assert made.provenance["identities_left_out"] == "3 with fewer than 5 readable images"


@pytest.mark.parametrize("names", [[], ["ada"]])
def test_fewer_than_two_identities_fail(tmp_path: Path, people: Path, names: list[str]):
    for folder in people.iterdir():
        if folder.name not in names:
            shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"2 identities|holds no samples"):
        run_import("folder", people, tmp_path / "set", WHOLE)


def test_split_of_one_identity_fails(tmp_path: Path, people: Path):
    names = sorted(path.name for path in people.iterdir())
    held_out = [names[i] for i in share_held_out(0.5, 0)(names)]
    for name in held_out[1:]:
        for path in (people / name).iterdir():
            path.write_bytes(b"")
    with pytest.raises(UserError, match=r"at least 2 identities .* 1 in the val split"):
        run_import("folder", people, tmp_path / "set", ImportOptions(holdout_share=0.5, max_bad=1))


def test_all_identities_can_be_held_out(tmp_path: Path, image_folder: Path):
    made = run_import("folder", image_folder, tmp_path / "set", ImportOptions(holdout_share=1))
    assert list(made.splits) == ["val"]


def test_what_is_kept_and_what_is_stored_anew(tmp_path: Path):
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    saved = {
        "a/grey.png": (grey, {}),
        "a/bits.png": (grey.point(lambda v: 255 * (v > 30)).convert("1"), {}),
        "a/photo.jpeg": (grey, {"quality": 90}),
        "a/turned.jpg": (grey, {"exif": exif}),
        "a/turned.png": (grey, {"exif": exif}),
        "b/grey.pgm": (grey, {}),
        "b/moving.gif": (grey, {}),
        "b/clear.png": (Image.new("LA", (8, 8), (0, 128)), {}),
        "b/grey.tiff": (grey.transpose(Image.Transpose.ROTATE_90), {}),
    }
    for name, (image, options) in saved.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "in" / name, **options)
    made = run_import("folder", tmp_path / "in", tmp_path / "set", WHOLE)
    assert made.image_mode == "L"
    found = stored(tmp_path / "set", made)
    kept = {name for name, (_, _, data) in found.items() if data == (tmp_path / "in" / name).read_bytes()}
    assert kept == {"a/grey.png", "a/bits.png", "a/photo.jpeg", "a/turned.jpg"}
    assert {name for name, (suffix, _, _) in found.items() if suffix == "jpg"} == {"a/photo.jpeg", "a/turned.jpg"}
    for name, (_, _, data) in found.items():
        again, original = decode(data), decode((tmp_path / "in" / name).read_bytes())
        assert again.plain or name == "a/turned.jpg"
        np.testing.assert_array_equal(np.asarray(again.image), np.asarray(original.image))


def test_colour_anywhere_makes_a_colour_set(tmp_path: Path, people: Path):
    Image.new("RGB", (9, 9), (200, 30, 30)).save(people / "ada" / "red.jpg")
    assert run_import("folder", people, tmp_path / "set", WHOLE).image_mode == "RGB"


def test_progress_is_told_over_both_splits(tmp_path: Path, people: Path):
    for i in range(90):
        Image.new("L", (8, 8), 2 * i).save(people / "ada" / f"x{i}.png")
    told: list[tuple[str, int, int]] = []
    run_import("folder", people, tmp_path / "set", ImportOptions(holdout_share=0.5), lambda *step: told.append(step))
    assert told[0] == ("list", 137, 0)
    assert {(stage, total) for stage, _, total in told[1:]} == {("import", 137)}
    done = [done for _, done, _ in told[1:]]
    assert done == sorted(done)
    assert done[-1] == 137
    assert max(np.diff([0, *done])) == 64


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_bad": 1.5}, r"--max-bad 1\.5"),
        ({"holdout_share": -0.1}, "--holdout-share"),
        ({"min_samples": 0}, "--min-samples 0"),
        ({"seed": -1}, "--seed -1"),
        ({"samples_per_shard": 0}, "--samples-per-shard 0"),
    ],
)
def test_options_out_of_range(options: dict, words: str):
    with pytest.raises(UserError, match=words):
        ImportOptions(**options)


def test_unknown_kind(tmp_path: Path):
    with pytest.raises(UserError, match=r"--kind faces is not known; allowed: omniglot, folder, glyphs"):
        run_import("faces", tmp_path, tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("jobs", [1, 3])
def test_set_is_written_to_a_folder_of_this_machine(tmp_path: Path, image_folder: Path, jobs: int):
    with pytest.raises(UserError, match=r"--out 's3://bucket/set' is not a folder of this machine; import into one"):
        run_import("folder", image_folder, "s3://key:secret@bucket/set", ImportOptions(jobs=jobs))


def test_image_of_two_identities_is_listed(tmp_path: Path, people: Path):
    shutil.copy(people / "ada" / "00.png", people / "bob" / "copy.png")
    shutil.copy(people / "ada" / "00.png", people / "cy" / "copy.png")
    shutil.copy(people / "eve" / "00.png", people / "fay" / "copy.png")
    made = run_import("folder", people, tmp_path / "set", WHOLE)
    assert made.provenance["images_of_several_identities"] == "2, all in duplicates.jsonl"
    lines = (tmp_path / "set" / "duplicates.jsonl").read_text().splitlines()
    found = {frozenset(image["name"] for image in json.loads(line)["images"]) for line in lines}
    assert found == {
        frozenset({"ada/00.png", "bob/copy.png", "cy/copy.png"}), frozenset({"eve/00.png", "fay/copy.png"})
    }  # fmt: skip
    assert made.splits["train"].samples == 50


def test_same_checksum_and_size_make_no_duplicates(tmp_path: Path, people: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "zlib", SimpleNamespace(crc32=lambda data: 7))
    monkeypatch.setattr("trainer.data.importers.finish._AT_A_TIME", 10)
    shutil.copy(people / "ada" / "00.png", people / "ada" / "copy.png")
    made = run_import("folder", people, tmp_path / "set", WHOLE)
    assert made.provenance["duplicates_left_out"] == "1"
    assert made.splits["train"].samples == 47


def test_duplicates_within_an_identity_are_left_out(tmp_path: Path, people: Path):
    shutil.copy(people / "ada" / "00.png", people / "ada" / "copy.png")
    shutil.copy(people / "ada" / "00.png", people / "bob" / "copy.png")  # another identity's: not for us to decide
    made = run_import("folder", people, tmp_path / "set", WHOLE)
    assert made.provenance["duplicates_left_out"] == "1"
    classes = made.split("train").classes
    assert classes.counts()[classes.index("ada")] == 9
    assert made.splits["train"].samples == 48


def test_pgm_has_its_pixels(tmp_path: Path):
    random = np.random.default_rng(0)
    pixels = {}
    for name in ("s1/1.pgm", "s1/2.pgm", "s2/1.pgm", "s2/2.pgm"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels[name] = random.integers(0, 256, (11, 9), dtype=np.uint8)
        (tmp_path / "in" / name).write_bytes(b"P5\n# made by hand\n9 11\n255\n" + pixels[name].tobytes())
    made = run_import("folder", tmp_path / "in", tmp_path / "set", WHOLE)
    assert made.image_mode == "L"
    for name, (suffix, _, data) in stored(tmp_path / "set", made).items():
        assert suffix == "png"
        np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(data))), pixels[name])
