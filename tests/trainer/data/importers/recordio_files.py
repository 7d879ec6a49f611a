"""RecordIO files, written byte by byte from the format's description."""

import struct
from collections.abc import Sequence
from pathlib import Path

MAGIC = b"\x0a\x23\xd7\xce"


def part(flag: int, data: bytes) -> bytes:
    return MAGIC + struct.pack("<I", flag << 29 | len(data)) + data + bytes(-len(data) % 4)


def record(content: bytes) -> bytes:
    """One record; where the magic number stands in it at a multiple of four bytes, it is cut there."""
    parts, start = [], 0
    for place in range(0, len(content) - 3, 4):
        if content[place : place + 4] == MAGIC:
            parts.append(content[start:place])
            start = place + 4
    parts.append(content[start:])
    if len(parts) == 1:
        return part(0, content)
    return part(1, parts[0]) + b"".join(part(2, data) for data in parts[1:-1]) + part(3, parts[-1])


def content(label: float | Sequence[float], image: bytes, key: int = 0) -> bytes:
    if isinstance(label, Sequence):
        return struct.pack("<IfQQ", len(label), 0.0, key, 0) + struct.pack(f"<{len(label)}f", *label) + image
    return struct.pack("<IfQQ", 0, label, key, 0) + image


def write_records(path: Path, contents: dict[int, bytes]) -> None:
    """Write `path` (.rec), and the .idx beside it, with a record for each key."""
    index, data = "", b""
    for key, value in contents.items():
        index += f"{key}\t{len(data)}\n"
        data += record(value)
    path.write_bytes(data)
    path.with_suffix(".idx").write_text(index)


def write_insightface(path: Path, people: Sequence[Sequence[bytes]]) -> None:
    """A file as InsightFace packs it: record 0 with ranges, images from key 1 on, a record for each identity."""
    contents: dict[int, bytes] = {0: b""}
    ranges = []
    for label, images in enumerate(people):
        first = len(contents)
        for image in images:
            contents[len(contents)] = content(float(label), image, len(contents))
        ranges.append((float(first), float(len(contents))))
    end = len(contents)
    contents[0] = content([float(end), float(end + len(people))], b"")
    for label, pair in enumerate(ranges):
        contents[end + label] = content(pair, b"", end + label)
    write_records(path, contents)
    path.with_name("property").write_text(f"{len(people)},112,112\n")
