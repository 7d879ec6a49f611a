"""The cache: what it holds, what it fetches, what it removes; several processes and killed ones."""

import contextlib
import fcntl
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trainer.data.cache import BLOCK, PART, Cache
from trainer.errors import UserError


def content(blocks: float, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(int(blocks * BLOCK))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Far:
    """A file far away, and what was fetched of it."""

    def __init__(self, data: bytes) -> None:
        self.data, self.asked = data, list[tuple[int, int]]()

    def __call__(self, start: int, stop: int) -> bytes:
        self.asked.append((start, stop))
        return self.data[start:stop]


def keep(cache: Cache, data: bytes, ranges: list[tuple[int, int]] | None = None) -> list[tuple[int, int]]:
    """Fetch what is missing of the file; what was asked for."""
    far = Far(data)
    with cache.open(digest(data), len(data)) as file:
        for first, stop in file.missing(ranges):
            file.fill(first, stop, far)
        for offset, size in ranges or [(0, len(data))]:
            assert os.pread(file.file.fileno(), size, offset) == data[offset : offset + size]
    return far.asked


def kept(cache: Cache) -> set[str]:
    return {path.name for path in cache.folder.iterdir() if len(path.name) == 64}


def on_disk(cache: Cache) -> int:
    return sum(path.stat().st_blocks * 512 for path in cache.folder.iterdir())


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 100 * BLOCK)


def test_only_the_blocks_that_a_range_lies_in_are_fetched_and_only_once(cache: Cache):
    data = content(20.3)
    assert keep(cache, data, [(BLOCK - 1, 2), (10 * BLOCK, 1)]) == [(0, 2 * BLOCK), (10 * BLOCK, 11 * BLOCK)]
    assert on_disk(cache) < 5 * BLOCK
    assert keep(cache, data, [(5, 10), (10 * BLOCK + 7, 30)]) == []
    assert keep(cache, data) == [(2 * BLOCK, 10 * BLOCK), (11 * BLOCK, len(data))]
    assert keep(Cache(cache.folder, cache.limit), data) == []  # another process, later


def test_a_large_file_comes_in_parts(tmp_path: Path):
    data = content(2.5 * PART / BLOCK)
    asked = keep(Cache(tmp_path / "cache", 10 * PART), data)
    assert asked == [(0, PART), (PART, 2 * PART), (2 * PART, len(data))]


def test_used_longest_ago_goes_first_and_the_limit_holds(cache: Cache):
    files = [content(20, seed) for seed in range(6)]
    for data in files[:4]:
        keep(cache, data)
    keep(cache, files[0])  # used again
    for data in files[4:]:
        keep(cache, data)
        assert on_disk(cache) <= cache.limit
    assert kept(cache) == {digest(files[i]) for i in (0, 3, 4, 5)}


def test_a_file_that_is_open_stays(cache: Cache):
    files = [content(30, seed) for seed in range(4)]
    keep(cache, files[0])
    with cache.open(digest(files[0]), len(files[0])):
        for data in files[1:]:
            keep(cache, data)
        assert digest(files[0]) in kept(cache)
    keep(cache, content(60, 9))
    assert digest(files[0]) not in kept(cache)


def test_no_room_is_one_sentence_with_the_numbers(cache: Cache):
    data = content(60)
    keep(cache, data)
    with cache.open(digest(data), len(data)), pytest.raises(UserError, match=r"may hold 6553600 bytes, of which \d+"):
        keep(cache, content(50, 1))


def test_a_full_disk_is_one_sentence_and_leaves_nothing_that_counts(cache: Cache, monkeypatch: pytest.MonkeyPatch):
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(UserError, match=r"the disk of the cache .* is full; lower data.cache_bytes"):
            keep(cache, content(3))
    assert keep(cache, content(3)) == [(0, 3 * BLOCK)]


def test_a_file_where_the_folder_should_be(tmp_path: Path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match=r"cannot be used: .*set data.cache_dir"):
        keep(Cache(tmp_path / "cache", 1000), b"a")


def test_threads_that_want_the_same_blocks_fetch_them_once(cache: Cache):
    data = content(8)
    far = Far(data)
    begun = threading.Barrier(4)

    def work() -> None:
        with cache.open(digest(data), len(data)) as file:
            runs = file.missing(None)
            begun.wait()  # each has seen that all is missing
            for first, stop in runs:
                file.fill(first, stop, far)
            assert file.verified()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert far.asked == [(0, len(data))]


def test_what_a_killed_process_was_fetching_counts_as_missing(cache: Cache):
    data = content(4)
    fork = multiprocessing.get_context("fork")
    reached = fork.Event()

    def die() -> None:
        def hang(start: int, stop: int) -> bytes:
            reached.set()
            signal.pause()
            return b""

        with cache.open(digest(data), len(data)) as file:
            file.fill(0, 1, Far(data))
            file.fill(1, 4, hang)

    child = fork.Process(target=die)
    child.start()
    assert reached.wait(30)
    waited: list[list[tuple[int, int]]] = []
    waiter = threading.Thread(target=lambda: waited.append(keep(cache, data)))
    waiter.start()
    waiter.join(0.2)
    assert not waited  # the other one is at it
    child.kill()
    waiter.join(30)
    assert waited == [[(BLOCK, 4 * BLOCK)]]
    child.join()
    with cache.open(digest(data), len(data)) as file:
        assert file.verified()


@pytest.mark.parametrize("ranges", [None, [(2 * BLOCK + 5, 10)]])
def test_what_is_forgotten_is_fetched_again(cache: Cache, ranges: list[tuple[int, int]] | None):
    data = content(4)
    keep(cache, data)
    with cache.open(digest(data), len(data)) as file:
        assert file.verified()
        file.forget(ranges)
    assert keep(cache, data) == [(0, 4 * BLOCK) if ranges is None else (2 * BLOCK, 3 * BLOCK)]


def test_another_content_is_not_verified(cache: Cache):
    data = content(2)
    with cache.open(digest(data), len(data)) as file:
        file.fill(0, 2, Far(content(2, seed=1)))
        assert not file.verified()
        file.forget()
        file.fill(0, 2, Far(data))
        assert file.verified()


def test_a_file_of_unknown_size_is_fetched_once(cache: Cache):
    data, asked = content(1.5), list[str]()

    def whole(name: str) -> Callable[[], bytes]:
        return lambda: asked.append(name) or data

    for name in "ab":
        with cache.open(digest(data), None) as file:
            file.fill_unsized(whole(name))
            assert file.verified()
    assert asked == ["a"]
    assert (cache.folder / digest(data)).read_bytes() == data


def test_files_that_were_removed_by_hand_do_not_count_for_ever(cache: Cache):
    for seed in range(4):
        keep(cache, content(20, seed))
    for path in cache.folder.iterdir():
        if path.name != "used":
            path.unlink()
    for seed in range(4, 8):
        keep(cache, content(20, seed))
    assert kept(cache) == {digest(content(20, seed)) for seed in range(4, 8)}


def _wander(cache: Cache, seed: int) -> None:
    """Read parts of files at random."""
    random = np.random.default_rng(seed)
    for _ in range(80):
        data = content(20, int(random.integers(8)))
        offset = int(random.integers(len(data) - 1))
        keep(cache, data, [(offset, int(random.integers(1, len(data) - offset)))])


def test_processes_that_crowd_each_other_out_read_right_and_keep_the_limit(cache: Cache):
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_wander, args=(cache, seed)) for seed in range(4)]
    for child in children:
        child.start()
    most = 0
    while any(child.is_alive() for child in children[1:]):
        with contextlib.suppress(FileNotFoundError), (cache.folder / "used").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # so that nothing is removed while we look
            most = max(most, on_disk(cache))
        if most > cache.limit // 2:
            children[0].kill()
    for child in children:
        child.join()
    assert [child.exitcode for child in children[1:]] == [0, 0, 0]
    assert cache.limit // 2 < most <= cache.limit
    _wander(cache, 9)


def test_files_of_others_in_the_folder_stay(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10 * BLOCK)
    others = {"Makefile", "README", ".profile", "folder", "a" * 63, "g" * 65}
    for name in others - {"folder"}:
        (tmp_path / name).write_bytes(content(1))
    (tmp_path / "folder").mkdir()
    for seed in range(20):
        keep(cache, content(1, seed))
    assert others <= {path.name for path in tmp_path.iterdir()}
    assert 0 < len(kept(cache)) < 10


def test_a_file_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    for name, size in ((f"{digest(b'x')}.map", BLOCK), ("used", BLOCK)):
        cache = Cache(tmp_path / name[:4], 10 * BLOCK)
        (cache.folder / name).mkdir(parents=True)
        with pytest.raises(UserError, match=r"cannot be used: Is a directory; set data\.cache_dir"):
            keep_sized(cache, size)
    with pytest.raises(UserError, match=r"cannot be used: File too large; set data\.cache_dir"):
        keep_sized(Cache(tmp_path / "large", 10 * BLOCK), 2**62)


def keep_sized(cache: Cache, size: int) -> None:
    with cache.open(digest(b"x"), size) as file:
        file.fill(0, 1, lambda start, stop: bytes(stop - start))
