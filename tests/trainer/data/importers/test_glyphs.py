import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from trainer.data.image import Preprocessing, load_image
from trainer.data.importers import Entry, ImportOptions, Read, glyphs, share_held_out
from trainer.data.importers.glyphs import list_glyphs, read_glyphs
from trainer.data.importers.run import run_import
from trainer.errors import UserError

PLAIN = Preprocessing(mode="L", height=105, width=105)


class Source(NamedTuple):
    entries: list[Entry]
    held_out: set[str]
    read: Read


def opened(seed: int) -> Source:
    options = ImportOptions(seed=seed)
    listing = list_glyphs(None, options, lambda *_: None)
    entries = list(listing.entries)
    names = sorted({entry.identity for entry in entries})
    assert listing.held_out is None  # the share that the options say
    held_out = {names[i] for i in share_held_out(options.holdout_share, seed)(names)}
    return Source(entries, held_out, read_glyphs(listing.source, options))


@pytest.fixture(scope="module")
def source() -> Source:
    return opened(0)


def pixels(source: Source, row: int) -> np.ndarray:
    return load_image(source.read(source.entries[row].place), PLAIN)[0]


def test_several_hundred_characters_with_20_samples(source: Source):
    counts = Counter(entry.identity for entry in source.entries)
    assert len(counts) >= 500
    assert set(counts.values()) == {20}
    assert len(source.held_out) == round(0.1 * len(counts))
    assert len({(entry.identity, entry.name) for entry in source.entries}) == len(source.entries)


def test_each_character_has_several_faces(source: Source):
    faces: dict[str, set[str]] = {}
    for entry in source.entries:
        faces.setdefault(entry.identity, set()).add(entry.name.split("/")[1])
    assert min(map(len, faces.values())) >= 4
    assert len(set.union(*faces.values())) >= 16


def test_characters_that_look_alike_are_one_identity(source: Source):
    names = {entry.identity.split(" ")[0] for entry in source.entries}
    assert "U+0041" in names  # Latin A
    assert not names & {"U+0391", "U+0410"}  # Greek and Cyrillic
    for alike in ("sS", "xX", "pd", "69"):
        assert len(names & {f"U+{ord(character):04X}" for character in alike}) == 1


def test_samples_are_dark_strokes_on_white_paper_inside_the_image(source: Source):
    for row in range(0, len(source.entries), 97):
        image = pixels(source, row)
        assert image.shape == (105, 105)
        assert np.median(image) == 255
        assert image.min() < 60
        assert (image[[0, -1]] == 255).mean() > 0.8
        assert 0.005 < (image < 128).mean() < 0.5


def test_samples_of_a_character_differ_and_are_repeatable(source: Source):
    places = [entry.place for entry in source.entries[:20]]
    first = [source.read(place) for place in places]
    assert len(set(first)) == 20
    assert [source.read(place) for place in places] == first
    other = opened(1)
    assert other.entries == source.entries
    assert other.read(places[5]) != first[5]
    assert other.held_out != source.held_out
    assert read_glyphs("", ImportOptions(seed=0))(places[5]) == first[5]


def test_same_character_is_nearer_than_another(source: Source):
    """A sanity check of the distortions: the nearest other sample is mostly the same character's."""
    rows = [character * 20 + j for character in range(0, 200, 10) for j in range(20)]
    small = Preprocessing(mode="L", height=16, width=16)
    vectors = np.stack([load_image(source.read(source.entries[row].place), small) for row in rows])
    flat = 255.0 - vectors.reshape(len(rows), -1)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    similar = flat @ flat.T - 2 * np.eye(len(rows))
    same = np.array(rows)[similar.argmax(1)] // 20 == np.array(rows) // 20
    assert same.mean() > 0.5  # chance: 0.05


def test_imports_to_identical_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(glyphs, "MAX_CHARACTERS", 12)
    options = ImportOptions(holdout_share=0.25)
    first = run_import("glyphs", None, tmp_path / "a", options)
    again = run_import("glyphs", None, tmp_path / "b", options)
    assert first.model_dump() == again.model_dump()
    assert (first.splits["train"].samples, first.splits["val"].samples) == (180, 60)
    assert first.image_mode == "L"
    assert "matplotlib" in first.provenance["source"]


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'hypersphere\[trainer\]'"):
        list_glyphs(None, ImportOptions(), lambda *_: None)
