import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.data.image import load_image
from trainer.data.importers.shards import Sample, write_shard
from trainer.data.index import make_index, open_index, write_index
from trainer.data.manifest import Manifest
from trainer.data.reader import Reader
from trainer.data.split import write_split
from trainer.data.stream import PADDING, Batch, DataConfig, Stream, preprocessing
from trainer.errors import UserError


def with_(config: DataConfig, **changes: object) -> DataConfig:
    return DataConfig.model_validate({**config.model_dump(), **changes})


def joined(parts: list[Batch]) -> Batch:
    return Batch(
        torch.cat([part.images_BCHW for part in parts]),
        torch.cat([part.labels_B for part in parts]),
        tuple(key for part in parts for key in part.keys),
        torch.cat([part.rows_B for part in parts]),
    )


def assert_equal(a: Batch, b: Batch) -> None:
    assert a.keys == b.keys
    assert torch.equal(a.labels_B, b.labels_B)
    assert torch.equal(a.rows_B, b.rows_B)
    assert torch.equal(a.images_BCHW, b.images_BCHW)


def test_an_epoch_gives_each_image_once_with_its_label(
    data_set: Path, manifest: Manifest, config: DataConfig, image_folder: Path
):
    split = manifest.split("train")
    expected = sorted(
        (
            load_image(path.read_bytes(), preprocessing(manifest, config)).tobytes(),
            list(split.classes).index(path.parent.name),
        )
        for path in image_folder.rglob("*.png")
    )
    stream = Stream(manifest, "train", config, seed=1)
    for epoch in range(3):
        batches = list(stream.batches(epoch))
        assert len(batches) == stream.steps_per_epoch == 4
        found = [
            (image.numpy().tobytes(), int(label))
            for batch in batches
            for image, label in zip(batch.images_BCHW, batch.labels_B, strict=True)
            if label != PADDING
        ]
        assert sorted(found) == expected
        keys = [key for batch in batches for key in batch.keys if key]
        assert len(set(keys)) == 47


def test_types_and_shapes(data_set: Path, manifest: Manifest, config: DataConfig):
    batch = next(Stream(manifest, "train", with_(config, height=16, width=9)).batches(0))
    assert (batch.images_BCHW.dtype, batch.images_BCHW.shape) == (torch.uint8, (12, 1, 16, 9))
    assert (batch.labels_B.dtype, batch.rows_B.tolist()) == (torch.int64, list(range(12)))
    assert batch.images_BCHW.is_contiguous()


@pytest.mark.parametrize("world_size", [2, 3, 6])
@pytest.mark.parametrize("identities", [None, 3])
def test_ranks_deal_out_the_same_global_batches(
    data_set: Path, manifest: Manifest, config: DataConfig, world_size: int, identities: int | None
):
    config = with_(config, identities_per_batch=identities)
    whole = list(Stream(manifest, "train", config, seed=5).batches(1))
    ranks = [
        list(Stream(manifest, "train", config, rank=rank, world_size=world_size, seed=5).batches(1))
        for rank in range(world_size)
    ]
    assert {len(parts) for parts in ranks} == {len(whole)}
    for step, batch in enumerate(whole):
        assert {len(parts[step].labels_B) for parts in ranks} == {12 // world_size}
        assert_equal(joined([parts[step] for parts in ranks]), batch)


def test_short_last_batch_is_filled_with_its_own_images(data_set: Path, manifest: Manifest, config: DataConfig):
    last = list(Stream(manifest, "train", config).batches(0))[-1]  # 47 = 3 x 12 + 11
    assert (last.labels_B == PADDING).tolist() == [False] * 11 + [True]
    assert last.keys[11] == ""
    assert torch.equal(last.images_BCHW[11], last.images_BCHW[0])


def test_batch_larger_than_the_data_set(data_set: Path, manifest: Manifest, config: DataConfig):
    streams = [Stream(manifest, "train", with_(config, batch_size=200), rank=rank, world_size=4) for rank in range(4)]
    parts = [list(stream.batches(0)) for stream in streams]
    assert [len(part) for part in parts] == [1] * 4
    assert [int((part[0].labels_B != PADDING).sum()) for part in parts] == [47, 0, 0, 0]


@pytest.mark.parametrize("cache", ["memory", "none"])
@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_resume_goes_on_exactly(data_set: Path, manifest: Manifest, config: DataConfig, start: int, cache: str):
    config = with_(config, cache=cache)
    stream = Stream(manifest, "train", config, seed=2)
    list(stream.batches(0))
    whole = list(stream.batches(1))
    rest = list(Stream(manifest, "train", config, seed=2).batches(1, start))
    assert len(rest) == len(whole) - start
    for step, batch in enumerate(rest, start):
        assert_equal(batch, whole[step])
        assert_equal(batch, stream.batch(1, step))


def test_later_epochs_decode_nothing(
    data_set: Path, manifest: Manifest, config: DataConfig, monkeypatch: pytest.MonkeyPatch
):
    decoded = []

    def counting(*arguments: object, **settings: object) -> np.ndarray:
        decoded.append(arguments)
        return load_image(*arguments, **settings)

    monkeypatch.setattr("trainer.data.image.load_image", counting)
    for cache, expected in (("none", 3 * 47), ("memory", 47), ("auto", 47)):
        decoded.clear()
        stream = Stream(manifest, "train", with_(config, cache=cache))
        for epoch in range(3):
            list(stream.batches(epoch))
        assert len(decoded) == expected


def test_a_rank_decodes_its_own_samples_only(
    data_set: Path, manifest: Manifest, config: DataConfig, monkeypatch: pytest.MonkeyPatch
):
    decoded = []
    monkeypatch.setattr(
        "trainer.data.image.load_image",
        lambda *arguments, draft: decoded.append(arguments) or load_image(*arguments, draft=draft),
    )
    list(Stream(manifest, "train", config, rank=1, world_size=3).batches(0))
    assert len(decoded) == 4 * 4  # a third of each batch of 12


def test_batches_of_a_caller_cannot_spoil_the_cache(data_set: Path, manifest: Manifest, config: DataConfig):
    stream = Stream(manifest, "train", config)
    for batch in stream.batches(0):
        batch.images_BCHW.zero_()
    assert_equal(stream.batch(0, 0), Stream(manifest, "train", config).batch(0, 0))


def test_unshuffled_is_the_order_of_the_shards(data_set: Path, manifest: Manifest, config: DataConfig):
    config = with_(config, identities_per_batch=3)  # of no concern to evaluation
    batches = list(Stream(manifest, "train", config, shuffle=False).batches(3))
    assert [key for batch in batches for key in batch.keys] == [f"{i:09d}" for i in range(47)] + [""]


def test_p_by_k_from_shards(data_set: Path, manifest: Manifest, config: DataConfig):
    for batch in Stream(manifest, "train", with_(config, identities_per_batch=3), seed=1).batches(0):
        table = batch.labels_B.reshape(3, 4)
        assert (table == table[:, :1]).all()
        assert len(set(table[:, 0].tolist())) == 3
        assert len(set(batch.keys)) == 12


def test_p_by_k_that_the_data_cannot_give(data_set: Path, manifest: Manifest, config: DataConfig):
    with pytest.raises(UserError, match=r"K = 6 .* class 'bob' has 4 and 3 of 7 classes"):
        Stream(manifest, "train", with_(config, identities_per_batch=2))
    with pytest.raises(UserError, match="identities_per_batch 12 is more than the 7 classes"):
        Stream(manifest, "train", with_(config, identities_per_batch=12))


def test_world_size_that_does_not_divide_the_batch(data_set: Path, manifest: Manifest, config: DataConfig):
    with pytest.raises(UserError, match="batch_size 12 is not a multiple of the 5 workers"):
        Stream(manifest, "train", config, world_size=5)


def test_unknown_split(data_set: Path, manifest: Manifest, config: DataConfig):
    with pytest.raises(UserError, match="no split 'val'"):
        Stream(manifest, "val", config)


def test_shard_of_another_size_is_named_at_the_start(
    tmp_path: Path, data_set: Path, manifest: Manifest, config: DataConfig
):
    copy = Path(shutil.copytree(data_set, tmp_path / "copy"))
    (copy / "train-000003.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"train-000003\.tar' has 0 bytes"):
        Stream(Manifest.read(copy), "train", config)


def test_damaged_image_is_named_with_key_and_shard(
    tmp_path: Path, data_set: Path, manifest: Manifest, config: DataConfig
):
    copy = Path(shutil.copytree(data_set, tmp_path / "copy"))
    path = copy / "train-000001.tar"
    data = path.read_bytes()
    start = data.index(b"\x89PNG")
    path.write_bytes(data[: start + 20] + b"\xff" * 40 + data[start + 60 :])
    with pytest.raises(UserError, match=r"sample '000000010' of shard '.*train-000001\.tar' is damaged"):
        list(Stream(Manifest.read(copy), "train", config).batches(0))


def test_label_outside_the_classes_is_named(tmp_path: Path, noise, config: DataConfig):
    noise(1).save(tmp_path / "x.png")
    image = (tmp_path / "x.png").read_bytes()
    labels = (0, 1, 1)
    samples = [Sample(i, label, "who", "x.png", {}, "png", image) for i, label in enumerate(labels)]
    shards = [write_shard(tmp_path, "train-000000.tar", samples)]
    split = write_split(tmp_path, "train", ["a", "b"], np.array([1, 2]), shards)
    path = tmp_path / "train-000000.idx"
    index = open_index(path)
    records = index.records.copy()
    records["label"][2] = 7
    entry = shards[0].model_copy(update={"index_sha256": write_index(path, make_index(records, 0, index.tar_bytes))})
    split = split.model_copy(update={"shards": [entry]})
    Manifest(kind="folder", image_mode="L", splits={"train": split}).write(tmp_path)
    stream = Stream(Manifest.read(tmp_path), "train", config)
    with pytest.raises(UserError, match=r"sample '000000002' of shard '.*train-000000\.tar' has label 7, .* 2 classes"):
        next(stream.batches(0))


def test_leaving_an_epoch_early_ends_its_threads(data_set: Path, manifest: Manifest, config: DataConfig):
    before = threading.active_count()
    batches = Stream(manifest, "train", with_(config, batch_size=1)).batches(0)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_few_indexes_are_kept_and_no_file_stays_open(
    manifest: Manifest, config: DataConfig, monkeypatch: pytest.MonkeyPatch
):
    split, pixels = manifest.split("train"), preprocessing(manifest, config)
    positions = np.arange(46, -1, -3)  # in all five shards
    many = Reader(split, pixels)
    monkeypatch.setattr("trainer.data.reader._KEEP_INDEXES", 1)
    few = Reader(split, pixels)
    with few.pool() as pool:
        for a, b in zip(few.read(positions, pool), many.read(positions, pool), strict=True):
            np.testing.assert_array_equal(a, b)
        assert [reader._index.cache_info().currsize for reader in (few, many)] == [1, 5]
        open_files = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [name for name in open_files if name.endswith(".tar")]


def test_two_epochs_at_a_time_do_not_disturb_each_other(data_set: Path, manifest: Manifest, config: DataConfig):
    stream = Stream(manifest, "train", config)
    pairs = list(zip(stream.batches(0), stream.batches(1), strict=True))
    fresh = Stream(manifest, "train", config)
    for step, (a, b) in enumerate(pairs):
        assert_equal(a, fresh.batch(0, step))
        assert_equal(b, fresh.batch(1, step))


def test_cache_that_does_not_fit_is_refused(
    data_set: Path, manifest: Manifest, config: DataConfig, monkeypatch: pytest.MonkeyPatch
):
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("trainer.data.stream.np.empty", no_memory)
    with pytest.raises(UserError, match=r"data\.cache=memory needs"):
        Stream(manifest, "train", with_(config, cache="memory"))


def test_grey_and_colour_data_sets(tmp_path: Path, config: DataConfig):
    for mode, channels in (("L", 1), ("RGB", 3)):
        assert preprocessing(Manifest.model_construct(image_mode=mode), config).shape_CHW == (channels, 12, 12)
    assert Image.MAX_IMAGE_PIXELS  # Pillow's own limit stays on


@pytest.mark.parametrize("identities", [None, 3])
def test_decoder_processes_give_the_same_batches(manifest: Manifest, config: DataConfig, identities: int | None):
    config = with_(config, identities_per_batch=identities, cache="none")
    threads = list(Stream(manifest, "train", config, seed=1).batches(1))
    for processes in (1, 3):
        stream = Stream(manifest, "train", with_(config, decode_processes=processes), seed=1)
        for a, b in zip(threads, stream.batches(1), strict=True):
            assert_equal(a, b)
        assert_equal(threads[1], stream.batch(1, 1))


def test_what_is_cached_starts_no_process(manifest: Manifest, config: DataConfig, monkeypatch: pytest.MonkeyPatch):
    stream = Stream(manifest, "train", with_(config, decode_processes=2, cache="memory"))
    list(stream.batches(0))
    monkeypatch.setattr("trainer.data.decode.subprocess.Popen", None)  # would fail
    assert len(list(stream.batches(1))) == 4


@pytest.fixture
def damaged(tmp_path: Path, data_set: Path) -> Manifest:
    """The data set with samples 3, 12 and 13 damaged."""
    copy = Path(shutil.copytree(data_set, tmp_path / "copy"))
    for shard, row in ((0, 3), (1, 2), (1, 3)):
        path = copy / f"train-{shard:06d}.tar"
        record = Manifest.read(copy).split("train").index(shard).records[row]
        data = bytearray(path.read_bytes())
        data[int(record["offset"]) + 30] ^= 1
        path.write_bytes(data)
    return Manifest.read(copy)


@pytest.mark.parametrize("cache", ["memory", "none"])
@pytest.mark.parametrize("processes", [0, 2])
def test_bad_samples_are_left_out(
    damaged: Manifest, manifest: Manifest, config: DataConfig, processes: int, cache: str
):
    config = with_(config, max_bad=3, decode_processes=processes, cache=cache)
    stream = Stream(damaged, "train", config, seed=1)
    for epoch in range(2):
        sound = list(Stream(manifest, "train", config, seed=1).batches(epoch))
        found = list(stream.batches(epoch))
        left_out = [key for a, b in zip(sound, found, strict=True) for key in set(a.keys) - set(b.keys)]
        assert sorted(left_out) == ["000000003", "000000012", "000000013"]
        assert stream.bad == 3
        for a, b in zip(sound, found, strict=True):
            for slot in range(12):
                same = b.keys[slot] == a.keys[slot]
                assert (b.labels_B[slot] == a.labels_B[slot]) == same
                if not same:  # the slot has the image of one of the next good samples, as padding
                    assert (b.keys[slot], int(b.labels_B[slot])) == ("", PADDING)
                    later = [(slot + step) % len(sound[0].keys) for step in (1, 2, 3)]
                    assert any(torch.equal(b.images_BCHW[slot], b.images_BCHW[other]) for other in later)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_fill_bad_slots_alike(damaged: Manifest, config: DataConfig, world_size: int):
    config = with_(config, max_bad=3, identities_per_batch=3)
    whole = list(Stream(damaged, "train", config, seed=1).batches(0))
    ranks = [
        list(Stream(damaged, "train", config, rank=rank, world_size=world_size, seed=1).batches(0))
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        assert_equal(joined([parts[step] for parts in ranks]), batch)


def test_too_many_bad_samples_end_the_run(damaged: Manifest, config: DataConfig):
    with pytest.raises(UserError, match=r"sample '0000000\d\d' of shard '.*' is damaged"):
        list(Stream(damaged, "train", config).batches(0))
    with pytest.raises(UserError, match=r"3 samples cannot be read \(data\.max_bad is 2\); the last: sample '.*"):
        list(Stream(damaged, "train", with_(config, max_bad=2, batch_size=60)).batches(0))


def test_a_batch_keeps_its_rows_here_when_it_goes_to_a_device(manifest: Manifest, config: DataConfig):
    batch = Stream(manifest, "train", config).batch(0, 0)
    there = batch.to(torch.device("meta"))
    assert (there.images_BCHW.device.type, there.labels_B.device.type) == ("meta", "meta")
    assert there.rows_B is batch.rows_B
    assert batch.to(torch.device("cpu")).images_BCHW is batch.images_BCHW
