"""A run in a bucket: it trains, goes on, is exported and evaluated there, and nothing lies beside it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from serving.cli.evaluate import evaluate
from tests.ranks import folder_of_shapes, run_on_ranks
from tests.s3 import s3_bucket
from trainer.config import Config, load
from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import
from trainer.embedder import MANIFEST_FILE, Embedder, write_manifest
from trainer.errors import UserError
from trainer.export import export_run
from trainer.storage import Folder
from trainer.train import Record, run


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket("runs") as address:
        yield address


def config(data: Path, out: str, steps: int) -> Config:
    return load(
        None,
        [
            *(f"data.path={data}", f"run.out={out}", "data.batch_size=14", f"run.max_steps={steps}", "run.log_every=1"),
            *("backbone.name=convnet", "backbone.dimension=16", "backbone.width=4", "data.height=24"),
            *(
                "data.width=24",
                "loss.scale=16",
                "optimizer.lr=0.05",
                "run.checkpoint_every=2",
                "schedule.kind=constant",
            ),
            *("run.keep_best=val/rank1", "run.keep_checkpoints=1"),
        ],
    )


def trains_and_goes_on(rank: int, data: Path, out: str) -> None:
    records: list[Record] = []
    run(config(data, out, 3), resume=False, report=records.append)
    run(config(data, out, 5), resume=True, report=records.append)
    assert [record.step for record in records if record.kind == "step"] == [1, 2, 3, 4, 5]
    assert any(f"going on from step 3 of '{out}/checkpoints/step-00000003'" in record.text for record in records)


def test_a_run_in_a_bucket(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder_of_shapes(tmp_path / "images", identities=8, samples=5)
    run_import("folder", source, tmp_path / "data", ImportOptions(holdout_share=0.3))
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    run_on_ranks(2, trains_and_goes_on, tmp_path / "data", f"{bucket}/one")
    out = Folder.at(f"{bucket}/one")
    assert any(name.startswith("checkpoints/step-00000005/checkpoint.json") for name in out.sizes())

    def export(to: str, overwrite: bool = False) -> str:
        wanted = {"data": None, "overwrite": overwrite, "register": False, "on_trouble": pytest.fail}
        return export_run(f"{bucket}/one", to, **wanted).model_id  # type: ignore[arg-type]

    there = f"{bucket}/one/embedder"
    model_id = export(there)
    with pytest.raises(UserError, match="'s3://runs/one/embedder' is an embedder already; choose another"):
        export(there)
    with pytest.raises(UserError, match="'s3://runs/one/checkpoints' holds other files and is not an embedder"):
        export(f"{bucket}/one/checkpoints", overwrite=True)
    Folder.at(there).write("evaluation/report.json", "of the one before")
    assert export(there, overwrite=True) == model_id
    assert sorted(Folder.at(there).sizes()) == ["backbone.safetensors", MANIFEST_FILE, "model.onnx"]
    assert Embedder.open(there).embed(np.zeros((1, 1, 24, 24), np.uint8)).shape == (1, 16)
    place = Path(there)  # as command lines make of it
    evaluate(embedder=place, data=tmp_path / "data", split="val", to=None, unenrolled=0.5, seed=0, threads=1)
    found = Embedder.open(place).manifest
    write_manifest(place, found.model_copy(update={"provenance": {"changed": "yes"}}))
    assert "evaluation/report.json" in Folder.at(there).sizes()
    assert Embedder.open(there).manifest.provenance == {"changed": "yes"}
    assert set(tmp_path.iterdir()) == before


def test_an_embedder_that_is_not_there(bucket: str) -> None:
    with pytest.raises(UserError, match=r"'s3://runs/nobody' is not an embedder: .* is missing"):
        Embedder.open(f"{bucket}/nobody")
