"""What lasts when something from afar cannot be had: who is asked again, how often, and who goes on."""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from tests.web import Web, serving
from trainer.data import remote
from trainer.data.cache import BLOCK
from trainer.data.manifest import Manifest
from trainer.data.store import File, open_store
from trainer.data.stream import DataConfig, Stream
from trainer.errors import UserError


@pytest.fixture
def web(data_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(remote, "_FIRST_DELAY", 0.01)
    shutil.copytree(data_set, tmp_path / "served")
    with serving(Web(tmp_path / "served")) as site:
        yield site


@pytest.fixture
def settings(web: Web, config: DataConfig, tmp_path: Path) -> DataConfig:
    return config.model_copy(update={"path": web.address, "cache_dir": tmp_path / "cache", "cache": "none"})


def test_after_a_lasting_failure_the_rest_of_a_shard_fails_at_once(web: Web, settings: DataConfig):
    web.fault = "busy"
    web.faults["train-000001.tar"] = 10**6
    config = settings.model_copy(update={"max_bad": 10})
    left_out = Stream(Manifest.read(web.address, config.remote_cache), "train", config, seed=3)
    assert len(list(left_out.batches(0))) == 4
    assert left_out.bad == 10
    # Each of 10 samples would try 5 times. Several threads may have begun before the first has failed.
    assert web.requests["train-000001.tar"] <= 20


def test_a_file_that_failed_is_asked_for_again_a_while_later(
    web: Web, settings: DataConfig, monkeypatch: pytest.MonkeyPatch
):
    shard = Manifest.read(web.address, settings.remote_cache).split("train").shards[0].file
    web.fault = "busy"
    web.faults[shard.name] = 2 * remote.ATTEMPTS
    far = open_store(web.address, settings.remote_cache)

    def fails() -> bool:
        with far.open({shard: [(0, 512)]}) as files:
            return isinstance(files[shard], UserError)

    assert fails()
    assert fails()
    assert web.requests[shard.name] == remote.ATTEMPTS
    far = open_store(web.address, settings.remote_cache)
    monkeypatch.setattr("trainer.data.store._PAUSE_S", 0)
    assert fails()
    assert not fails()


def test_of_a_file_that_ends_early_each_part_is_asked_for_once(settings: DataConfig, monkeypatch: pytest.MonkeyPatch):
    waits: list[float] = []
    # Not time's own `sleep`: threads that other tests left sleep, too.
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=waits.append, monotonic=time.monotonic))
    fsspec.filesystem("memory").pipe("/short/a.tar", bytes(3 * BLOCK))
    shard = File("a.tar", 9 * BLOCK, "0" * 64)
    far = open_store("memory://short", settings.remote_cache)
    for block in (3, 4, 5, 6, 1):
        with far.open({shard: [(block * BLOCK, 512)]}) as files:
            assert isinstance(files[shard], UserError) == (block > 1)
    assert len(waits) == remote.ATTEMPTS - 1
    fsspec.filesystem("memory").rm("/short", recursive=True)


def test_a_broken_connection_does_not_end_the_threads_that_fetch_ahead(data_set: Path):
    def broken() -> None:
        raise RuntimeError("Connection closed.")

    near, done = open_store(data_set), threading.Event()
    for _ in range(100):  # more than there are threads
        near.later(broken)
    near.later(done.set)
    assert done.wait(20)
