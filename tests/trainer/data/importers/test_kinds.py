"""The kinds of sources, together."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from serving.cli import app
from tests.trainer.data.importers.archives import pack, picture
from tests.trainer.data.importers.recordio_files import write_insightface
from trainer.data.importers import ImportOptions
from trainer.data.importers.kinds import KINDS
from trainer.data.importers.run import run_import
from trainer.data.verify import verify
from trainer.errors import UserError


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_is_described(kind: str):
    page = Path(__file__).parents[4] / "docs" / "sources.md"
    assert f"| `{kind}` |" in page.read_text()


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"omniglot", "glyphs"}))
@pytest.mark.parametrize("source", [None, "", "none", "no\0ne"])
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
