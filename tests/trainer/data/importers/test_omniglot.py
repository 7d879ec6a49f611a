import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from trainer.data.image import MAX_BYTES
from trainer.data.importers import Entry, ImportOptions, Listing
from trainer.data.importers.omniglot import list_omniglot, read_omniglot
from trainer.data.importers.run import run_import
from trainer.data.manifest import Manifest
from trainer.errors import UserError


def files(noise: Callable[..., Image.Image], root: str = "images_background/", alphabets: int = 4) -> dict[str, bytes]:
    made = {}
    for a in range(alphabets):
        for c in range(1, 3):
            for drawer in range(1, 4):
                buffer = BytesIO()
                noise(a * 100 + c * 10 + drawer).convert("1").save(buffer, format="PNG")
                made[f"{root}Alphabet_{a}/character{c:02d}/{a * 10 + c:04d}_{drawer:02d}.png"] = buffer.getvalue()
    return made


def packed(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def listed(source: Path | None, holdout_alphabets: int | None) -> tuple[list[Entry], Listing]:
    options = ImportOptions(holdout_alphabets=holdout_alphabets)
    listing = list_omniglot(None if source is None else str(source), options, lambda *_: None)
    return list(listing.entries), listing


def held_out(entries: list[Entry], listing: Listing) -> set[str]:
    """Alphabets."""
    names = sorted({entry.identity for entry in entries})
    return {names[i].split("/")[0] for i in listing.held_out(names)}


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def test_zip_and_folder_give_the_same_shards(tmp_path: Path, noise):
    members = files(noise)
    for name, data in members.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    options = ImportOptions(holdout_alphabets=1)
    run_import("omniglot", packed(tmp_path / "o.zip", members), tmp_path / "a", options)
    run_import("omniglot", packed(tmp_path / "p.zip", dict(reversed(members.items()))), tmp_path / "b", options)
    run_import("omniglot", tmp_path / "in", tmp_path / "c", options)
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b") == shard_bytes(tmp_path / "c")
    assert len(shard_bytes(tmp_path / "a")) == 2


@pytest.mark.parametrize("root", ["", "images_background/", "omniglot/python/images_background/"])
def test_identity_is_alphabet_and_character_whatever_the_root(tmp_path: Path, noise, root: str):
    entries, _ = listed(packed(tmp_path / "o.zip", files(noise, root)), 0)
    assert len(entries) == 24
    assert {entry.identity for entry in entries} == {f"Alphabet_{a}/character{c:02d}" for a in range(4) for c in (1, 2)}


def test_alphabets_are_held_out_whole_and_named(tmp_path: Path, noise):
    path = packed(tmp_path / "o.zip", files(noise))
    made = run_import("omniglot", path, tmp_path / "set", ImportOptions(holdout_alphabets=2, seed=5))
    train, val = ({name.split("/")[0] for name in made.split(split).classes} for split in ("train", "val"))
    assert len(train) == len(val) == 2
    assert not train & val
    assert made.provenance["held_out_alphabets"] == ", ".join(sorted(val))
    assert made.image_mode == "L"
    again = run_import("omniglot", path, tmp_path / "again", ImportOptions(holdout_alphabets=2, seed=5))
    assert again.model_dump() == made.model_dump()


def test_evaluation_alphabets_are_held_out_by_default(tmp_path: Path, noise):
    members = files(noise)
    members |= {name.replace("Alphabet", "Other"): data for name, data in files(noise, "images_evaluation/", 2).items()}
    assert held_out(*listed(packed(tmp_path / "o.zip", members), None)) == {"Other_0", "Other_1"}


def test_default_leaves_something_to_train_on(tmp_path: Path, noise):
    assert len(held_out(*listed(packed(tmp_path / "o.zip", files(noise)), None))) == 3


def test_variable_names_the_zip(tmp_path: Path, noise, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMNIGLOT_ZIP", str(packed(tmp_path / "o.zip", files(noise))))
    assert len(listed(None, 1)[0]) == 24
    monkeypatch.setenv("OMNIGLOT_ZIP", str(tmp_path / "none.zip"))
    with pytest.raises(UserError, match=r"OMNIGLOT_ZIP='.*none\.zip' does not exist"):
        listed(None, 1)


@pytest.mark.parametrize("count", [-1, 5])
def test_more_alphabets_than_there_are(tmp_path: Path, noise, count: int):
    path = packed(tmp_path / "o.zip", files(noise))
    with pytest.raises(UserError, match=f"--holdout-alphabets {count} .* 4 alphabets"):
        listed(path, count)


def test_sources_that_cannot_be_used(tmp_path: Path):
    (tmp_path / "text.zip").write_text("not a zip")
    cases = {
        tmp_path / "none.zip": "cannot read SOURCE",
        tmp_path / "text.zip": "is not a zip",
        packed(tmp_path / "other.zip", {"photos/1.png": b""}): "does not have Omniglot's layout",
    }
    for path, words in cases.items():
        with pytest.raises(UserError, match=words):
            listed(path, 0)


def test_alphabet_in_two_places_is_refused(tmp_path: Path, noise):
    members = files(noise) | files(noise, "images_background_small1/", 1)
    path = packed(tmp_path / "o.zip", members)
    with pytest.raises(UserError, match="'Alphabet_0' is in"):
        listed(path, 0)


def test_members_never_leave_the_folder(tmp_path: Path, noise):
    members = files(noise)
    image = next(iter(members.values()))
    members |= {"../../evil/character01/1_1.png": image, "/abs/Evil/character01/1_1.png": image}
    out = tmp_path / "deep" / "set"
    run_import("omniglot", packed(tmp_path / "o.zip", members), out, ImportOptions(holdout_alphabets=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "o.zip"]
    assert sorted(path.name for path in out.iterdir()) == ["duplicates.jsonl", "manifest.json"] + [
        f"{split}{end}"
        for split in ("train", "val")
        for end in ("-000000.idx", "-000000.tar", ".by_class.npy", ".classes.arrow")
    ]


def test_huge_damaged_and_encrypted_members_are_named(tmp_path: Path, noise):
    members = files(noise)
    huge, damaged, locked = list(members)[:9:4]
    path = tmp_path / "o.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, b"\0" * (MAX_BYTES + 1) if name == huge else data)
        offset = archive.getinfo(damaged).header_offset
    data = bytearray(path.read_bytes())
    data[offset + 60 + len(damaged)] ^= 0xFF
    place = data.rindex(locked.encode()) - 46  # its entry in the central directory
    data[place + 8] |= 1  # "encrypted"
    path.write_bytes(data)
    made = run_import("omniglot", path, tmp_path / "set", ImportOptions(holdout_alphabets=1, max_bad=0.2))
    reasons = {bad.name: bad.reason for bad in made.bad}
    assert set(reasons) == {huge, damaged, locked}
    assert f"at most {MAX_BYTES}" in reasons[huge]
    assert "cannot be unpacked" in reasons[damaged]
    assert "cannot be unpacked" in reasons[locked]


def test_the_real_thing(tmp_path: Path, omniglot_zip: Path):
    entries, listing = listed(omniglot_zip, 5)
    assert len(entries) == 19_280
    assert len({entry.identity for entry in entries}) == 964
    assert len(held_out(entries, listing)) == 5
    read = read_omniglot(listing.source, ImportOptions())
    assert read(entries[0].place).startswith(b"\x89PNG")
    part = {one.name: read(one.place) for one in entries if one.identity.startswith(("Greek", "Futurama"))}
    small = packed(tmp_path / "small.zip", part)
    made = run_import("omniglot", small, tmp_path / "set", ImportOptions(holdout_alphabets=1))
    assert {
        split: (made.splits[split].identities, set(made.split(split).classes.counts().tolist()))
        for split in made.splits
    } in (
        {"train": (24, {20}), "val": (26, {20})},
        {"train": (26, {20}), "val": (24, {20})},
    )
    assert Manifest.read(tmp_path / "set").bad == []
