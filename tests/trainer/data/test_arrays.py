"""Vectors and spectrograms as small .npy files."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.peak import at_most
from trainer.data.arrays import as_array, as_payload
from trainer.errors import UserError


def saved(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


@pytest.mark.parametrize("shape", [(5,), (1,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("dtype", ["<f4", "<f2", "|u1"])
def test_a_payload_is_what_numpy_itself_saves(shape: tuple[int, ...], dtype: str):
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    assert as_payload(values) == saved(values)
    back = as_array(as_payload(values), shape)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, values)


@pytest.mark.parametrize(
    "values", [np.arange(6.0), np.arange(6, dtype=">f4"), np.arange(12, dtype="f4")[::2], np.arange(6)]
)
def test_other_numbers_and_orders_are_stored_as_float32(values: np.ndarray):
    payload = as_payload(values)
    assert payload == saved(values.astype("<f4"))
    np.testing.assert_array_equal(as_array(payload, (6,)), values)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float):
    values = np.array([1, value], dtype=np.float32)
    with pytest.raises(UserError, match="not finite; leave them out"):
        as_payload(values)
    with pytest.raises(UserError, match="sample 'x' holds values that are not finite"):
        as_array(saved(values), (2,), "x")


def test_values_too_large_for_float32_are_refused():
    with pytest.raises(UserError, match="not finite"):
        as_payload(np.array([1e300]))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no array",
        saved(np.zeros(3, np.float32))[:-1],
        saved(np.zeros(3, np.float32)) + b"x",
        saved(np.zeros(4, np.float32)),
        saved(np.zeros((3, 1), np.float32)),
        saved(np.zeros(3, np.float64)),
        saved(np.array([1, "a", None], dtype=object)),
    ],
)
def test_anything_else_is_refused(data: bytes):
    with pytest.raises(UserError, match=rf"sample 'x' \({len(data)} bytes\) is not a whole \.npy file of shape \(3,\)"):
        as_array(data, (3,), "x")


def test_an_object_in_a_file_is_never_opened():
    class Opened:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return pytest.fail, ("a pickle was opened",)

    with pytest.raises(UserError, match="not a whole"):
        as_array(saved(np.array([Opened()], dtype=object)), (1,))


@given(st.binary(max_size=64), st.integers(0, 140))
def test_damage_raises_nothing_else(change: bytes, place: int):
    data = bytearray(as_payload(np.arange(3, dtype=np.float32)))
    data[place : place + len(change)] = change
    with contextlib.suppress(UserError), at_most(2**20):
        assert as_array(bytes(data), (3,)).shape == (3,)
