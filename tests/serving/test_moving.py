"""A gallery moved to another model: what comes along, what is left out, and that it is whole or not there."""

from contextlib import closing

import numpy as np
import pytest
from typer.testing import CliRunner

from serving import moving, upkeep
from serving.cli import app
from serving.storage.changes import Attached
from serving.storage.store import Store
from tests.serving.conftest import onnx_model, photo, png, write_embedder
from trainer.embedder import Embedder
from trainer.errors import UserError


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def newer(tmp_path_factory):
    """Another model than that of the galleries here, which are pinned to one of 32 numbers."""
    return write_embedder(tmp_path_factory.mktemp("newer") / "embedder", onnx_model())


@pytest.fixture
def path(tmp_path, vectors):
    """Subjects s0 to s4 with two images each; s4 has a sample without, and one that cannot be decoded."""
    kept = tmp_path / "old.sqlite"
    with closing(Store(kept, "a" * 32, 32)) as store:
        _fill(store, vectors)
    return kept


def _fill(store, vectors):
    x = vectors(12, dimension=32)
    for n in range(5):
        images = [photo(n), photo(n, 1)]
        more = Attached({"site": f"x{n}"}, [0.25, None], [{"camera": 3}, None], images)
        store.enrol(f"s{n}", x[2 * n : 2 * n + 2], attached=more)
    store.enrol("s4", x[10:11])
    store.enrol("s4", x[11:12], attached=Attached(images=[b"no image"]))
    store.enrol("nobody's", x[10:11])


def test_vectors_are_those_of_the_new_model_and_all_else_comes_along(path, newer, tmp_path):
    found, refused = moving.migrate(path, newer, tmp_path / "new.sqlite", 2, quiet)
    assert {one.name for one in tmp_path.glob("*new*")} <= {f"new.sqlite{end}" for end in ("", "-mark", "-wal", "-shm")}
    model = Embedder.open(newer)
    assert (found.model_id, found.subjects, found.samples, found.images) == (model.model_id, 5, 10, 10)
    assert sorted(text.partition(":")[0] for text in refused) == [
        "a sample of 'nobody's' is left out",
        "a sample of 's4' is left out",
        "a sample of 's4' is left out",
    ]
    assert sum("not kept" in text for text in refused) == 2
    with closing(Store(tmp_path / "new.sqlite", model.model_id, found.dimension)) as store:
        for n in range(5):
            subject, samples = store.subject(f"s{n}")
            assert subject.metadata == {"site": f"x{n}"}
            assert [one.quality for one in samples] == [0.25, None]
            assert [one.metadata for one in samples] == [{"camera": 3}, {}]
            for number, one in enumerate(samples):
                (expected_D,) = model.embed(model.preprocessing.load(photo(n, number))[None])
                assert store.sample(f"s{n}", one.sample_id)[1] == pytest.approx(expected_D, abs=1e-6)
                assert store.image(f"s{n}", one.sample_id) == photo(n, number)
    assert upkeep.stats(path).samples == 13


def test_an_image_without_a_direction_keeps_no_other_from_moving(path, newer, tmp_path):
    flat = png(np.zeros((8, 8), np.uint8))
    with closing(Store(path, "a" * 32, 32)) as store:
        store.enrol("flat", np.eye(32, dtype=np.float32)[:1], attached=Attached(images=[flat]))
    found, refused = moving.migrate(path, newer, tmp_path / "new.sqlite", 2, quiet)
    told = [text for text in refused if "'flat'" in text]
    assert found.subjects == 5
    assert len(told) == 1
    assert "vector of length" in told[0]


def test_an_encrypted_gallery_moves_under_its_key(newer, tmp_path, vectors):
    key = bytes(range(32))
    with closing(Store(tmp_path / "old", "a" * 32, 32, key=key)) as store:
        _fill(store, vectors)
    found, _ = moving.migrate(tmp_path / "old", newer, tmp_path / "new", 1, quiet, key=key)
    with closing(Store(tmp_path / "new", found.model_id, found.dimension, key=key)) as store:
        assert store.subject("s1")[0].metadata == {"site": "x1"}
    assert b'"camera"' not in (tmp_path / "new").read_bytes()


def test_what_cannot_be_moved_is_one_sentence_and_leaves_nothing(path, newer, tmp_path, vectors):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="there is no store"):
        moving.migrate(tmp_path / "nothing", newer, tmp_path / "new", 1, quiet)
    with pytest.raises(UserError, match="is there already"):
        moving.migrate(path, newer, path, 1, quiet)
    with pytest.raises(UserError, match=r"is not an embedder|cannot be read|no embedder"):
        moving.migrate(path, tmp_path, tmp_path / "new", 1, quiet)
    own, size = Embedder.open(newer).model_id, Embedder.open(newer).manifest.dimension
    with closing(Store(tmp_path / "own", own, size)) as store:
        store.enrol("a", vectors(1, dimension=size))
    with pytest.raises(UserError, match=r"of model .* already; there is nothing to move"):
        moving.migrate(tmp_path / "own", newer, tmp_path / "new", 1, quiet)
    with closing(Store(tmp_path / "bare", "a" * 32, 32)) as store:
        store.enrol("a", vectors(1, dimension=32))
    with pytest.raises(UserError, match=r"none of the 1 samples .* its image was not kept"):
        moving.migrate(tmp_path / "bare", newer, tmp_path / "new", 1, quiet)
    left = {one.name.partition("-")[0] for one in tmp_path.iterdir()} - {one.name.partition("-")[0] for one in before}
    assert left == {"own", "bare"}


def test_by_the_command(path, newer, tmp_path):
    words = ["--store", str(path), "--embedder", str(newer), "--out", str(tmp_path / "new")]
    result = CliRunner().invoke(app, ["gallery", "migrate", *words])
    assert result.exit_code == 0, result.output
    assert "5 subjects with 10 samples" in result.output
    assert "3 samples were left out" in result.output
