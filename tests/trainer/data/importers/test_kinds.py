"""The kinds of sources, together."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from serving.cli import app
from tests.trainer.data.importers.archives import pack, picture
from tests.trainer.data.importers.recordio_files import write_insightface
from trainer.data.importers import KINDS, ImportOptions
from trainer.data.importers.run import run_import
from trainer.data.verify import verify
from trainer.errors import UserError


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_is_described(kind: str):
    page = Path(__file__).parents[4] / "docs" / "sources.md"
    assert f"| `{kind}` |" in page.read_text()


NEEDED = [(kind, None) for kind in sorted(KINDS.keys() - {"omniglot", "glyphs", "speech"})]
NEEDED += [(kind, name) for kind in sorted(KINDS.keys() - {"omniglot", "glyphs"}) for name in ("", "none", "no\0ne")]


@pytest.mark.parametrize(("kind", "source"), NEEDED)
def test_a_source_that_is_not_there_is_one_sentence(tmp_path: Path, kind: str, source: str | None):
    with pytest.raises(UserError) as raised:
        run_import(kind, source if not source else tmp_path / source, tmp_path / "set")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "set").exists()


def test_records_become_a_data_set(image_folder: Path, tmp_path: Path):
    people = [[path.read_bytes() for path in sorted(folder.iterdir())] for folder in sorted(image_folder.iterdir())]
    write_insightface(tmp_path / "train.rec", people)
    manifest = run_import("recordio", tmp_path, tmp_path / "set", ImportOptions(holdout_share=0))
    split = manifest.split("train")
    assert split.classes.names() == [f"{label:08d}" for label in range(7)]
    assert split.classes.counts().tolist() == [len(images) for images in people]
    stored = [[] for _ in people]
    tar, index = split.path(0).read_bytes(), split.index(0)
    for offset, size, label, _, _ in index.records.tolist():
        stored[label].append(tar[offset : offset + size])
    assert [sorted(images) for images in stored] == [sorted(images) for images in people]
    verify(manifest)


def source_of(kind: str, folder: Path) -> Path:
    """A small source of a kind, with 24 samples of 4 identities."""
    if kind == "arrays":
        table = pa.table({"label": np.arange(24) % 4, "vector": np.arange(48.0).reshape(24, 2).tolist()})
        pa.parquet.write_table(table, folder / "x.parquet", row_group_size=5)
        return folder / "x.parquet"
    images = [picture(row) for row in range(24)]
    if kind == "tars":
        pack(folder / "x.tar", [{"cls": b"%d" % (row % 4), "jpg": image} for row, image in enumerate(images)])
        return folder / "x.tar"
    if kind == "recordio":
        write_insightface(folder / "x.rec", [images[label::4] for label in range(4)])
        return folder / "x.rec"
    for row, image in enumerate(images):
        (folder / f"{row}.jpg").write_bytes(image)
    (folder / "x.csv").write_text("path,label,age\n" + "".join(f"{row}.jpg,p{row % 4},{row}\n" for row in range(24)))
    return folder / "x.csv"


@pytest.mark.parametrize("kind", ["arrays", "list", "recordio", "tars"])
def test_an_interrupted_import_goes_on_to_the_bytes_of_an_undisturbed_one(tmp_path: Path, kind: str):
    source = source_of(kind, tmp_path)
    options = ImportOptions(holdout_share=0.5, samples_per_shard=3)

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "import" and done >= 9:
            raise UserError("stopped")

    with pytest.raises(UserError, match="stopped"):
        run_import(kind, source, tmp_path / "set", options, interrupt)
    assert list(tmp_path.glob(".set.partial/train-00000*.tar"))
    for out in ("set", "undisturbed"):
        run_import(kind, source, tmp_path / out, options)
    files = [{path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("set", "undisturbed")]
    assert files[0] == files[1]


@pytest.mark.parametrize("option", [["--labels", "labels.npy", "--kind", "arrays"], ["--in-place", "--kind", "tars"]])
def test_the_command_line_hands_the_options_of_kinds_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: list[str]
):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.arange(8, dtype=np.float32).reshape(4, 2))
    np.save("labels.npy", np.arange(4) % 2)
    pack(tmp_path / "x.tar", [{"cls": b"%d" % (i % 2), "jpg": picture(i)} for i in range(4)])
    source = "x.npy" if "arrays" in option else "x.tar"
    found = CliRunner().invoke(app, ["data", "import", source, *option, "--out", "set", "--holdout-share", "0"])
    assert found.exit_code == 0, found.output
    assert "train: 4 " in found.output
    assert (tmp_path / "set" / "train-000000.tar").exists() == ("arrays" in option)
