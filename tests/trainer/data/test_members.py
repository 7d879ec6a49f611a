"""The walk over a tar's headers, against tarfile's own reading and against damage."""

import contextlib
import io
import tarfile
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.peak import at_most
from trainer.data.members import TarMember, members
from trainer.errors import UserError

NAMES = ["plain.jpg", "a/b/c.cls", "x" * 99, "é/字.png", "d" * 90 + "/" + "e" * 90 + ".jpg", "f" * 300 + ".json"]
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def info(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.type, made.linkname = size, kind, link
    return made


def packed(*entries: tuple[tarfile.TarInfo, bytes], format: str = "pax") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[format]) as tar:
        for entry, content in entries:
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def walk(data: bytes) -> list[TarMember]:
    file = io.BufferedReader(io.BytesIO(data))  # which takes the memory that it is asked to fill
    return list(members(file, "x.tar"))


@pytest.mark.parametrize("format", FORMATS)
def test_names_and_contents_are_those_that_were_packed(format: str):
    names = NAMES[:5] if format == "ustar" else NAMES
    contents = [bytes([row]) * size for row, size in enumerate([0, 1, 511, 512, 513, 70_000][: len(names)])]
    pairs = list(zip(names, contents, strict=True))
    folder = info("folder/", kind=tarfile.DIRTYPE)
    data = packed((folder, b""), *((info(name, len(content)), content) for name, content in pairs), format=format)
    found = walk(data)
    assert [(member.name, data[member.offset : member.offset + member.size]) for member in found] == pairs


def with_global_header(data: bytes, **records: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers=records):
        pass
    return buffer.getvalue()[:1024] + data


def test_global_pax_header_that_says_nothing_of_interest_is_passed_over():
    data = with_global_header(packed((info("a.jpg", 3), b"abc")), comment="made by git archive")
    assert walk(data) == [TarMember("a.jpg", 1024 + 512, 3)]


def test_sizes_of_8_gib_and_more():
    """A header may promise it; the content is not there, so the walk says where the file ends."""
    gnu = info("big.jpg", 9 * 2**30).tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(UserError, match=r"'x\.tar' is cut off at byte 612, inside 'big\.jpg'"):
        walk(gnu + bytes(100))
    pax = info("big.jpg", 9 * 2**30).tobuf(tarfile.PAX_FORMAT)
    with pytest.raises(UserError, match=r"inside 'big\.jpg'"):
        walk(pax + bytes(100))


@pytest.mark.parametrize("name", ["../up.jpg", "a/../../up.jpg", "/etc/passwd", "a/.."])
@pytest.mark.parametrize("format", FORMATS)
def test_paths_that_climb_out_are_refused(name: str, format: str):
    with pytest.raises(UserError, match=r"shard 'x\.tar' holds '.*', a path that leads out of it"):
        walk(packed((info(name, 1), b"a"), format=format))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.FIFOTYPE, "a FIFO"),
        (tarfile.CHRTYPE, "a character device"),
        (tarfile.BLKTYPE, "a block device"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
        (b"Q", "of the unknown type b'Q'"),
    ],
)
def test_what_is_no_plain_file_is_named(kind: bytes, says: str):
    with pytest.raises(UserError, match=f"'odd' in shard 'x.tar' is {says}"):
        walk(packed((info("odd", kind=kind, link="a"), b"")))


def test_a_file_that_pax_calls_sparse_is_refused():
    entry = info("hole", 1)
    entry.pax_headers = {"GNU.sparse.major": "1"}
    with pytest.raises(UserError, match=r"'hole' in shard 'x\.tar' is a sparse file"):
        walk(packed((entry, b"a")))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: data[:512], r"cut off at byte 512, inside 'a\.jpg'"),
        (lambda data: data[:700], r"cut off at byte 700, inside 'a\.jpg'"),
        (lambda data: data[:1536], "cut off at byte 1536"),
        (lambda data: data[:1600], "cut off at byte 1600"),
        (lambda data: data[:-10240], "cut off at byte 0"),
        (lambda data: data[:1536] + b"\1" + data[1537:], "damaged at byte 1536"),
        (lambda data: b"\1" + data[1:], "not a tar, or is damaged at byte 0"),
        (lambda data: b"\x1f\x8b" + data[2:], r"compressed \(gzip\)"),
    ],
)
def test_damage_is_named_with_its_byte(spoil: Callable[[bytes], bytes], says: str):
    data = packed((info("a.jpg", 600), bytes(600)), format="ustar")
    with pytest.raises(UserError, match=says):
        walk(spoil(data))


def test_a_header_may_not_ask_for_much_memory():
    header = info("@LongLink", 2**30, tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(UserError, match="1073741824 bytes at byte 0; at most 1048576"), at_most(2**20):
        walk(header)


def test_every_bit_of_a_header_is_watched():
    data = packed((info("a.jpg", 3), b"abc"), format="ustar")
    for bit in range(512 * 8):
        spoilt = bytearray(data)
        spoilt[bit // 8] ^= 1 << bit % 8
        try:
            found = walk(bytes(spoilt))
        except UserError:
            continue
        assert found == walk(data), bit  # a digit's padding may differ, the member may not


WHOLE = packed(*((info(name, 40), bytes(40)) for name in NAMES), format="pax") + packed((info("z", 3), b"abc"))


@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=8), st.integers(0, len(WHOLE)))
def test_damage_raises_nothing_else(changes: list[tuple[int, int]], length: int):
    data = bytearray(WHOLE)
    for place, value in changes:
        data[place] = value
    del data[length:]
    with contextlib.suppress(UserError), at_most(2 * len(WHOLE) + 2**20):
        assert all(member.offset + member.size <= len(data) for member in walk(bytes(data)))


@given(st.binary(max_size=2000), st.sampled_from([b"x", b"g", b"L", b"K"]))
def test_hostile_extended_headers_raise_nothing_else(content: bytes, kind: bytes):
    header = info("extended", len(content), kind).tobuf(tarfile.USTAR_FORMAT)
    with contextlib.suppress(UserError):
        walk(header + content + bytes(-len(content) % 512) + packed((info("a", 1), b"a")))


def test_an_archive_that_goes_on_after_its_end_is_refused():
    one, other = (packed((info(name, 3), b"abc"), format="gnu") for name in ("a.jpg", "b.jpg"))
    with pytest.raises(
        UserError, match=r"goes on after its end at byte 1024, as archives do that were joined by 'cat'"
    ):
        walk(one + other)
    assert [member.name for member in walk(one + bytes(2**17))] == ["a.jpg"]
