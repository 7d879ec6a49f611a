import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from trainer.data.image import Preprocessing, load_image
from trainer.data.importers import Source, glyphs
from trainer.data.importers.glyphs import open_glyphs
from trainer.data.importers.run import ImportOptions, run_import
from trainer.errors import UserError

PLAIN = Preprocessing(mode="L", height=105, width=105)


@pytest.fixture(scope="module")
def source() -> Iterator[Source]:
    with open_glyphs(0.1, 0) as opened:
        yield opened


def pixels(source: Source, row: int) -> np.ndarray:
    return load_image(source.read(row), PLAIN)[0]


def test_several_hundred_characters_with_20_samples(source: Source):
    counts = Counter(sample.identity for sample in source.samples)
    assert len(counts) >= 500
    assert set(counts.values()) == {20}
    assert len(source.held_out) == round(0.1 * len(counts))
    assert len({(sample.identity, sample.name) for sample in source.samples}) == len(source.samples)


def test_each_character_has_several_faces(source: Source):
    faces: dict[str, set[str]] = {}
    for sample in source.samples:
        faces.setdefault(sample.identity, set()).add(sample.name.split("/")[1])
    assert min(map(len, faces.values())) >= 4
    assert len(set.union(*faces.values())) >= 16


def test_characters_that_look_alike_are_one_identity(source: Source):
    names = {sample.identity.split(" ")[0] for sample in source.samples}
    assert "U+0041" in names  # Latin A
    assert not names & {"U+0391", "U+0410"}  # Greek and Cyrillic
    for alike in ("sS", "xX", "pd", "69"):
        assert len(names & {f"U+{ord(character):04X}" for character in alike}) == 1


def test_samples_are_dark_strokes_on_white_paper_inside_the_image(source: Source):
    for row in range(0, len(source.samples), 97):
        image = pixels(source, row)
        assert image.shape == (105, 105)
        assert np.median(image) == 255
        assert image.min() < 60
        assert (image[[0, -1]] == 255).mean() > 0.8
        assert 0.005 < (image < 128).mean() < 0.5


def test_samples_of_a_character_differ_and_are_repeatable(source: Source):
    first = [source.read(row) for row in range(20)]
    assert len(set(first)) == 20
    assert [source.read(row) for row in range(20)] == first
    with open_glyphs(0.1, 0) as again, open_glyphs(0.1, 1) as other:
        assert again.read(5) == first[5]
        assert again.held_out == source.held_out
        assert other.read(5) != first[5]
        assert other.held_out != source.held_out


def test_same_character_is_nearer_than_another(source: Source):
    """A sanity check of the distortions: the nearest other sample is mostly the same character's."""
    rows = [character * 20 + j for character in range(0, 200, 10) for j in range(20)]
    vectors = np.stack([load_image(source.read(row), Preprocessing(mode="L", height=16, width=16)) for row in rows])
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
    assert first == again
    assert (first.splits["train"].samples, first.splits["val"].samples) == (180, 60)
    assert first.image_mode == "L"
    assert "matplotlib" in first.provenance["source"]


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'hypersphere\[trainer\]'"), open_glyphs(0.1, 0):
        pass
