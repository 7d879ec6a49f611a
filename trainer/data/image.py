"""Bytes to pixels, the one way: import, training and the service all read images through this file.

Runs without torch. An image comes from a stranger, so limits are checked before anything is decoded: the size of the
file, then (from its header alone) the format and the number of pixels.
"""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from pydantic import Field

from trainer.errors import UserError
from trainer.strict import Strict

MAX_BYTES = 10 * 2**20
MAX_PIXELS = 40_000_000  # decoded as RGB: 120 MB
# Pillow's names. Formats that run programs (EPS), carry documents (PDF) or load lazily from elsewhere stay out. JPEG
# covers the multi-picture files of phones, PPM covers PBM, PGM, PPM and PNM.
FORMATS = ("PNG", "JPEG", "PPM", "BMP", "GIF", "TIFF", "WEBP", "JPEG2000", "PCX", "SGI")
# What Pillow's readers raise on damaged input. `Warning` is among them for callers who turn warnings into errors.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Warning,
)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Preprocessing(Strict):
    """How an image becomes the pixels that the model reads. Scaling of the values happens inside the model."""

    mode: Literal["L", "RGB"] = "RGB"
    height: int = Field(112, ge=8, le=1024)
    width: int = Field(112, ge=8, le=1024)

    @property
    def channels(self) -> int:
        return 1 if self.mode == "L" else 3


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image, upright, without transparency, in mode "L" or "RGB".

    `plain` says that the file held just that (1-bit counts as "L"), so that its bytes can be kept as they are.
    """

    image: Image.Image
    format: str
    plain: bool


def load_image(source: bytes | Path, preprocessing: Preprocessing, name: str | None = None) -> NDArray[np.uint8]:
    """Read an image as the model sees it: uint8 [channels, height, width].

    The image is stretched to height and width (its aspect ratio is not kept) with an antialiasing bicubic filter.
    Transparent pixels are laid on white. `name` is what messages call the image; by default its path.

    Raises:
        UserError: more than 10 MiB or 40 megapixels, a format that is not allowed, or damaged content.
    """
    image = decode(source, name).image
    if image.mode != preprocessing.mode:
        image = image.convert(preprocessing.mode)
    size = (preprocessing.width, preprocessing.height)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.uint8)
    if pixels.ndim == 2:
        return pixels[np.newaxis].copy()
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def decode(source: bytes | Path, name: str | None = None) -> Decoded:
    """Decode a whole image at its own size.

    Raises:
        UserError: as `load_image`.
    """
    label = _label(source, name)
    data = source if isinstance(source, bytes) else read_file(source, name)
    if len(data) > MAX_BYTES:
        raise UserError(f"{label} has {len(data)} bytes; at most {MAX_BYTES} are read: store it smaller")
    if not data:
        raise UserError(f"{label} is empty (0 bytes); give an image file")
    image = _guard(label, lambda: Image.open(BytesIO(data), formats=FORMATS))
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_many_pixels(label, f"{width} x {height} pixels")
    if width < 1 or height < 1:
        raise UserError(f"{label} has {width} x {height} pixels; give an image that has some")
    _guard(label, image.load)
    turn = _UPRIGHT.get(_orientation(image))
    plain = image.mode in ("1", "L", "RGB") and not image.has_transparency_data and turn is None
    flat = _guard(label, lambda: _flatten(image))
    return Decoded(flat if turn is None else flat.transpose(turn), image.format or "", plain)


def _label(source: bytes | Path, name: str | None) -> str:
    if name is not None:
        return f"image '{name}'"
    return "the image" if isinstance(source, bytes) else f"image '{source}'"


def read_file(path: Path, name: str | None = None) -> bytes:
    """The bytes of an image file; at most one more than `decode` allows.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)  # one byte more than allowed: enough to see that it is too long
    except OSError as error:
        raise UserError(f"{_label(path, name)} cannot be read: {error.strerror}; give a readable image file") from error


def _guard(label: str, step: Callable[[], Any]) -> Any:
    """Run one step of Pillow's and say in one sentence what is wrong with the image."""
    try:
        return step()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(label, "far too many pixels") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{label} is not an image in an allowed format; allowed: {', '.join(FORMATS)}") from error
    except UserError as error:
        raise UserError(f"{label} {error}") from error
    except _DAMAGED as error:
        raise UserError(f"{label} is damaged ({type(error).__name__}: {error}); replace the file") from error


def _too_many_pixels(label: str, found: str) -> UserError:
    return UserError(f"{label} has {found}; at most {MAX_PIXELS:,} pixels are read: store it smaller")


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
    if image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA", "La")
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(paper, layer).convert("L" if grey else "RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")


def _from_wide(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits: 0..65535 to 0..255. Pillow reads 16-bit PGM and PNG as mode "I;16" or "I"."""
    if image.mode == "F":
        raise UserError("has floating-point pixels, whose range is not known; convert it to 8 or 16 bits")
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UserError(
            f"has pixels from {values.min()} to {values.max()}; 0 to 65535 is allowed: convert it to 8 or 16 bits"
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
