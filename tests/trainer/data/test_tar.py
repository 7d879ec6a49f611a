"""The walk through WebDataset tars, of others too: against archives that `tarfile` and GNU tar write."""

import contextlib
import io
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from trainer.data.tar import TarSample, samples_of
from trainer.errors import UserError

GOOD = {"a.cls": b"0", "a.png": b"x", "b.cls": b"1", "b.jpg": b"y"}


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.USTAR_FORMAT, **about: object) -> Path:
    with tarfile.open(path, "w", format=form, **about) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(path: Path) -> list[TarSample]:
    with path.open("rb") as file:
        return list(samples_of(file, path.name))


def test_samples_agree_with_tarfile(data_set: Path):
    path = data_set / "train-000001.tar"
    samples = read(path)
    assert [sample.key for sample in samples] == [f"{number:09d}" for number in range(10, 20)]
    with tarfile.open(path) as tar:
        for sample in samples:
            member = tar.getmember(f"{sample.key}.png")
            assert (sample.offset, len(sample.payload)) == (member.offset_data, member.size)
            assert sample.payload == tar.extractfile(member).read()
            assert sample.label == int(tar.extractfile(f"{sample.key}.cls").read())
            assert sample.text == tar.extractfile(f"{sample.key}.json").read()


def test_any_plain_webdataset_shard_is_read(tmp_path: Path):
    members = {"x/a.png": b"1", "x/a.json": b"{}", "x/a.cls": b"1\n", "./x.y/b.txt": b"?", "./x.y/b.JPG": b"23"}
    first, second = read(write_tar(tmp_path / "s.tar", members))
    assert (first.key, first.suffix, first.payload, first.label, first.text) == ("x/a", "png", b"1", 1, b"{}")
    assert (second.key, second.suffix, second.payload, second.label, second.text) == ("x.y/b", "jpg", b"23", None, b"")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_whole(tmp_path: Path, form: int):
    keys = ["d" * 90 + "/" + "k" * 200, "ä" * 80, "short", "p/" * 60 + "end"]
    members = {f"{key}.{suffix}": suffix.encode() + key[:3].encode() for key in keys for suffix in ("cls", "jpg")}
    samples = read(write_tar(tmp_path / "s.tar", members, form))
    assert [sample.key for sample in samples] == keys
    assert [sample.payload for sample in samples] == [members[f"{key}.jpg"] for key in keys]


def test_global_headers_and_folders_are_passed_over(tmp_path: Path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "made by hand"}) as tar:
        info = tarfile.TarInfo("d")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
        info = tarfile.TarInfo("d/a.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert [(sample.key, sample.payload) for sample in read(path)] == [("d/a", b"abc")]


def test_what_gnu_tar_writes_is_read(tmp_path: Path):
    folder = tmp_path / ("f" * 80) / ("g" * 60)
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"p" * 700)
    (folder / "a.cls").write_text("3\n")
    for form in ("gnu", "pax", "ustar", "oldgnu"):
        subprocess.run(
            ["tar", f"--format={form}", "--sort=name", "-cf", tmp_path / "s.tar", "f" * 80], cwd=tmp_path, check=True
        )
        (sample,) = read(tmp_path / "s.tar")
        assert (sample.key, sample.label, sample.payload) == ("f" * 80 + "/" + "g" * 60 + "/a", 3, b"p" * 700)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "x/../../a.png", "d" * 200 + "/../a.png"])
def test_a_path_that_leads_out_is_refused(tmp_path: Path, name: str, form: int):
    with pytest.raises(UserError, match=r"s\.tar' holds '.*a\.png', a path that leads out"):
        read(write_tar(tmp_path / "s.tar", {name: b"x"}, form))


@pytest.mark.parametrize("label", [b"-1", b"9" * 30, b"one", b""])
def test_what_is_no_label_is_none(tmp_path: Path, label: bytes):
    assert read(write_tar(tmp_path / "s.tar", {"a.cls": label, "a.png": b"x"}))[0].label is None


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a.cls": b"0", "b.png": b"x"}, "sample 'a' of shard 's.tar' lacks an image"),
        ({"a.png": b"x", "a.PNG": b"y"}, "sample 'a' of shard 's.tar' has two files '.png'"),
        ({"a.png": bytes(10 * 2**20 + 1)}, "'a.png' of shard 's.tar' has 10485761 bytes; at most 10485760"),
        ({"a.png": b"x", "a.json": bytes(2**20 + 1)}, "'a.json' of shard 's.tar' has 1048577 bytes"),
    ],
)
def test_unusable_sample_is_named(tmp_path: Path, members: dict[str, bytes], words: str):
    with pytest.raises(UserError, match=words):
        read(write_tar(tmp_path / "s.tar", members))


@pytest.mark.parametrize("keep", [0, 100, 600, 1536, 1800])
def test_cut_off_shard_is_named(tmp_path: Path, keep: int):
    path = write_tar(tmp_path / "s.tar", GOOD)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"shard 's\.tar' is cut off"):
        read(path)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_garbage_is_no_shard(tmp_path: Path, form: int):
    members = GOOD if form == tarfile.USTAR_FORMAT else {"ä" * 60 + name: data for name, data in GOOD.items()}
    whole = write_tar(tmp_path / "s.tar", members, form).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(whole)
        for place in rng.integers(0, len(whole), 8):
            data[place] = rng.integers(256)
        (tmp_path / "t.tar").write_bytes(data)
        with contextlib.suppress(UserError):  # and nothing else
            read(tmp_path / "t.tar")
    (tmp_path / "t.tar").write_bytes(b"PK\3\4" * 1000)
    with pytest.raises(UserError, match="damaged at byte 0"):
        read(tmp_path / "t.tar")


def test_files_that_belong_to_no_sample_are_passed_over(tmp_path: Path):
    beside = {"._a.png": b"x", "./._a.cls": b"x", ".DS_Store": b"x", "README": b"x", "x/.hidden.png": b"x"}
    (only,) = read(write_tar(tmp_path / "s.tar", beside | {"a.cls": b"0", "a.png": b"x"}))
    assert (only.key, only.label) == ("a", 0)
