"""Views that would remove their own sources, and addresses with tokens in them."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from serving.cli import app
from tests.trainer.data.importers.archives import pack, picture
from tests.web import Web, serving
from trainer.data.curate.clean import clean, clean_by_lists
from trainer.data.curate.holdout import hold_out
from trainer.data.curate.merge import merge
from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import
from trainer.data.manifest import Manifest
from trainer.data.tables import TableFile
from trainer.data.verify import verify
from trainer.errors import UserError

# The set that is worked on, and the OUT that would be replaced.
OVERWRITES = {
    "a source": ("drawn", "drawn"),
    "a link to a source": ("drawn", "link"),
    "the other set of a merge": ("drawn", "other"),
    "shards": ("view", "drawn"),
    "shards by a link": ("linked", "drawn"),
    "a folder that holds a source": ("drawn/inner", "drawn"),
}


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def places(data_set: Path, tmp_path: Path) -> Path:
    """A folder with sets that lie in, and point to, each other."""
    for name in ("drawn", "drawn/inner", "linked", "other"):
        shutil.copytree(data_set, tmp_path / name)
    hold_out(tmp_path / "drawn", tmp_path / "view", share=0.3)
    (tmp_path / "link").symlink_to("drawn")
    for path in (tmp_path / "linked").glob("*.tar"):
        path.unlink()
        path.symlink_to(tmp_path / "drawn" / path.name)
    return tmp_path


@pytest.mark.parametrize("case", OVERWRITES)
def test_what_the_new_set_is_made_of_is_never_replaced(places: Path, case: str) -> None:
    source, out = (places / name for name in OVERWRITES[case])
    before = _files(places)
    makers: list[Callable[[], object]] = [
        lambda: merge([source, places / "other"], out, prefix=True, overwrite=True),
        lambda: hold_out(source, out, share=0.4, into="test", overwrite=True),
        lambda: clean(source, out, lambda split: pytest.fail("searched"), overwrite=True),
    ]
    for make in makers[:1] if out.name == "other" else makers:
        with pytest.raises(UserError, match=r"^'.*' cannot be replaced: files .* lie in it; choose another --out$"):
            make()
        assert _files(places) == before


@pytest.mark.parametrize("source", ["drawn", "link/train-000000.tar", "drawn/*.tar", "{drawn,other}/plain.tar"])
def test_an_import_never_replaces_its_source(places: Path, source: str) -> None:
    for i, name in enumerate(("drawn", "other")):
        pack(places / name / "plain.tar", [{"jpg": picture(2 * i + j), "cls": str(j).encode()} for j in range(2)])
    before = _files(places)
    options = ImportOptions(holdout_share=0, overwrite=True, in_place=True)
    with pytest.raises(UserError, match=r"drawn' cannot be replaced: files .* lie in it; choose another --out$"):
        run_import("tars", str(places / source), places / "drawn", options)
    assert {path: data for path, data in _files(places).items() if ".partial" not in path} == before


def test_another_view_of_the_same_shards_may_be_replaced(places: Path) -> None:
    verify(hold_out(places / "drawn", places / "view", share=0.4, overwrite=True))


def test_a_token_comes_neither_into_the_manifest_nor_onto_the_terminal(
    data_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data_set, tmp_path / "here")
    with serving(Web(data_set.parent)) as site:
        site.token = "t0ken"
        address = f"{site.address}/people?key=t0ken"
        merge([tmp_path / "here", address], tmp_path / "both", prefix=True)
        told = [CliRunner().invoke(app, ["data", command, address]) for command in ("verify", "check")]
    manifest = json.loads((tmp_path / "both" / "manifest.json").read_text())
    assert "t0ken" not in json.dumps(manifest)
    assert manifest["provenance"]["merged"] == "here, people; identities disjoint"
    for done in told:
        assert done.exit_code == 0
        assert f"http://127.0.0.1:{site.port}/people: " in done.output
        assert "t0ken" not in done.output


def test_a_set_named_by_a_file_address_is_pointed_to(data_set: Path, tmp_path: Path) -> None:
    verify(hold_out(f"file://{data_set}", tmp_path / "drawn", share=0.4))
    assert Manifest.read(f"file://{tmp_path}/drawn").split("val").identities == 3


@pytest.mark.parametrize("depth", ["", "deep/deeper/deepest"])
def test_a_set_is_found_from_a_folder_below_a_link(data_set: Path, tmp_path: Path, depth: str) -> None:
    (tmp_path / "real" / depth).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / depth)
    hold_out(data_set, tmp_path / "link" / "one", share=0.4)
    verify(hold_out(tmp_path / "link" / "one", tmp_path / "link" / "two", share=0.4, into="test"))
    verify(hold_out(tmp_path / "link" / "two", tmp_path / "three", by="sample", into="third"))
    for place in (tmp_path / "link", tmp_path / "real" / depth):
        verify(Manifest.read(place / "one"))


def test_lists_embedder_and_labels_are_not_replaced(places: Path) -> None:
    out = places / "view"
    (out / "suspects.csv").write_text("position,shard,key\n")
    (out / "twins.csv").write_text("label_a,identity_a,label_b,identity_b\n")
    np.save(out / "labels.npy", np.arange(8) % 2)
    np.save(places / "rows.npy", np.zeros((8, 3), np.float32))
    before = _files(places)
    with pytest.raises(UserError, match="cannot be replaced"):
        clean_by_lists(places / "drawn", out, out, overwrite=True)
    told = CliRunner().invoke(
        app, ["data", "clean", str(places / "drawn"), "--embedder", str(out), "--out", str(out), "--overwrite"]
    )
    assert "cannot be replaced" in str(told.exception)
    options = ImportOptions(holdout_share=0, overwrite=True, labels=str(out / "labels.npy"))
    with pytest.raises(UserError, match="cannot be replaced"):
        run_import("arrays", places / "rows.npy", out, options)
    with pytest.raises(UserError, match="cannot be replaced"):
        run_import("tars", f"file://{places}/drawn", places / "drawn", ImportOptions(overwrite=True))
    assert _files(places) == before


@pytest.mark.parametrize("spoil", ["rows", "label"])
def test_tables_that_do_not_fit_are_one_sentence(data_set: Path, tmp_path: Path, spoil: str) -> None:
    shutil.copytree(data_set, tmp_path / "set")
    tree = json.loads((tmp_path / "set" / "manifest.json").read_text())
    train = tree["splits"]["train"]
    if spoil == "rows":
        path = tmp_path / "set" / "train.attributes.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, pa.schema([("key", pa.string())])) as writer:
            writer.write_table(pa.table({"key": ["a"]}))
        train["attributes"] = TableFile.of(path).model_dump()
    else:
        path = tmp_path / "set" / "train-000000.idx"
        content = bytearray(path.read_bytes())
        content[64 + 12 : 64 + 16] = b"\xff" * 4
        path.write_bytes(content)
        train["shards"][0]["index_sha256"] = hashlib.sha256(content).hexdigest()
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(tree))
    says = {"rows": "has 1 rows, but the split 47 samples", "label": "a sample with label 4294967295, but 7 identities"}
    with pytest.raises(UserError, match=says[spoil]):
        hold_out(tmp_path / "set", tmp_path / "out", share=0.4)


def test_names_of_splits_that_files_can_have(data_set: Path, tmp_path: Path) -> None:
    for name in ("x" * 300, "drei\u0663", "../x", "", "a b"):
        with pytest.raises(UserError, match="is not allowed; use letters, digits, '-' and '_', 32 at most"):
            hold_out(data_set, tmp_path / "out", share=0.4, into=name)
