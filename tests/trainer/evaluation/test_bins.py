"""`.bin` files against pickles of every protocol, and against pickles that would run something."""

import os
import pickle
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.evaluation.bins import read_bin

IMAGES, SAME = [b"one", b"two", b"x" * 300, b"y" * 70_000], [True, False]


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "pairs.bin"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("outer", [tuple, list])
def test_images_and_labels_come_back(tmp_path: Path, protocol: int, outer: type) -> None:
    assert read_bin(write(tmp_path, pickle.dumps(outer((IMAGES, SAME)), protocol))) == (IMAGES, SAME)
    assert read_bin(write(tmp_path, pickle.dumps(outer((IMAGES, [1, 0])), protocol))) == (IMAGES, SAME)


def test_what_python_2_wrote_is_read(tmp_path: Path) -> None:
    # protocol 2 of Python 2: strings are SHORT_BINSTRING and BINSTRING
    content = b"\x80\x02(]q\x00(U\x03\xff\xd8\xffq\x01T\x02\x00\x00\x00\x89Pq\x02e]q\x03\x88at."
    assert read_bin(write(tmp_path, content)) == ([b"\xff\xd8\xff", b"\x89P"], [True])


def test_an_image_that_occurs_twice_is_read_from_the_memo(tmp_path: Path) -> None:
    image = b"the same"
    assert read_bin(write(tmp_path, pickle.dumps(([image, image], [True])))) == ([image, image], [True])


class Command:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("where", ["alone", "among the images", "among the labels"])
def test_nothing_is_run(tmp_path: Path, protocol: int, where: str) -> None:
    command = Command(tmp_path / "ran")
    hostile = {
        "alone": command,
        "among the images": ([b"a", command], [True]),
        "among the labels": ([b"a", b"b"], [command]),
    }
    with pytest.raises(UserError, match=r"could run a program|not a whole"):
        read_bin(write(tmp_path, pickle.dumps(hostile[where], protocol)))
    assert not (tmp_path / "ran").exists()


HOSTILE = {
    "a class by name": b"cos\nsystem\n(S'true'\ntR.",
    "an instance": b"(S'true'\nios\nsystem\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent id": b"\x80\x04X\x01\x00\x00\x00aQ.",
    "a dictionary": b"\x80\x04}.",
    "a stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "nothing": b"",
    "no pickle": b"JFIF and more",
    "cut off": pickle.dumps((IMAGES, SAME))[:-100],
    "a length beyond the file": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    "no mark": b"\x80\x04]\x88e.",
    "an empty stack": b"\x80\x04a.",
    "a memo of nothing": b"\x80\x04h\x05.",
    "one list": pickle.dumps([[b"a"]]),
    "text": pickle.dumps((["a", "b"], [True])),
    "labels of two and more": pickle.dumps(([b"a", b"b"], [2])),
    "three images of a pair": pickle.dumps(([b"a", b"b", b"c"], [True])),
    "no pairs": pickle.dumps(([], [])),
    "numbers": b"\x80\x04K\x01K\x02\x86.",
    "a list that holds itself": b"\x80\x04]q\x00h\x00a.",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_list_of_pairs_is_one_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"pairs\.bin'") as refused:
        read_bin(write(tmp_path, HOSTILE[name]))
    assert "\n" not in str(refused.value)


def test_references_do_not_grow(tmp_path: Path) -> None:
    """Pairs of pairs of the same: 2^100 leaves if anything walked them."""
    content = b"\x80\x04]q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(100)) + b"."
    with pytest.raises(UserError, match="does not begin with a list"):
        read_bin(write(tmp_path, content))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.bin': No such file"):
        read_bin(tmp_path / "none.bin")
