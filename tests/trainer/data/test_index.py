import struct
from pathlib import Path

import numpy as np
import pytest

from trainer.data.index import RECORD, ShardIndex, make_index, open_index, write_index
from trainer.errors import UserError


def index_of(keys: list[str] | int, samples: int = 3) -> ShardIndex:
    records = np.zeros(samples, RECORD)
    records["offset"], records["size"] = 2**33 + np.arange(samples), 100 + np.arange(samples)
    records["label"], records["crc"] = np.arange(samples)[::-1], 2**32 - 1
    return make_index(records, keys, 2**34)


def test_the_bytes_are_those_of_the_description(tmp_path: Path):
    write_index(tmp_path / "a.idx", index_of(["k", "ü", "xyz"]))
    data = (tmp_path / "a.idx").read_bytes()
    assert data[:8] == b"HSINDEX2"
    assert struct.unpack_from("<IIQQQQ", data, 8) == (1, 24, 3, 2**34, 6, 0)
    assert data[48:64] == bytes(16)
    assert struct.unpack_from("<QIIII", data, 64 + 24) == (2**33 + 1, 101, 1, 2**32 - 1, 3)
    assert data[64 + 3 * 24 :] == "küxyz".encode()


def test_read_as_it_was_written(tmp_path: Path):
    for keys, expected in ((["k", "ü", "xyz"], ["k", "ü", "xyz"]), (41, ["000000041", "000000042", "000000043"])):
        made = index_of(keys)
        first = write_index(tmp_path / "a.idx", made)
        assert write_index(tmp_path / "b.idx", made) == first
        found = open_index(tmp_path / "a.idx")
        assert [found.key(row) for row in range(found.samples)] == expected
        assert (found.samples, found.tar_bytes) == (3, 2**34)
        assert found.labels.tolist() == [2, 1, 0]
        np.testing.assert_array_equal(found.records, made.records)


def test_a_sample_takes_24_bytes(tmp_path: Path):
    write_index(tmp_path / "a.idx", index_of(0, samples=1000))
    assert (tmp_path / "a.idx").stat().st_size == 64 + 24 * 1000


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: b"", "not the index of a shard"),
        (lambda data: b"X" + data[1:], "not the index of a shard"),
        (lambda data: data[:40], "not the index of a shard"),
        (lambda data: data[:8] + b"\2" + data[9:], "version 2, and only 1 is read"),
        (lambda data: data[:-1], r"a\.idx' has 135 bytes, but its header promises 136"),
        (lambda data: data + b"x", "has 137 bytes"),
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "its header promises"),
    ],
)
def test_what_is_no_whole_index_is_refused(tmp_path: Path, spoil, words: str):
    path = tmp_path / "a.idx"
    write_index(path, index_of(0))
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match=words):
        open_index(path)


def test_an_index_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match=r"a\.idx' cannot be read: No such file"):
        open_index(tmp_path / "a.idx")
