from collections import Counter
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from trainer.data.importers.run import ImportOptions, run_import
from trainer.data.manifest import Manifest
from trainer.data.mix import Part
from trainer.data.stream import PADDING, Batch, DataConfig, Stream
from trainer.errors import UserError


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, noise) -> Path:
    """A second set: 40 samples of 8 classes, two of which have names of the first set."""
    root = tmp_path_factory.mktemp("others")
    for i, name in enumerate(["ada", "hal", "ida", "jo", "kim", "lou", "gus", "max"]):
        (root / "people" / name).mkdir(parents=True)
        for j in range(5):
            noise(5000 + 10 * i + j).save(root / "people" / name / f"{j}.png")
    run_import("folder", root / "people", root / "set", ImportOptions(holdout_share=0, samples_per_shard=16))
    return root / "set"


def mixed(data_set: Path, other: Path, weights: tuple[float | None, float | None], **changes: object) -> DataConfig:
    parts = tuple(Part(path=path, weight=weight) for path, weight in zip((data_set, other), weights, strict=True))
    return DataConfig(path=data_set, height=12, width=12, batch_size=12, shuffle_window=20, mix=parts, **changes)


def pictures(batches: list[Batch]) -> list[bytes]:
    return [image.numpy().tobytes() for batch in batches for image in batch.images_BCHW]


def pictures_of(folder: Path) -> set[bytes]:
    config = DataConfig(path=folder, height=12, width=12, batch_size=12)
    batches = Stream(Manifest.read(folder), "train", config, shuffle=False).batches(0)
    return {
        image.numpy().tobytes()
        for batch in batches
        for image in batch.images_BCHW[batch.labels_B != PADDING]
    }  # fmt: skip


def test_without_weights_every_sample_comes_once_in_each_pass(data_set: Path, other: Path, manifest: Manifest):
    stream = Stream(manifest, "train", mixed(data_set, other, (None, None)), seed=3)
    assert stream.steps_per_epoch == 8  # 87 samples in batches of 12
    assert stream.split.identities == 15
    seen = pictures([batch for epoch in range(30) for batch in stream.batches(epoch)])
    first, second = pictures_of(data_set), pictures_of(other)
    assert set(seen) == first | second
    for own in (first, second):
        order = [picture for picture in seen if picture in own]
        assert abs(len(order) / len(seen) - len(own) / 87) < 0.002
        for start in range(0, len(order) - len(own), len(own)):
            assert set(order[start : start + len(own)]) == own  # whole passes, one after the other
        assert order[: len(own)] != order[len(own) : 2 * len(own)]


@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.01, 0.02), (1.0, 99.0)])
def test_weights_are_the_shares_of_the_samples_throughout(
    data_set: Path, other: Path, manifest: Manifest, weights: tuple[float, float]
):
    stream = Stream(manifest, "train", mixed(data_set, other, weights), seed=3)
    share = weights[0] / sum(weights)
    seen = 0
    for step in range(3 * stream.steps_per_epoch):
        epoch, inside = divmod(step, stream.steps_per_epoch)
        seen += int((stream.batch(epoch, inside).labels_B < 7).sum())
        assert abs(seen - share * 12 * (step + 1)) <= 1


@pytest.mark.parametrize("identities", [None, 3])
def test_ranks_and_resumes_give_the_same_batches(
    data_set: Path, other: Path, manifest: Manifest, identities: int | None
):
    config = mixed(data_set, other, (2, 1), identities_per_batch=identities)
    whole = list(Stream(manifest, "train", config, seed=3).batches(2))
    ranks = [list(Stream(manifest, "train", config, rank=r, world_size=3, seed=3).batches(2, 3)) for r in range(3)]
    for step, batch in enumerate(whole[3:]):
        parts = [rank[step] for rank in ranks]
        assert torch.equal(torch.cat([part.images_BCHW for part in parts]), batch.images_BCHW)
        assert torch.equal(torch.cat([part.labels_B for part in parts]), batch.labels_B)
        assert tuple(key for part in parts for key in part.keys) == batch.keys


@pytest.mark.parametrize("shared", [False, True])
def test_labels_are_those_of_the_mix(data_set: Path, other: Path, manifest: Manifest, shared: bool):
    names = {}  # of each picture
    for number, folder in enumerate((data_set, other)):
        found = Manifest.read(folder)
        config = DataConfig(path=folder, height=12, width=12, batch_size=12)
        for batch in Stream(found, "train", config, shuffle=False).batches(0):
            for image, label in zip(batch.images_BCHW, batch.labels_B.tolist(), strict=True):
                if label == PADDING:
                    continue
                name = found.split("train").classes[label]
                names[image.numpy().tobytes()] = name if shared else f"{number}: {name}"
    how = "shared" if shared else "disjoint"
    stream = Stream(manifest, "train", mixed(data_set, other, (1, 1), mix_identities=how))
    assert stream.split.identities == (13 if shared else 15)
    counts = Counter()
    for batch in stream.batches(0):
        for picture, label in zip(pictures([batch]), batch.labels_B.tolist(), strict=True):
            assert stream.split.classes[label] == names[picture]
            counts[label] += 1
    assert int(stream.split.classes.counts().sum()) == 87
    assert stream.split.classes.counts()[stream.split.classes.names().index("ada" if shared else "0: ada")] == (
        14 if shared else 9
    )


def test_p_by_k_takes_its_share_of_identities_from_each_set(data_set: Path, other: Path, manifest: Manifest):
    config = mixed(data_set, other, (2, 1), identities_per_batch=3)
    for epoch in range(3):
        for batch in Stream(manifest, "train", config).batches(epoch):
            table = batch.labels_B.reshape(3, 4)
            assert (table == table[:, :1]).all()
            assert [int(label) < 7 for label in table[:, 0]] == [True, True, False]
            assert len(set(pictures([batch]))) == 12
    with pytest.raises(UserError, match=r"of 3 identities a batch the set '.*set' of data\.mix would give none"):
        Stream(manifest, "train", mixed(data_set, other, (20, 1), identities_per_batch=3))


def test_one_set_alone_is_that_set(data_set: Path, manifest: Manifest):
    config = DataConfig(path=data_set, height=12, width=12, batch_size=47, shuffle_window=20)
    alone = Stream(manifest, "train", config, seed=1)
    mix = Stream(manifest, "train", config.model_copy(update={"mix": (Part(path=data_set),)}), seed=1)
    for epoch in range(2):
        a, b = alone.batch(epoch, 0), mix.batch(epoch, 0)
        assert torch.equal(a.images_BCHW, b.images_BCHW)
        assert torch.equal(a.labels_B, b.labels_B)


def test_evaluation_reads_the_main_set(data_set: Path, other: Path, manifest: Manifest):
    config = mixed(data_set, other, (1, 1), train_split="other")
    assert Stream(manifest, "train", config, shuffle=False).split.samples == 47


def test_a_bad_sample_of_a_mix_is_left_out(tmp_path: Path, data_set: Path, other: Path, manifest: Manifest):
    config = mixed(data_set, other, (1, 1), max_bad=1)
    stream = Stream(manifest, "train", config)
    stream._reader._readers[1].bad[7] = UserError("bad")
    labels = torch.cat([batch.labels_B for batch in stream.batches(0)])
    assert stream.bad == 1
    assert int((labels == PADDING).sum()) in (1, 2)  # this set has its 40 samples in 48 slots of an epoch


def test_weights_for_some_sets_only_are_refused(data_set: Path, other: Path):
    with pytest.raises(ValidationError, match="mix gives 1 of 2 sets a weight"):
        mixed(data_set, other, (1, None))
    with pytest.raises(ValidationError, match="greater than 0"):
        mixed(data_set, other, (1, 0))


def test_a_missing_set_is_named(data_set: Path, tmp_path: Path, manifest: Manifest):
    with pytest.raises(UserError, match=r"'.*nowhere' is not a data set"):
        Stream(manifest, "train", mixed(data_set, tmp_path / "nowhere", (1, 1)))
