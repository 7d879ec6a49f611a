"""Samples that are no images: vectors and spectrograms, each a small .npy file. Runs without torch.

A shard may come from a stranger. So a header is compared with the only one that its shape allows, never parsed, and no
pickle is opened.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from tokenize import TokenError
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt, model_validator

from trainer.data.image import Preprocessing
from trainer.errors import UserError
from trainer.strict import Strict

STORED = ("float32", "float16", "uint8")  # what is stored as it is; other numbers become float32
# What numpy raises over a header, which it parses as Python.
NOT_NPY = (ValueError, SyntaxError, TokenError, OverflowError, RecursionError, MemoryError, Warning)
MAX_VALUES = 2**22  # of one sample: as float32, 16 MB
Pixels = NDArray[np.uint8 | np.float32]  # of images, or the values that stand in their place


class ArrayForm(Strict):
    """How a vector or spectrogram becomes what the model reads: its values as they are stored, as float32.

    They are laid out like an image, a vector as [dimension, 1, 1] and a spectrogram as [1, frequency, time], and the
    methods are those of `Preprocessing`: whoever holds one of the two need not ask which.
    """

    content: Literal["vector", "spectrogram"]
    shape: tuple[PositiveInt, ...]

    @model_validator(mode="after")
    def _fits(self) -> "ArrayForm":
        if content_of_shape(self.shape) != self.content:
            raise ValueError(f"shape is {list(self.shape)}, but content is {self.content}")
        return self

    @property
    def shape_CHW(self) -> tuple[int, int, int]:
        """Of one sample, in place of an image's channels, height and width."""
        return (self.shape[0], 1, 1) if self.content == "vector" else (1, self.shape[0], self.shape[1])

    @property
    def dtype(self) -> np.dtype[np.float32]:
        return np.dtype(np.float32)

    @property
    def reads(self) -> str:
        """What it is made for, in words."""
        return described(self.content, self.shape)

    def load(self, data: bytes, name: str | None = None, *, draft: bool = False) -> NDArray[np.float32]:
        """Read a sample as the model sees it, as `as_array`, laid out as `shape_CHW`; `draft` is for images."""
        return as_array(data, self.shape, name).reshape(self.shape_CHW)


Form = Preprocessing | ArrayForm  # of a model's input


def as_payload(values: NDArray[np.generic]) -> bytes:
    """A sample as a .npy file: little-endian, in C order, of a type in `STORED`.

    Raises:
        UserError: values that are no finite numbers.
    """
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is told below
        stored = values if values.dtype.name in STORED else values.astype(np.float32)
    if not np.isfinite(stored).all():
        raise UserError("it holds values that are not finite; leave them out or replace them")
    little = np.ascontiguousarray(stored, stored.dtype.newbyteorder("<"))
    return _header(little.shape, little.dtype.name) + little.tobytes()


def as_array(data: bytes, shape: Sequence[int], name: str | None = None) -> NDArray[np.float32]:
    """Read a sample as the model sees it: float32, of the shape that the manifest gives.

    Args:
        data: a .npy file, as `as_payload` and numpy 1.14 or later write it.
        name: what messages call the sample.

    Raises:
        UserError: the file is damaged, has another shape or type, or values that are not finite.
    """
    label = "the sample" if name is None else f"sample '{name}'"
    expected = tuple(shape)
    for dtype in STORED:
        header = _header(expected, dtype)
        size = len(header) + math.prod(expected) * np.dtype(dtype).itemsize
        if data.startswith(header) and len(data) == size:
            values = np.frombuffer(data, np.dtype(dtype).newbyteorder("<"), offset=len(header))
            if not np.isfinite(values).all():
                raise UserError(f"{label} holds values that are not finite; import the data again")
            return values.reshape(expected).astype(np.float32)
    raise UserError(
        f"{label} ({len(data)} bytes) is not a whole .npy file of shape {expected} and type "
        f"{', '.join(STORED[:-1])} or {STORED[-1]}; import the data again"
    )


def content_of(data: bytes, name: str) -> tuple[Literal["vector", "spectrogram"], tuple[int, ...]]:
    """What the samples are of a set whose first one this is, and their shape.

    Raises:
        UserError: it is not a .npy file with one or two axes.
    """
    file = BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("its version is not 1.0")
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
    except NOT_NPY as error:
        raise UserError(f"'{name}' is not a .npy file of numbers: {error}; save it anew") from error
    return content_of_shape(shape), shape


def content_of_shape(shape: tuple[int, ...]) -> Literal["vector", "spectrogram"]:
    """What a sample of this shape is.

    Raises:
        UserError: it has not one or two axes, or no values, or more than `MAX_VALUES`.
    """
    if len(shape) in (1, 2) and 0 < math.prod(shape) <= MAX_VALUES:
        return "vector" if len(shape) == 1 else "spectrogram"
    raise UserError(
        f"a sample of shape {shape} is neither a vector (dimension) nor a spectrogram (frequency, time) of at most "
        f"{MAX_VALUES} values; store it in such a shape"
    )


def described(content: str, shape: Sequence[int]) -> str:
    """Samples in words, those of a data set and those that a `Form` reads: equal words, equal samples."""
    return f"{content}s" + (f" of shape {list(shape)}" if shape else "")


@lru_cache(32)
def _header(shape: tuple[int, ...], dtype: str) -> bytes:
    """All that stands before the values in a .npy file."""
    buffer = BytesIO()
    descr = np.dtype(dtype).newbyteorder("<").str
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()
