"""Data sets from afar: the same batches as from a folder, no byte twice, and what goes wrong on the way."""

import gc
import multiprocessing
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from tests.web import Web, serving
from trainer.data import remote
from trainer.data.cache import BLOCK
from trainer.data.importers.run import ImportOptions, run_import
from trainer.data.manifest import Manifest
from trainer.data.store import CacheConfig, File, open_store
from trainer.data.stream import Batch, DataConfig, Stream
from trainer.data.verify import verify
from trainer.errors import UserError


@pytest.fixture(scope="module")
def large_set(tmp_path_factory: pytest.TempPathFactory, noise: Callable[..., Image.Image]) -> Path:
    """120 samples of 16 kB of 12 identities in 4 shards: each has several blocks."""
    root = tmp_path_factory.mktemp("large")
    for i in range(120):
        folder = root / "people" / f"p{i % 12:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        noise(i, 128).save(folder / f"{i:03d}.png")
    run_import("folder", root / "people", root / "set", ImportOptions(holdout_share=0, samples_per_shard=30))
    return root / "set"


@pytest.fixture
def web(large_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """The set on a server, in a copy that may be spoilt."""
    monkeypatch.setattr(remote, "_FIRST_DELAY", 0.01)
    shutil.copytree(large_set, tmp_path / "served")
    with serving(Web(tmp_path / "served")) as site:
        yield site


@pytest.fixture
def settings(web: Web, tmp_path: Path) -> DataConfig:
    size = {"height": 16, "width": 16, "batch_size": 12, "shuffle_window": 40}
    return DataConfig(path=web.address, cache_dir=tmp_path / "cache", cache="none", **size)


def with_(config: DataConfig, **changes: object) -> DataConfig:
    return DataConfig.model_validate({**config.model_dump(), **changes})


def stream(config: DataConfig, rank: int = 0, world_size: int = 1, shuffle: bool = True) -> Stream:
    manifest = Manifest.read(config.path, config.remote_cache)
    return Stream(manifest, "train", config, rank=rank, world_size=world_size, seed=3, shuffle=shuffle)


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    assert [one.keys for one in a] == [one.keys for one in b]
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.images_BCHW, y.images_BCHW)
        assert torch.equal(x.labels_B, y.labels_B)


def shards_sent(web: Web) -> dict[str, int]:
    return {name: sent for name, sent in web.sent.items() if name.endswith(".tar")}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("changes", [{}, {"identities_per_batch": 6}, {"shuffle": False}])
def test_batches_are_those_of_a_folder_and_no_byte_comes_twice(
    large_set: Path, web: Web, settings: DataConfig, world_size: int, changes: dict[str, object]
):
    changes = dict(changes)
    shuffle = bool(changes.pop("shuffle", True))
    far = with_(settings, **changes)
    near = with_(far, path=large_set)
    for rank in range(world_size):  # all ranks of a machine share the cache
        ours, theirs = (stream(config, rank, world_size, shuffle) for config in (far, near))
        for epoch in range(2):
            assert_equal(list(ours.batches(epoch)), list(theirs.batches(epoch)))
    sizes = {path.name: path.stat().st_size for path in large_set.glob("*.tar")}
    if "identities_per_batch" in changes:
        assert all(sent <= sizes[name] for name, sent in shards_sent(web).items())
    else:
        assert shards_sent(web) == sizes


def test_ranks_at_the_same_time_fetch_each_shard_once(large_set: Path, web: Web, settings: DataConfig):
    web.latency = 0.05
    found: dict[int, list[Batch]] = {}

    def work(rank: int) -> None:
        found[rank] = list(stream(settings, rank, 3).batches(0))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(3):
        assert_equal(found[rank], list(stream(with_(settings, path=large_set), rank, 3).batches(0)))
    assert shards_sent(web) == {path.name: path.stat().st_size for path in large_set.glob("*.tar")}


def _read_all(config: DataConfig) -> None:
    list(stream(config).batches(0))


def test_two_processes_fetch_each_shard_once(large_set: Path, web: Web, settings: DataConfig):
    web.latency = 0.05
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_read_all, args=(settings,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert shards_sent(web) == {path.name: path.stat().st_size for path in large_set.glob("*.tar")}


def test_a_pxk_batch_fetches_little_more_than_its_samples(web: Web, settings: DataConfig):
    config = with_(settings, identities_per_batch=2, batch_size=4)
    stream(config)._reader.read(np.array([0, 37, 61, 119]), stream(config)._reader.pool())
    assert sum(shards_sent(web).values()) <= 4 * 2 * BLOCK  # a sample lies in one block or two


def test_a_resume_fetches_only_what_it_needs(web: Web, settings: DataConfig):
    list(stream(settings).batches(0, start_step=9))  # the last of the three windows, at most three shards
    assert 1 <= len(shards_sent(web)) <= 3
    assert web.requests["train-000000.tar"] <= 1


def test_the_next_window_is_fetched_before_it_is_needed(web: Web, settings: DataConfig):
    one = stream(with_(settings, shuffle_window=30, batch_size=30))
    one.batch(0, 0)
    for _ in range(500):
        if len(shards_sent(web)) >= 2:
            break
        threading.Event().wait(0.02)
    assert len(shards_sent(web)) == 2  # window 0 is one shard, and window 1 another


def test_a_cache_smaller_than_the_windows_is_said_at_the_start(web: Web, settings: DataConfig):
    with pytest.raises(UserError, match=r"data.cache_bytes 1048576 is less than the \d+ bytes of the two windows"):
        stream(with_(settings, cache_bytes="1MiB"))
    stream(with_(settings, cache_bytes="1MiB", identities_per_batch=3))  # has no window


def test_a_small_cache_gives_the_same_batches_and_keeps_its_limit(large_set: Path, web: Web, settings: DataConfig):
    config = with_(settings, shuffle_window=20, cache_bytes="1.9MB")
    assert_equal(list(stream(config).batches(0)), list(stream(with_(config, path=large_set)).batches(0)))
    assert sum(path.stat().st_blocks * 512 for path in (config.cache_dir or Path()).iterdir()) <= 1_900_000


@pytest.mark.parametrize("fault", ["cut", "busy", "silent", "flip"])
def test_faults_that_pass_change_nothing(large_set: Path, web: Web, settings: DataConfig, fault: str):
    web.fault = fault
    web.faults.update({path.name: 1 for path in large_set.iterdir() if fault != "flip" or path.suffix != ".json"})
    assert_equal(list(stream(settings).batches(0)), list(stream(with_(settings, path=large_set)).batches(0)))


def test_a_missing_shard_is_named_with_the_sample(web: Web, settings: DataConfig):
    (web.folder / "train-000001.tar").unlink()
    with pytest.raises(
        UserError, match=r"sample '\d+' of shard 'train-000001.tar' .*/train-000001.tar' .*: it is not there"
    ):
        list(stream(settings).batches(0))


def test_a_truncated_shard_is_named_with_the_sample(web: Web, settings: DataConfig):
    with (web.folder / "train-000002.tar").open("r+b") as file:
        file.truncate(100_000)
    told = r"sample '\d+' of shard 'train-000002.tar' cannot be had: 'http://.*/train-000002.tar' .* it ends before the"
    with pytest.raises(UserError, match=told):
        list(stream(settings).batches(0))


def test_of_a_truncated_shard_the_rest_is_read(web: Web, settings: DataConfig):
    records = Manifest.read(web.address, settings.remote_cache).split("train").index(2).records
    with (web.folder / "train-000002.tar").open("r+b") as file:
        file.truncate(300_000)
    lost = int((records["offset"] // BLOCK >= 300_000 // BLOCK).sum())  # what lies in blocks that came before is there
    assert 10 < lost < 20
    left_out = stream(with_(settings, max_bad=20))
    keys = [key for batch in left_out.batches(0) for key in batch.keys]
    assert lost <= keys.count("") <= lost + 1  # one may reach into the block that is cut off
    assert web.requests["train-000002.tar"] < 200


def test_a_changed_shard_is_named_with_the_sample_after_a_second_look(web: Web, settings: DataConfig):
    path = web.folder / "train-000003.tar"
    data = bytearray(path.read_bytes())
    data[200_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"sample '\d+' of shard 'train-000003.tar' is damaged: its CRC-32 is wrong"):
        list(stream(settings).batches(0))
    assert web.sent[path.name] > len(data)


def test_a_manifest_that_is_too_large_is_not_read(web: Web, settings: DataConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trainer.data.manifest._MAX_BYTES", 200)
    for address in (web.address, web.folder):
        with pytest.raises(UserError, match=r"/manifest.json' has more than 200 bytes, and is not read; run 'hypers"):
            Manifest.read(address, settings.remote_cache)


@pytest.mark.parametrize("name", ["train-000000.idx", "train.classes.arrow"])
def test_a_changed_table_is_named(web: Web, settings: DataConfig, name: str):
    data = bytearray((web.folder / name).read_bytes())
    data[-1] ^= 1
    (web.folder / name).write_bytes(data)
    manifest = Manifest.read(web.address, settings.remote_cache)
    with pytest.raises(UserError, match=f"{name}' does not have the SHA-256 .* it was cut off or changed"):
        manifest.split("train").classes if "classes" in name else manifest.split("train").index(0)


def test_nothing_at_the_address(web: Web, settings: DataConfig):
    with pytest.raises(UserError, match=r"elsewhere/manifest.json' cannot be read: it is not there"):
        Manifest.read(f"{web.address}/elsewhere", settings.remote_cache)


def test_a_password_in_the_address_is_never_shown(web: Web, settings: DataConfig, large_set: Path):
    web.password = "annie:s3cret"
    config = with_(settings, path=f"http://annie:s3cret@127.0.0.1:{web.port}")
    (web.folder / "train-000001.tar").unlink()
    with pytest.raises(UserError) as caught:
        list(stream(config).batches(0))
    assert "s3cret" not in str(caught.value)
    assert "/train-000001.tar" in str(caught.value)


def test_shards_may_lie_elsewhere_than_the_manifest(large_set: Path, web: Web, settings: DataConfig, tmp_path: Path):
    near = tmp_path / "near"
    shutil.copytree(large_set, near, ignore=shutil.ignore_patterns("*.tar"))
    text = (near / "manifest.json").read_text()
    for i in range(4):
        name = f'"name": "train-{i:06d}.tar"'
        assert name in text
        text = text.replace(f'{name},\n     "url": null', f'{name},\n     "url": "{web.address}/train-{i:06d}.tar"')
    (near / "manifest.json").write_text(text)
    config = with_(settings, path=near)
    assert_equal(list(stream(config).batches(0)), list(stream(with_(settings, path=large_set)).batches(0)))
    assert set(web.requests) == {f"train-{i:06d}.tar" for i in range(4)}


def test_another_fsspec_address(large_set: Path, settings: DataConfig):
    files = fsspec.filesystem("memory")
    files.put(f"{large_set}/", "memory://faces/", recursive=True)
    config = with_(settings, path="memory://faces")
    assert_equal(list(stream(config).batches(0)), list(stream(with_(settings, path=large_set)).batches(0)))
    files.rm("/faces", recursive=True)


def test_a_store_travels_to_other_processes(web: Web, settings: DataConfig):
    store = open_store(web.address, settings.remote_cache)
    store.read_bytes("manifest.json", 1 << 20)  # with connections and threads of this process
    entry = Manifest.read(web.address, settings.remote_cache).split("train").shards[0].file
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=_open_shard, args=(pickle.dumps(store), store, entry))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def _open_shard(pickled: bytes, inherited: object, entry: File) -> None:
    for store in (inherited, pickle.loads(pickled)):  # noqa: S301  made by this test
        with store.open({entry: [(0, 512)]}, whole=False) as files:  # type: ignore[attr-defined]
            assert files[entry].read(5) == b"00000"


def test_a_path_given_out_is_not_removed_before_it_can_be_opened(web: Web, settings: DataConfig, tmp_path: Path):
    store = open_store(web.address, CacheConfig(tmp_path / "small", 1_000_000))
    first, second, third = (entry.file for entry in Manifest.read(web.address).split("train").shards[:3])
    path = store.path(*first)
    with pytest.raises(UserError, match=r"raise data\.cache_bytes"):
        store.path(*second)
    assert path.exists()
    del store
    gc.collect()
    assert open_store(web.address, CacheConfig(tmp_path / "small", 1_000_000)).path(*third).exists()
    assert not path.exists()


def test_bad_samples_are_left_out_up_to_the_limit_and_fatal_beyond(web: Web, settings: DataConfig):
    (web.folder / "train-000001.tar").unlink()  # 30 samples
    left_out = stream(with_(settings, max_bad=30))
    whole = [key for batch in left_out.batches(0) for key in batch.keys]
    assert (whole.count(""), left_out.bad) == (30, 30)
    too_many = stream(with_(settings, max_bad=29))
    with pytest.raises(UserError, match=r"30 samples cannot be read \(data.max_bad is 29\); the last: sample"):
        list(too_many.batches(0))


def test_a_bad_image_is_named_with_shard_and_key(web: Web, settings: DataConfig):
    manifest = Manifest.read(web.address, settings.remote_cache)
    record = manifest.split("train").index(2).records[7]
    path = web.folder / "train-000002.tar"
    data = bytearray(path.read_bytes())
    data[int(record["offset"]) + 60] ^= 1
    path.write_bytes(data)
    left_out = stream(with_(settings, max_bad=1))
    assert [key for batch in left_out.batches(0) for key in batch.keys].count("") == 1
    with pytest.raises(UserError, match=r"sample '000000067' of shard 'train-000002.tar' is damaged"):
        list(stream(settings).batches(0))


@pytest.mark.parametrize("identities", [None, 6])
def test_a_mix_of_near_and_far(large_set: Path, web: Web, settings: DataConfig, identities: int | None):
    near = with_(
        settings, path=large_set, mix=[{"path": large_set}, {"path": large_set}], identities_per_batch=identities
    )
    far = with_(near, mix=[{"path": large_set}, {"path": web.address}])
    assert_equal(list(stream(far).batches(0)), list(stream(near).batches(0)))
    assert sum(shards_sent(web).values()) <= sum(path.stat().st_size for path in large_set.glob("*.tar"))


def test_decoder_processes_read_from_afar(large_set: Path, web: Web, settings: DataConfig):
    found = list(stream(with_(settings, decode_processes=2)).batches(0))
    assert_equal(found, list(stream(with_(settings, path=large_set)).batches(0)))


def test_addresses_in_a_config(tmp_path: Path):
    assert DataConfig(path="s3://bucket/faces").path == "s3://bucket/faces"
    assert DataConfig(path=Path("s3://bucket/faces")).path == "s3://bucket/faces"
    assert DataConfig(path=f"file://{tmp_path}").path == tmp_path == DataConfig(path=str(tmp_path)).path
    config = DataConfig(path="gs://bucket/faces", cache_dir=tmp_path, cache_bytes="3GB")
    assert config.remote_cache == CacheConfig(tmp_path, 3 * 10**9)
    assert DataConfig.model_validate(config.model_dump(mode="json")) == config
    with pytest.raises(ValueError, match="7 is neither a folder nor an address such as s3://bucket/faces"):
        DataConfig(path=7)


def test_verification_from_afar(web: Web, settings: DataConfig):
    verify(Manifest.read(Path(web.address), settings.remote_cache))  # as the command line has it
    shutil.rmtree(settings.cache_dir or "")
    with (web.folder / "train-000002.tar").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"^'http://.*/train-000002.tar' does not have the SHA-256 [0-9a-f]{64}"):
        verify(Manifest.read(web.address, settings.remote_cache))


def test_a_set_of_format_1_from_afar(settings: DataConfig, tmp_path: Path):
    folder = Path(shutil.copytree(Path(__file__).parent / "format1", tmp_path / "old"))
    with serving(Web(folder)) as site:
        far = with_(settings, path=site.address, shuffle_window=5, batch_size=3)
        found = list(stream(far).batches(0))
        assert shards_sent(site) == {path.name: path.stat().st_size for path in folder.glob("train*.tar")}
    assert_equal(found, list(stream(with_(far, path=folder)).batches(0)))
