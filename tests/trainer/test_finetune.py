"""Training that begins with other weights: from a run and from an Embedder, on two ranks as on one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from tests.ranks import folder_of_shapes, run_on_ranks
from tests.trainer.test_world import config, data, losses
from trainer import train
from trainer.checkpoint import latest
from trainer.config import Config
from trainer.data.augment import to_float
from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import
from trainer.data.manifest import Manifest
from trainer.data.stream import Stream
from trainer.embedder import Embedder
from trainer.errors import UserError
from trainer.export import export_run
from trainer.pulse import Wishes
from trainer.storage import Folder
from trainer.weights import WEIGHTS_FILE, read_weights

__all__ = ["data"]  # the fixture
SOURCE = ("scaling.workers=1", "run.max_steps=3", "backbone.name=mlp", "engine.ema_decay=0.9")
VARIANTS = ("augment.quarter_turns=true", "augment.mirrors=true")
NEW = ("backbone.name=mlp", "run.max_steps=3", "auxiliary=[center]", "init.samples=3", *VARIANTS)


def source(rank: int, data: Path, folder: Path) -> None:
    train.run(config(data, folder / "source", *SOURCE), resume=False, report=lambda _: None)


def new_config(others: Path, folder: Path, size: int, *more: str) -> Config:
    return config(others, folder / f"new{size}{len(more)}", f"scaling.workers={size}", *NEW, *more)


def tuned(rank: int, size: int, others: Path, folder: Path) -> None:
    kept = train._Run.save
    train._Run.save = lambda self: None  # type: ignore[method-assign]
    found = {
        name: losses(new_config(others, folder, size, f"init.weights={folder / name}", *more))
        for name, more in (
            ("source", []), ("embedder", ["engine.zero_stage=2"]), ("averaged", ["init.centres=random"])
        )
    }  # fmt: skip
    train._Run.save = kept  # type: ignore[method-assign]
    if rank == 0:
        (folder / f"{size}.json").write_text(json.dumps(found))
    if size == 1:
        centres_are_means(others, folder)
    run = train._Run(new_config(others, folder, size), False, torch.device("cpu"), lambda _: None, Wishes())
    for source, words in (
        (folder / "nothing", "holds no weights to begin with"),
        (folder / "spoilt", "not as it was exported"),
        (folder / "other", "'0.extra' is .3,. there and not there here"),
    ):
        run.config = new_config(others, folder, size, f"init.weights={source}")
        with pytest.raises(UserError, match=words):
            run.begin()


def centres_are_means(others: Path, folder: Path) -> None:
    """By one embedding after another."""
    settings = new_config(others, folder, 1, f"init.weights={folder / 'source'}", "init.samples=100")
    run = train._Run(settings, False, torch.device("cpu"), lambda _: None, Wishes())
    run.begin()
    backbone = run.engine.module.eval()
    whole = settings.data.model_copy(update={"batch_size": 1})
    sums: dict[int, list[torch.Tensor]] = {}
    for batch in Stream(Manifest.read(others), "train", whole, shuffle=False).batches(0):
        for variant in range(8):
            turned = torch.rot90(to_float(batch.images_BCHW), variant % 4, (2, 3))
            with torch.no_grad():
                x_BD = backbone(turned.flip(-1) if variant > 3 else turned)
            sums.setdefault(int(batch.labels_B) + variant * run.stream.split.identities, []).append(x_BD[0])
    head, centre = (member.module for member in run.objective._members.values())
    for label, found in sums.items():
        mean = normalize(torch.stack([normalize(x_D, dim=0) for x_D in found]).mean(dim=0), dim=0)
        torch.testing.assert_close(head.weight[label].detach(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(centre.centres[label], torch.stack(found).mean(dim=0), rtol=1e-4, atol=1e-5)
    assert len(sums) == len(head.weight)


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    run_import("folder", folder_of_shapes(folder / "images", 5, 8), folder / "others", ImportOptions(holdout_share=0.0))
    run_on_ranks(1, source, data, folder)
    for name, which in (("embedder", "trained"), ("averaged", "ema")):
        options = {"data": None, "overwrite": False, "register": False, "on_trouble": pytest.fail}
        export_run(folder / "source", folder / name, which=which, **options)
    shutil.copytree(folder / "embedder", folder / "spoilt")
    with (folder / "spoilt" / WEIGHTS_FILE).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    shutil.copytree(folder / "embedder", folder / "other")
    write_other(folder / "other")
    for size in (1, 2):
        run_on_ranks(size, tuned, size, folder / "others", folder)
    return folder


def write_other(embedder: Path) -> None:
    """Weights of another backbone, with the digest that belongs to them."""
    import hashlib

    from safetensors.torch import load_file, save_file

    save_file(load_file(embedder / WEIGHTS_FILE) | {"0.extra": torch.zeros(3)}, embedder / WEIGHTS_FILE)
    manifest = json.loads((embedder / "manifest.json").read_text())
    manifest["provenance"]["weights_sha256"] = hashlib.sha256((embedder / WEIGHTS_FILE).read_bytes()).hexdigest()
    (embedder / "manifest.json").write_text(json.dumps(manifest))


def test_two_ranks_go_on_as_one(folder: Path) -> None:
    one, two = (json.loads((folder / f"{size}.json").read_text()) for size in (1, 2))
    for name, found in one.items():
        assert two[name] == pytest.approx(found, rel=5e-4), name
    assert one["embedder"] == pytest.approx(one["source"], rel=1e-4)
    assert one["averaged"][0] > one["source"][0]  # random centres are no means


def test_what_is_exported_is_what_was_chosen(folder: Path) -> None:
    found = latest(Folder.at(folder / "source" / "checkpoints"))
    assert found is not None
    state = found.parts("backbone")
    for name, kind in (("embedder", "weight"), ("averaged", "ema")):
        assert torch.equal(read_weights(folder / name, "trained")["1.weight"], state[f"{kind}.1.weight"])
        assert torch.equal(read_weights(folder / "source", {"weight": "trained", "ema": "ema"}[kind])["1.weight"],
                           state[f"{kind}.1.weight"])  # fmt: skip
    assert not torch.equal(state["weight.1.weight"], state["ema.1.weight"])
    embedders = [Embedder.open(folder / name) for name in ("embedder", "averaged")]
    assert [one.manifest.provenance["weights"] for one in embedders] == ["trained", "ema"]
    assert embedders[0].model_id != embedders[1].model_id
