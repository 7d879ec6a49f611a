"""The samples of a WebDataset tar, in one pass from its beginning to its end. Runs without torch.

A sample is the run of files that share a key: the path up to the first dot of the base name. Hidden
files and those without a suffix are passed over.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import BinaryIO

from trainer.data.image import MAX_BYTES
from trainer.data.members import TarMember, members
from trainer.errors import UserError

# The file that is the sample itself, in the order of preference where there are several.
PAYLOADS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jp2", "npy")
REMEDY = "import the data again, or fetch this shard anew"
_MAX_TEXT = 2**20  # bytes of a .cls or a .json


@dataclass(frozen=True, slots=True)
class TarSample:
    """A sample: its payload (an image or a vector, in the format that `suffix` says) and what is said about it.

    `label` is the number in `.cls`, None where there is none or it is no number; `cls` and `text` are the content of
    `.cls` and `.json`, None and empty where there is no such file.
    """

    key: str
    suffix: str
    offset: int
    size: int
    payload: bytes = field(repr=False)
    label: int | None
    cls: bytes | None
    text: bytes


def samples_of(file: BinaryIO, shard: str, *, payloads: bool = True) -> Iterator[TarSample]:
    """The samples of an archive, in its order. Memory: one sample.

    Args:
        file: the archive, seekable.
        shard: what messages call it.
        payloads: read them too; else they are jumped over and empty.

    Raises:
        UserError: the archive is cut off, damaged or not a tar; a name that climbs out of it; a sample without a
            payload, with two files of one suffix, or with a file that is too large. Names the shard and the sample.
    """
    named = (member for member in members(file, shard) if _belongs(member.name))
    for key, files in groupby(named, key=lambda member: key_of(member.name)):
        yield _sample(file, shard, key, files, payloads)


def _belongs(name: str) -> bool:
    """Whether it is a file of a sample. As WebDataset, this passes over hidden files, such as macOS adds to archives,
    and those without a suffix."""
    stem, dot, _ = name.rpartition("/")[2].partition(".")
    return bool(stem and dot)


def key_of(name: str) -> str:
    """The key of the sample that a file belongs to."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _sample(file: BinaryIO, shard: str, key: str, files: Iterator[TarMember], payloads: bool) -> TarSample:
    found: dict[str, tuple[TarMember, bytes]] = {}
    suffixes: list[str] = []
    for member in files:
        suffix = member.name[len(key) + 1 :].lower()
        suffixes.append(f".{suffix}" if suffix else "no suffix")
        most = MAX_BYTES if suffix in PAYLOADS else _MAX_TEXT if suffix in ("cls", "json") else None
        if most is None:
            continue
        if suffix in found:
            raise UserError(f"sample '{key}' of shard '{shard}' has two files '.{suffix}'; {REMEDY}")
        if member.size > most:
            raise UserError(f"'{member.name}' of shard '{shard}' has {member.size} bytes; at most {most} are read")
        found[suffix] = member, file.read(member.size) if payloads or suffix in ("cls", "json") else b""
    suffix = next((one for one in PAYLOADS if one in found), "")
    if not suffix:
        held = ", ".join(suffixes[:10])
        raise UserError(
            f"sample '{key}' of shard '{shard}' lacks an image or array ({', '.join(f'.{one}' for one in PAYLOADS)}): "
            f"its files have {held}; pack one with every sample, or import the data again"
        )
    member, payload = found[suffix]
    cls = found["cls"][1].strip() if "cls" in found else None
    label = int(cls) if cls and cls.isdigit() and len(cls) < 20 else None
    text = found["json"][1] if "json" in found else b""
    return TarSample(key, suffix, member.offset, member.size, payload, label, cls, text)
