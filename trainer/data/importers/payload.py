"""What a shard stores of a payload: the bytes as they are wherever possible, stored anew where that must be."""

import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from trainer.data.arrays import as_array
from trainer.data.image import MAX_BYTES, Decoded, decode
from trainer.data.importers import Content, ImportOptions
from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.detection.detector import Detector

_QUALITY = 95  # of a JPEG that was made smaller
_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PNG_PLAIN = {0: 1, 2: 3}  # colour type -> channels, of the types without palette and transparency
# Starts of frames: baseline, extended, progressive. Others (lossless, arithmetic) are left to the decoder's judgement.
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)


class Stored(NamedTuple):
    """What goes into the shard. `suffix` says the format; `grey` that an image has no colour."""

    data: bytes
    suffix: str
    grey: bool


Storing = Callable[[bytes, str], Stored]
"""(payload, name for messages) -> what is stored. Raises UserError for a payload that cannot be used."""


def store_of(content: Content, shape: tuple[int, ...] | None, options: ImportOptions) -> Storing:
    """How the payloads of a source are stored."""

    def array(data: bytes, name: str) -> Stored:
        if options.check:
            as_array(data, shape or (), name)
        return Stored(data, "npy", True)

    def image(data: bytes, name: str) -> Stored:
        return (None if options.check else _unseen(data, options.max_side)) or _image(data, name, options.max_side)

    if options.detector is not None:
        return _Faces(options.detector).store
    return image if content == "image" else array


class _Faces:
    """Stores the largest face of each image, aligned. The detector is opened in the process that uses it."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    @cached_property
    def _detector(self) -> "Detector":
        from trainer.detection.detector import Detector

        return Detector.open(self._folder)

    def store(self, data: bytes, name: str) -> Stored:
        from trainer.detection.align import align

        decoded = decode(data, name)
        faces = self._detector.find(decoded.image)
        if not faces:
            raise UserError(f"image '{name}' shows no face that the detector finds")
        crop = align(decoded.image, faces[0].landmarks_52, self._detector.manifest.template)
        return _encode(replace(decoded, image=crop), decoded.format in ("JPEG", "MPO"), crop.mode == "L")


def _image(data: bytes, name: str, max_side: int | None) -> Stored:
    """Decodes the image. JPEG keeps its bytes, and PNG where it is plain; any other format becomes PNG.

    The pixels of a JPEG are only wanted where it is made smaller. Otherwise all its coefficients are decoded, which is
    where damage shows, but put together at an eighth of its size.
    """
    decoded = decode(data, name, enough=(1, 1) if max_side is None else None)
    grey = decoded.image.mode == "L"
    jpeg = decoded.format in ("JPEG", "MPO")
    if max_side is not None and max(decoded.image.size) > max_side:
        decoded.image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    elif jpeg or (decoded.plain and decoded.format == "PNG"):
        return Stored(data, "jpg" if jpeg else "png", grey)
    return _encode(decoded, jpeg, grey)


def _encode(decoded: Decoded, jpeg: bool, grey: bool) -> Stored:
    buffer = BytesIO()
    if jpeg:
        decoded.image.save(buffer, format="JPEG", quality=_QUALITY, subsampling=0)
    else:
        decoded.image.save(buffer, format="PNG")
    return Stored(buffer.getvalue(), "jpg" if jpeg else "png", grey)


def _unseen(data: bytes, max_side: int | None) -> Stored | None:
    """A JPEG or plain PNG by its headers alone; None for what has to be decoded after all."""
    if len(data) > MAX_BYTES:
        raise UserError(f"it has {len(data)} bytes; at most {MAX_BYTES} are read: store it smaller")
    suffix, frame = ("png", _png_frame(data)) if data.startswith(_PNG) else ("jpg", _jpeg_frame(data))
    if frame is None:
        return None
    width, height, channels = frame
    if max_side is not None and max(width, height) > max_side:
        return None
    return Stored(data, suffix, channels == 1)


def _png_frame(data: bytes) -> tuple[int, int, int] | None:
    """Width, height and channels of a PNG that is stored as it is."""
    if len(data) < 33:
        return None
    width, height, bits, colour = struct.unpack_from(">IIBB", data, len(_PNG))
    if bits > 8 or colour not in _PNG_PLAIN or b"tRNS" in data[: data.find(b"IDAT")]:
        return None
    return width, height, _PNG_PLAIN[colour]


def _jpeg_frame(data: bytes) -> tuple[int, int, int] | None:
    """Width, height and channels of a JPEG, from its frame header."""
    if not data.startswith(b"\xff\xd8"):
        return None
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker in _JPEG_FRAMES:
            height, width, channels = struct.unpack_from(">HHB", data, at + 5)
            return (width, height, channels) if width and height and channels in (1, 3) else None
        if length < 2 or marker in (0xDA, 0xD9, 0xFF):
            return None
        at += 2 + length
    return None
