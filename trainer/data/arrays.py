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

from trainer.errors import UserError

STORED = ("float32", "float16", "uint8")  # what is stored as it is; other numbers become float32
# What numpy raises over a header, which it parses as Python.
NOT_NPY = (ValueError, SyntaxError, TokenError, OverflowError, RecursionError, MemoryError, Warning)
MAX_VALUES = 2**22  # of one sample: as float32, 16 MB


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


@lru_cache(32)
def _header(shape: tuple[int, ...], dtype: str) -> bytes:
    """All that stands before the values in a .npy file."""
    buffer = BytesIO()
    descr = np.dtype(dtype).newbyteorder("<").str
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()
