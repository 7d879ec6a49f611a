"""Bytes to pixels, the one way: import, training and the service all read images through this file.

Runs without torch. An image comes from a stranger, so limits are checked before anything is decoded: the size of the
file, then (from its headers alone) the format, the number of pixels and, of a JPEG, the number of scans. They bound
what an honest image costs. What a crafted one costs can only be bounded around the process that decodes it, as
`serving.images.decoding` does.
"""

import math
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose
from pydantic import Field

from trainer.errors import UserError
from trainer.strict import Strict

MAX_BYTES = 10 * 2**20
MAX_PIXELS = 40_000_000  # decoded as RGB: 160 MB
# libjpeg's own progressive script has 10 scans for colour and 18 for CMYK; the searching encoders stay near that.
MAX_SCANS = 100
MAX_SCANNED = 1_000_000_000  # scans x pixels: each scan of a progressive JPEG passes over the whole picture
# Pillow's names. Formats that run programs (EPS), carry documents (PDF) or load lazily from elsewhere stay out. JPEG
# covers the multi-picture files of phones, PPM covers PBM, PGM, PPM and PNM.
FORMATS = ("PNG", "JPEG", "PPM", "BMP", "GIF", "TIFF", "WEBP", "JPEG2000", "PCX", "SGI")
# What Pillow's readers raise on damaged input. `Warning` is among them for callers who turn warnings into errors.
_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, AttributeError, OverflowError,
    RuntimeError, MemoryError, struct.error, zlib.error, Warning,
)  # fmt: skip
_GAP = 2  # drafts have this multiple of the wanted sides or more, so that the last reduction is the bicubic filter's
_STRIP = 2**20  # pixels that are converted at a time, where a whole picture in between would cost too much memory
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # neither an escaped FF, nor padding, nor a restart
_JPEG_START, _JPEG_END, _JPEG_SCAN = 0xD8, 0xD9, 0xDA
_UPRIGHT = {  # by EXIF orientation
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip


class Preprocessing(Strict):
    """How an image becomes the pixels that the model reads. Scaling of the values happens inside the model."""

    mode: Literal["L", "RGB"] = "RGB"
    height: int = Field(112, ge=8, le=1024)
    width: int = Field(112, ge=8, le=1024)

    @property
    def channels(self) -> int:
        return 1 if self.mode == "L" else 3

    @property
    def shape_CHW(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.channels, self.height, self.width

    @property
    def dtype(self) -> np.dtype[np.uint8]:
        return np.dtype(np.uint8)

    @property
    def reads(self) -> str:
        """What it is made for, in words."""
        return "images"

    def load(self, data: bytes, name: str | None = None, *, draft: bool = False) -> NDArray[np.uint8]:
        """As `load_image`."""
        return load_image(data, self, name, draft=draft)


class TooManyPixels(UserError):
    """An image with more pixels than may be decoded: `pixels`, where they could be counted, and in words `found`."""

    def __init__(self, label: str, found: str, pixels: float, allowed: int) -> None:
        super().__init__(f"{label} has {found}; at most {allowed:,} pixels are read: store it smaller")
        self.label, self.found, self.pixels = label, found, pixels


class OutOfMemory(UserError):
    """An image that took more memory to decode than there is."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image, upright, without transparency, in mode "L" or "RGB".

    `plain` says that the file held just that (1-bit counts as "L"), so that its bytes can be kept as they are.
    """

    image: Image.Image
    format: str
    plain: bool


def load_image(
    data: bytes, preprocessing: Preprocessing, name: str | None = None, *, draft: bool = False
) -> NDArray[np.uint8]:
    """Read an image file as the model sees it: uint8 [channels, height, width].

    The image is stretched to height and width (its aspect ratio is not kept) with an antialiasing bicubic filter.
    Transparent pixels are laid on white. `name` is what messages call the image.

    Args:
        draft: decode a JPEG of four times the wanted sides or more at a half, a quarter or an eighth of its own, never
            below twice the wanted ones. It takes half the time; pixels differ by 1 of 255 on average, 7 at most
            (pictures with the spectrum of photographs, 448 to 2000 pixels to 112). The Embedder never does it.

    Raises:
        UserError: more than 10 MiB or 40 megapixels, a format that is not allowed, or damaged content.
    """
    enough = (_GAP * preprocessing.width, _GAP * preprocessing.height) if draft else None
    return as_pixels(decode(data, name, enough=enough).image, preprocessing)


def as_pixels(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """A decoded image as the model sees it; see `load_image`."""
    if image.mode != preprocessing.mode:
        image = image.convert(preprocessing.mode)
    size = (preprocessing.width, preprocessing.height)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.uint8)
    if pixels.ndim == 2:
        return pixels[np.newaxis].copy()
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def decode(
    data: bytes, name: str | None = None, max_pixels: int = MAX_PIXELS, enough: tuple[int, int] | None = None
) -> Decoded:
    """Decode a whole image at its own size. Of several frames the first is taken.

    Args:
        data, name: as for `load_image`.
        max_pixels: width x height that is allowed.
        enough: width and height down to which a JPEG may be decoded smaller.

    Raises:
        UserError: as `load_image`; `TooManyPixels` and `OutOfMemory` are two of its kinds.
    """
    label = "the image" if name is None else f"image '{name}'"
    if len(data) > MAX_BYTES:
        raise UserError(f"{label} has {len(data)} bytes; at most {MAX_BYTES} are read: store it smaller")
    if not data:
        raise UserError(f"{label} is empty (0 bytes); give an image file")
    image = _open(data, label, max_pixels)
    with _guard(label, max_pixels):
        if enough is not None and image.format in ("JPEG", "MPO"):
            # libjpeg leaves out the fine coefficients; an image that lies on its side is measured as it lies
            image.draft(None, enough if _orientation(image) < 5 else enough[::-1])
        image.load()
        format, turn = image.format or "", _UPRIGHT.get(_orientation(image))
        plain = image.mode in ("1", "L", "RGB") and not image.has_transparency_data and turn is None
        image = _flatten(image)  # the name is used again to free the image as it was
        return Decoded(image if turn is None else image.transpose(turn), format, plain)


def _open(data: bytes, label: str, max_pixels: int) -> Image.Image:
    """Read the headers and check what they promise."""
    with _guard(label, max_pixels):
        image: Image.Image = Image.open(BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > max_pixels:
        raise TooManyPixels(label, f"{width} x {height} pixels", width * height, max_pixels)
    if width < 1 or height < 1:
        raise UserError(f"{label} has {width} x {height} pixels; give an image that has some")
    if image.format in ("JPEG", "MPO"):
        scans = _jpeg_scans(data)
        allowed = min(MAX_SCANS, MAX_SCANNED // (width * height))
        if scans > allowed:
            raise UserError(
                f"{label} has {scans} scans of {width} x {height} pixels; a JPEG of this size may have {allowed}: "
                "store it without progressive coding"
            )
    return image


def _jpeg_scans(data: bytes) -> int:
    """Scans of the first picture in a JPEG file; with few of them, perhaps some more than there are.

    Each starts with the marker FF DA. In the coded data of a scan FF is always escaped, so the pair stands there for
    nothing else, but it may stand in segments (an EXIF thumbnail) and after the end (a second picture, a film).
    """
    scans = data.count(b"\xff\xda")
    if scans <= MAX_SCANS // 10:  # the usual case: no need to look where they stand
        return scans
    scans, position = 0, 0
    while found := _JPEG_MARKER.search(data, position):
        marker, position = data[found.end() - 1], found.end()
        if marker == _JPEG_END:
            break
        scans += marker == _JPEG_SCAN
        if marker >= 0xC0 and marker != _JPEG_START:  # a segment: a length, itself included, and so many bytes
            position += max(2, int.from_bytes(data[position : position + 2]))
    return scans


def read_file(path: Path, name: str) -> bytes:
    """The bytes of an image file; at most one more than `decode` allows.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)  # one byte more than allowed: enough to see that it is too long
    except OSError as error:
        raise UserError(f"image '{name}' cannot be read: {error.strerror}; give a readable image file") from error


@contextmanager
def _guard(label: str, max_pixels: int) -> Iterator[None]:
    """Say in one sentence what Pillow finds wrong with the image."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixels(label, "far too many pixels", math.inf, max_pixels) from error
    except UnidentifiedImageError as error:
        raise UserError(f"{label} is not an image in an allowed format; allowed: {', '.join(FORMATS)}") from error
    except UserError as error:
        raise UserError(f"{label} {error}") from error
    except MemoryError as error:
        raise OutOfMemory(f"{label} needs more memory than there is to decode it; store it smaller") from error
    except _DAMAGED as error:
        raise UserError(f"{label} is damaged ({type(error).__name__}: {error}); replace the file") from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 (upright) where there is none or where the EXIF block alone is broken."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DAMAGED:
        return 1


def _flatten(image: Image.Image) -> Image.Image:
    """Any mode of Pillow's to "L" or "RGB"; grey stays grey."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_wide(image)
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.has_transparency_data:
        return _on_white(image, mode)
    return image if image.mode == mode else image.convert(mode)


def _on_white(image: Image.Image, mode: str) -> Image.Image:
    flat = Image.new(mode, image.size)
    for box in _strips(image):
        layer = image.crop(box).convert("RGBA")
        paper = Image.new("RGBA", layer.size, "white")
        flat.paste(Image.alpha_composite(paper, layer).convert(mode), box)
    return flat


def _from_wide(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits: 0..65535 to 0..255. Pillow reads 16-bit PGM and PNG as mode "I;16" or "I"."""
    if image.mode == "F":
        raise UserError("has floating-point pixels, whose range is not known; convert it to 8 or 16 bits")
    flat = np.empty((image.height, image.width), np.uint8)
    extremes: list[int] = []
    for box in _strips(image):
        values = np.asarray(image.crop(box)).astype(np.int64)
        extremes += values.min(), values.max()
        flat[box[1] : box[3]] = (values + 128) // 257
    if min(extremes) < 0 or max(extremes) > 65535:
        raise UserError(
            f"has pixels from {min(extremes)} to {max(extremes)}; 0 to 65535 is allowed: convert it to 8 or 16 bits"
        )
    return Image.fromarray(flat)


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes that cover the image from top to bottom, with about `_STRIP` pixels each."""
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(top + rows, image.height)
