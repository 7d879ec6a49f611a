"""The training loop on two gloo ranks: it learns, resumes exactly, and names what is wrong."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import folder_of_shapes, run_on_ranks
from trainer.checkpoint import Shelf, latest
from trainer.config import Config, from_tree, load
from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import
from trainer.distributed import Group
from trainer.errors import Diverged, UserError
from trainer.storage import Folder
from trainer.train import Record, _dropout_seed, run
from trainer.watch import Watch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    source = folder_of_shapes(folder / "images", identities=8, samples=5)
    run_import("folder", source, folder / "data", ImportOptions(holdout_share=0.3))
    return folder / "data"


def config(data: Path, out: Path, *overrides: str) -> Config:
    """14 samples a step do not divide the 30 of an epoch: the last batch is short."""
    overrides = (
        *(f"data.path={data}", f"run.out={out}", "data.batch_size=14", "run.epochs=4", "run.log_every=1"),
        *("backbone.name=convnet", "backbone.dimension=16", "backbone.width=4", "data.height=24", "data.width=24"),
        *("loss.scale=16", "augment.rotate_degrees=10", "augment.translate=0.1", "optimizer.lr=0.05"),
        *overrides,
    )
    return load(None, list(overrides))


class Stop(Exception):
    """What cuts a run off."""


def train(config: Config, out: Path, rank: int, resume: bool = False, stop_at: int | None = None) -> list[Record]:
    records: list[Record] = []

    def report(record: Record) -> None:
        records.append(record)
        if record.kind == "step" and record.step == stop_at:
            raise Stop

    if stop_at is None:
        run(config, resume=resume, report=report)
    else:
        with pytest.raises(Stop):
            run(config, resume=resume, report=report)
    return records


def losses(records: list[Record]) -> dict[int, float]:
    return {record.step: record.values["loss"] for record in records if record.kind == "step"}


def whole_and_cut_off(rank: int, data: Path, folder: Path) -> None:
    cases: list[dict[str, Any]] = []
    for number, extra in enumerate(
        (
            ["backbone.dropout=0.2"],
            ["engine.zero_stage=2", "engine.bf16=true", "optimizer.name=adamw", "optimizer.lr=0.001", "loss=cosface"],
        )
    ):
        whole = train(config(data, folder / f"whole{number}", "run.checkpoint_every=5", *extra), folder, rank)
        cut = config(data, folder / f"cut{number}", "run.checkpoint_every=5", *extra)
        before = train(cut, folder, rank, stop_at=7)
        after = train(cut, folder, rank, resume=True)
        cases.append({"whole": losses(whole), "before": losses(before), "after": losses(after)})
        cases[-1]["metrics"] = [record.values for record in whole if record.kind == "metrics"]
        cases[-1]["notes"] = [record.text for record in after if record.kind == "note"]
    if rank == 0:
        (folder / "cases.json").write_text(json.dumps(cases))


@pytest.fixture(scope="module")
def resumed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    run_on_ranks(2, whole_and_cut_off, data, folder)
    return folder


def test_resume_gives_the_losses_of_the_uninterrupted_run(resumed: Path) -> None:
    for number, case in enumerate(json.loads((resumed / "cases.json").read_text())):
        whole = case["whole"]
        assert len(whole) == 12  # 4 epochs of 3 batches
        assert case["before"] == {step: whole[step] for step in map(str, range(1, 8))}
        assert case["after"] == {step: whole[step] for step in map(str, range(6, 13))}
        assert "going on from step 5" in case["notes"][0]
        assert all(map(math.isfinite, whole.values()))
        assert 0 <= case["metrics"][-1]["val/rank1"] <= 1
        assert len(case["metrics"]) == 4
        found = latest(Folder(resumed / f"cut{number}" / "checkpoints"))
        assert found is not None
        assert found.step == 12
        assert sum(name.startswith(("arcface", "cosface")) for name in found.manifest.files) == 2


def one_rank(rank: int, data: Path, folder: Path) -> None:
    train(config(data, folder / "run", "scaling.workers=1", "run.max_steps=2"), folder, rank)
    for overrides, words in (
        (["run.max_steps=1"], "raise run.epochs or run.max_steps"),
        (["augment.quarter_turns=true"], "other classes"),
        (["backbone.dimension=8"], "16"),
    ):
        with pytest.raises(UserError, match=words):
            run(config(data, folder / "run", "scaling.workers=1", *overrides), resume=True, report=lambda _: None)
    with pytest.raises(UserError, match="lower"):
        run(config(data, folder / "wild", "optimizer.lr=1e30"), resume=False, report=lambda _: None)
    empty = train(config(data, folder / "empty", "run.max_steps=1"), folder, rank, resume=True)
    assert any("no checkpoint" in record.text for record in empty)


def test_what_does_not_fit_is_named(data: Path, tmp_path: Path) -> None:
    run_on_ranks(1, one_rank, data, tmp_path)


def with_a_deaf_listener(rank: int, data: Path, folder: Path) -> None:
    """Rank 0's records of the steps 4 and 5 are noted by nobody before the run is cut off."""
    given = config(data, folder / "run", "run.checkpoint_every=5", "run.log_every=1", "run.max_steps=7")
    told: list[Record] = []

    def unheard() -> list[dict[str, Any]]:
        return [asdict(one) for one in told if one.kind == "step" and one.step in (4, 5)]

    run(given, resume=False, report=told.append, untold=unheard)
    if rank == 0:
        shutil.rmtree(folder / "run" / "checkpoints" / "step-00000007")
    Group.current().barrier()
    again = train(given, folder, rank, resume=True)
    if rank == 0:
        assert [one for one in again if one.kind == "step"][:2] == [one for one in told if one.kind == "step"][3:5]
        assert [one.step for one in again if one.kind == "step"] == [4, 5, 6, 7]


def test_what_nobody_noted_lies_in_the_checkpoint_and_is_told_again(data: Path, tmp_path: Path) -> None:
    run_on_ranks(2, with_a_deaf_listener, data, tmp_path)


def from_a_mix(rank: int, data: Path, folder: Path) -> None:
    mix = f"data.mix=[{{path: {data}, weight: 2}}, {{path: {data}, weight: 1}}]"
    overrides = ["scaling.workers=1", mix, "data.decode_processes=1", "data.cache=none", "data.max_bad=1"]
    overrides += ["run.checkpoint_every=4", "run.max_steps=7", "augment.jpeg=0.5", "augment.blur=0.5"]
    whole = losses(train(config(data, folder / "whole", *overrides), folder, rank))
    cut = config(data, folder / "cut", *overrides)
    train(cut, folder, rank, stop_at=5)
    after = train(cut, folder, rank, resume=True)
    assert losses(after) == {step: loss for step, loss in whole.items() if step > 4}
    assert [record.values["bad_samples"] for record in after if record.kind == "step"] == [0, 0, 0]


def test_a_mix_from_decoder_processes_resumes_exactly(data: Path, tmp_path: Path) -> None:
    run_on_ranks(1, from_a_mix, data, tmp_path)


def with_large_seeds(rank: int, data: Path, folder: Path) -> None:
    found = set()
    for number, seed in enumerate((2**63 - 1, 2**63 - 1 - 2**40, 18_446_375, 18_446_376)):
        overrides = ["scaling.workers=1", f"run.seed={seed}", "run.max_steps=2", "backbone.dropout=0.2"]
        first = losses(train(config(data, folder / str(number), *overrides), folder, rank))
        assert all(map(math.isfinite, first.values()))
        found.add(first[1])
    assert len(found) == 4


def test_any_seed_of_63_bits_trains(data: Path, tmp_path: Path) -> None:
    run_on_ranks(1, with_large_seeds, data, tmp_path)


@pytest.mark.parametrize(
    ("seed", "step", "rank", "expected"),
    [(0, 0, 0, 0), (1, 0, 0, 1000006000009), (7, 3, 1, 7000045000073), (18_446_633, 99, 3, 18446743680063019997)],
)
def test_the_seeds_of_dropout_stay(seed: int, step: int, rank: int, expected: int) -> None:
    assert load(None, [f"run.seed={seed}"]).run.torch_seed == seed
    assert _dropout_seed(seed, step, rank) == expected


def diverges_and_goes_on(rank: int, data: Path, folder: Path) -> None:
    overrides = ["scaling.workers=1", "run.max_steps=6", "run.checkpoint_every=1", "run.log_every=1000"]
    seldom = config(data, folder / "seldom", *overrides, "optimizer.lr=1e8", "run.checkpoint_every=0")
    with pytest.raises(Diverged, match=r"not finite after step 3.* goes on from step 0"):  # seen by the evaluation
        run(seldom, resume=False, report=lambda _: None)
    wild = config(data, folder / "run", *overrides, "optimizer.lr=1e8")
    with pytest.raises(Diverged, match=r"optimizer\.lr \(now 1e\+08\).* goes on from step 0"):
        run(wild, resume=False, report=lambda _: None)
    shelf = Shelf.of(Folder(folder / "run" / "checkpoints"))
    assert shelf.diverged
    assert shelf.whole == []
    after = train(config(data, folder / "run", *overrides, "optimizer.lr=0.01", "run.log_every=1"), folder, rank, True)
    assert sorted(losses(after)) == [1, 2, 3, 4, 5, 6]
    whole = train(config(data, folder / "whole", *overrides, "optimizer.lr=0.01", "run.log_every=1"), folder, rank)
    assert losses(after) == losses(whole)
    newest = latest(Folder(folder / "run" / "checkpoints"))
    assert newest is not None
    assert newest.step == 6


def test_a_run_that_diverged_goes_on_with_a_lower_rate(data: Path, tmp_path: Path) -> None:
    run_on_ranks(1, diverges_and_goes_on, data, tmp_path)


def test_the_loss_of_every_step_is_looked_at_one_step_later() -> None:
    watch = Watch()
    watch(torch.tensor(1.0), 1)
    watch(torch.tensor(math.nan), 2)
    with pytest.raises(Diverged, match="the loss at step 2 is nan"):
        watch(torch.tensor(1.0), 3)
    with pytest.raises(Diverged, match="step 2"):
        watch.look()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_looking_at_the_loss_does_not_make_a_gpu_wait() -> None:
    watch, loss = Watch(), torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            loss = loss * math.inf if step == 3 else loss * 2
            watch(loss, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(Diverged, match="the loss at step 3 is inf"):
        watch.look()


def keeps_the_best(rank: int, data: Path, folder: Path) -> None:
    best = ["run.keep_best=val/rank1", "run.keep_checkpoints=1", "run.checkpoint_every=0", "scaling.workers=1"]
    records = train(config(data, folder, *best), folder, rank)
    course = {record.step: record.values["val/rank1"] for record in records if record.kind == "metrics"}
    step = max(course, key=lambda step: (course[step], -step))
    shelf = Shelf.of(Folder(folder / "checkpoints"))
    assert shelf.best() == (step, {"val/rank1": course[step]})
    assert {step, 12} <= set(shelf.whole)
    for extra, words in (("run.keep_best=loss", "name one of val/fnir_at"), ("run.eval_every=0", "set run.eval_every")):
        with pytest.raises(UserError, match=words):
            train(config(data, folder, *best, extra), folder, rank)


def test_the_best_checkpoint_is_kept(data: Path, tmp_path: Path) -> None:
    run_on_ranks(1, keeps_the_best, data, tmp_path)


HERE = Path(__file__).parent
# What wrote the checkpoints of earlier formats, after their fourth step. The second has rows with K centres and int8
# moments, a learned scale, centres that follow, a projection, and ZeRO 1.
LOSSES = {
    1: {5: 7.686795234680176, 6: 7.151485443115234},
    2: {5: 8.952739715576172, 6: 10.053959846496582, 7: 9.749977111816406, 8: 6.387629508972168, 9: 7.075891494750977},
}


def from_an_earlier_format(rank: int, folder: Path, number: int) -> None:
    written = json.loads((HERE / f"checkpoint{number}" / "checkpoint.json").read_text())["config"]
    out = {"run": written["run"] | {"out": str(folder)}, "data": written["data"] | {"path": str(folder / "data")}}
    out["backbone"] = written["backbone"] | {"norm_group": written["data"]["batch_size"] // 2}  # then, a worker's share
    after = train(from_tree(written | out), folder, rank, resume=True)
    assert losses(after) == pytest.approx(LOSSES[number], rel=1e-4)  # other processors round in another way
    notes = [record.text for record in after if record.kind == "note"]
    assert any("no digest of its shards" in note for note in notes) == (number == 1)
    found = latest(Folder(folder / "checkpoints"))
    assert found is not None
    assert (found.manifest.format, found.step) == (3, max(LOSSES[number]))


@pytest.mark.parametrize("number", LOSSES)
def test_a_checkpoint_of_an_earlier_format_is_gone_on_from(number: int, tmp_path: Path) -> None:
    shutil.copytree(HERE / f"checkpoint{number}", tmp_path / "checkpoints" / "step-00000004")
    shutil.copytree(HERE / "data" / "format1", tmp_path / "data")
    run_on_ranks(2, from_an_earlier_format, tmp_path, number)


def other_order(rank: int, data: Path, others: Path, folder: Path) -> None:
    first = ["scaling.workers=1", "run.max_steps=4"]
    train(config(data, folder, *first, "run.max_steps=2"), folder, rank)
    for change, words in (
        ("data.batch_size=10", "data.batch_size is 10 now and was 14 .* samples come in which step"),
        ("run.seed=1", "run.seed is 1 now and was 0"),
        ("data.shuffle_window=20", "data.shuffle_window is 20 now and was 50000"),
        (f"data.path={others}", "shards is .* set it back"),
    ):
        with pytest.raises(UserError, match=words):
            run(config(data, folder, *first, change), resume=True, report=lambda _: None)
    moved = folder.with_name("moved")
    shutil.copytree(data, moved)
    after = train(config(moved, folder, *first, "loss.margin=0.1", "run.log_every=2"), folder, rank, resume=True)
    notes = [record.text for record in after if record.kind == "note"]
    assert [note.partition(" ")[0] for note in notes] == ["loss.margin", "run.max_steps", "going"]


def test_what_would_change_the_order_of_the_samples_is_refused(data: Path, tmp_path: Path) -> None:
    source = folder_of_shapes(tmp_path / "images", identities=8, samples=5)
    image = source / "person00" / "0.png"
    image.write_bytes(image.read_bytes() + b" ")
    run_import("folder", source, tmp_path / "others", ImportOptions(holdout_share=0.3))
    run_on_ranks(1, other_order, data, tmp_path / "others", tmp_path / "run")
