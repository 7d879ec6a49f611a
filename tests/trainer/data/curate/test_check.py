"""`data check` on sound and on damaged sets."""

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont
from typer.testing import CliRunner

from serving.cli import app
from tests.peak import at_most
from trainer.data.arrays import as_payload
from trainer.data.curate import scan as scanning
from trainer.data.curate.check import Balance, check
from trainer.data.curate.holdout import hold_out
from trainer.data.curate.merge import merge
from trainer.data.curate.report import write_report
from trainer.data.curate.sheet import Row, _fit, draw
from trainer.data.importers.run import ImportOptions, run_import
from trainer.data.manifest import Manifest
from trainer.errors import UserError

FORMAT1 = Path(__file__).parent.parent / "format1"
Copy = Callable[[Path], Path]


@pytest.fixture(scope="module")
def doubled(tmp_path_factory: pytest.TempPathFactory, noise: Callable[..., Image.Image]) -> Path:
    """Five identities of six smooth pictures; `ada/0.png` is also `bob/0.png`, and `cy/0.jpg` is nearly `dot/0.png`."""
    root = tmp_path_factory.mktemp("doubled")
    for i, person in enumerate(["ada", "bob", "cy", "dot", "eve"]):
        (root / "images" / person).mkdir(parents=True)
        for k in range(6):
            noise(100 * i + k, 16).resize((64, 64), Image.Resampling.BICUBIC).save(root / f"images/{person}/{k}.png")
    (root / "images/bob/0.png").write_bytes((root / "images/ada/0.png").read_bytes())
    with Image.open(root / "images/dot/0.png") as image:
        image.save(root / "images/cy/near.jpg", quality=90)
    run_import("folder", root / "images", root / "set", ImportOptions(holdout_share=0, samples_per_shard=10))
    return root / "set"


def identities(address: Path, pairs: list[tuple[int, int]]) -> list[tuple[str, str]]:
    split = Manifest.read(address).split("train")
    labels = np.concatenate([split.index(shard).labels for shard in range(len(split.shards))])
    return [(split.classes[int(labels[one])], split.classes[int(labels[two])]) for one, two in pairs]


@pytest.mark.parametrize("jobs", [1, 2])
def test_copies_in_two_identities_are_found_by_any_number_of_processes(
    doubled: Path, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "_CHUNK", 7)
    found = check(doubled, jobs=jobs)
    assert not found.faults
    (equal,) = identities(doubled, list(zip(found.equal.first, found.equal.second, strict=True)))
    assert sorted(equal) == ["ada", "bob"]
    (near,) = identities(doubled, list(zip(found.near.first, found.near.second, strict=True)))
    assert sorted(near) == ["cy", "dot"]
    assert (found.equal_within, found.near_within) == (0, 0)
    assert found.wrong
    assert found.scan.good.all()


def test_the_same_image_in_two_splits_is_a_fault(doubled: Path, tmp_path: Path) -> None:
    hold_out(doubled, tmp_path / "drawn", by="identity", share=0.4, into="val")
    again = merge([doubled, tmp_path / "drawn"], tmp_path / "both", prefix=True)
    found = check(tmp_path / "both", jobs=1)
    splits = found.scan.split_of(found.equal.second)
    assert (found.scan.split_of(found.equal.first) != splits).any()
    assert len(found.scan.good) == sum(entry.samples for entry in again.splits.values())
    assert found.wrong


def test_a_sound_set_passes_with_a_histogram_and_a_sheet(data_set: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["data", "check", str(data_set), "--out", str(tmp_path), "--jobs", "1"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "train: 47 samples of 7 identities; 4 to 12 each, 6 in the median"
    assert [line.split() for line in lines[1:4]] == [
        ["3-4", "█" * 27, "2"], ["5-8", "█" * 40, "3"], ["9-16", "█" * 27, "2"],
    ]  # fmt: skip
    assert lines[-1] == f"{data_set}: nothing is wrong"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["check.json", "duplicates.csv", "samples.png"]
    told = json.loads((tmp_path / "check.json").read_text())
    assert told["faults"] == []
    assert told["splits"]["train"]["bins"][-1] == [9, 16, 2]
    with Image.open(tmp_path / "samples.png") as sheet:
        assert sheet.height > 7 * 96


def test_what_is_wrong_is_told_and_the_exit_code_is_1(doubled: Path, copy: Copy, tmp_path: Path) -> None:
    damaged = copy(doubled)
    split = Manifest.read(damaged).split("train")
    record = split.index(1).records[3]
    with split.path(1).open("r+b") as file:
        file.seek(int(record["offset"]) + 20)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    split.path(0).unlink()
    done = CliRunner().invoke(app, ["data", "check", str(damaged), "--jobs", "1"])
    assert done.exit_code == 1
    told = json.loads((tmp_path / "copy-check/check.json").read_text())
    assert len(told["faults"]) == 3
    assert "train-000000.tar' cannot be read: No such file" in told["faults"][0]
    assert "train-000001.tar' has SHA-256" in told["faults"][1]
    assert f"sample '{split.index(1).key(3)}'" in told["faults"][2]
    assert "its CRC-32 is wrong" in told["faults"][2]
    assert "nothing is wrong" not in done.output
    assert (tmp_path / "copy-check/samples.png").exists()


def test_a_set_without_its_names_is_examined_all_the_same(doubled: Path, copy: Copy, tmp_path: Path) -> None:
    damaged = copy(doubled)
    (damaged / "train.classes.arrow").unlink()
    done = CliRunner().invoke(app, ["data", "check", str(damaged), "--out", str(tmp_path / "out"), "--jobs", "1"])
    assert done.exit_code == 1
    assert "train.classes.arrow" in json.loads((tmp_path / "out/check.json").read_text())["faults"][0]
    assert "equal,across identities" in (tmp_path / "out/duplicates.csv").read_text()


def test_the_list_of_copies_says_where_each_one_is(doubled: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["data", "check", str(doubled), "--out", str(tmp_path), "--jobs", "1"])
    assert done.exit_code == 1
    header, equal, near = (line.split(",") for line in (tmp_path / "duplicates.csv").read_text().splitlines())
    assert header[:6] == ["bits", "where", "split_a", "shard_a", "key_a", "identity_a"]
    assert (equal[0], equal[1], sorted((equal[5], equal[9]))) == ("equal", "across identities", ["ada", "bob"])
    assert (near[1], sorted((near[5], near[9]))) == ("across identities", ["cy", "dot"])
    assert (tmp_path / "duplicates.png").exists()


def test_a_sample_that_is_no_image_is_named(doubled: Path, copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are as they were written and yet no image, as tars of others may have them."""

    def refuses(data: bytes, name: str) -> None:
        raise UserError(f"image '{name}' is damaged")

    monkeypatch.setattr(scanning, "decode", refuses)
    found = check(doubled, jobs=1)
    assert len(found.faults) == 31
    assert found.faults[0] == "image 'train-000000.tar: 000000000' is damaged"
    assert not found.scan.good.any()
    assert len(found.equal) == len(found.near) == 0


def test_arrays_are_compared_with_the_manifests_shape() -> None:
    manifest = Manifest.read(FORMAT1).model_copy(update={"content": "vector", "image_mode": None, "shape": [3]})
    worker = scanning.Examiner(manifest)
    assert worker.decode(as_payload(np.array([1.0, 2.0, 3.0])), "a.tar: key") == 0
    with pytest.raises(UserError, match=r"sample 'a.tar: key' .* is not a whole .npy file of shape \(3,\)"):
        worker.decode(as_payload(np.array([1.0, 2.0])), "a.tar: key")


def test_a_killed_process_is_one_sentence(doubled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "_CHUNK", 7)

    others = set(multiprocessing.active_children())  # of earlier tests

    def kill() -> None:
        while not (children := set(multiprocessing.active_children()) - others):
            time.sleep(0.01)
        children.pop().kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(UserError, match="one of the 2 processes that decode was killed, perhaps for want of memory"):
        check(doubled, jobs=2)
    killer.join()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"distance": 13}, "--distance 13 is not allowed; give 0 to 12 bits"),
        ({"distance": -1}, "--distance -1 is not allowed"),
        ({"jobs": 0}, "--jobs 0 is not allowed; give 1 or more"),
    ],
)
def test_bad_options_are_one_sentence(doubled: Path, options: dict[str, int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check(doubled, **options)  # type: ignore[arg-type]


def test_the_bins_hold_every_identity() -> None:
    counts = np.array([1, 2, 3, 4, 5, 8, 9, 16, 17, 100])
    balance = Balance.of(counts)
    assert balance.bins == [
        (1, 1, 1), (2, 2, 1), (3, 4, 2), (5, 8, 2), (9, 16, 2), (17, 32, 1), (33, 64, 0), (65, 128, 1),
    ]  # fmt: skip
    assert (balance.fewest, balance.median, balance.most) == (1, 6.5, 100)


def test_names_of_any_length_are_drawn(tmp_path: Path) -> None:
    draw("x" * 10**6, [Row("ab" * 10**6, ())])
    font = ImageFont.load_default(14)
    fitted = _fit("some words " * 50, font, 300)
    assert font.getlength(fitted) <= 300 < font.getlength(("some words " * 50)[: len(fitted)] + "\u2026")
    assert fitted.endswith("\u2026")
    assert _fit("short", font, 300) == "short"
    assert _fit("short", font, 0) == "\u2026"


def test_the_report_goes_beside_the_set_or_nowhere(
    data_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data_set, tmp_path / "set")
    monkeypatch.chdir(tmp_path / "set")
    assert CliRunner().invoke(app, ["data", "check", "."]).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "set-check"]
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", "/proc/none"):
        with pytest.raises(UserError, match=r"cannot be written: .*; give another --out"):
            write_report(check(data_set, jobs=1), Path(out))
    assert CliRunner().invoke(app, ["data", "check", ".", "--seed", "-1"]).exit_code == 2


def test_samples_that_are_only_claimed_get_no_room(data_set: Path, tmp_path: Path) -> None:
    shutil.copytree(data_set, tmp_path / "set")
    tree = json.loads((tmp_path / "set" / "manifest.json").read_text())
    train = tree["splits"]["train"]
    train["shards"][0] |= {"samples": 2**32, "bytes": 2**42}
    train["samples"] = sum(shard["samples"] for shard in train["shards"])
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="4294967296 samples have no index that can be read"), at_most(2**26):
        check(tmp_path / "set", jobs=1)
