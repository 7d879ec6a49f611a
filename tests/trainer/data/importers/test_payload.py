from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from trainer.data.arrays import as_payload
from trainer.data.image import MAX_BYTES, decode
from trainer.data.importers import ImportOptions
from trainer.data.importers.payload import Stored, store_of
from trainer.errors import UserError

GREY = Image.fromarray(np.arange(240, dtype=np.uint8).reshape(12, 20))
COLOUR = Image.merge("RGB", [GREY, GREY.transpose(Image.Transpose.ROTATE_180), GREY])


def file(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def store(data: bytes, **options: object) -> Stored:
    return store_of("image", None, ImportOptions(**options))(data, "x")


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("data", "suffix", "grey"),
    [
        (file(GREY, "PNG"), "png", True),
        (file(COLOUR, "PNG"), "png", False),
        (file(GREY.convert("1"), "PNG"), "png", True),
        (file(GREY, "JPEG"), "jpg", True),
        (file(COLOUR, "JPEG"), "jpg", False),
        (file(COLOUR, "JPEG", progressive=True), "jpg", False),
        (file(COLOUR.convert("CMYK"), "JPEG"), "jpg", False),
    ],
)
def test_bytes_stay_as_they_are(data: bytes, suffix: str, grey: bool, check: bool):
    assert store(data, check=check) == (data, suffix, grey)


@pytest.mark.parametrize("progressive", [False, True])
def test_check_finds_the_damage_that_decoding_all_pixels_finds(progressive: bool):
    """The check puts a JPEG together at an eighth of its size."""
    random, found = np.random.default_rng(0), []
    for number in range(300):
        data = bytearray(file(COLOUR.resize((61, 43)), "JPEG", quality=90, progressive=progressive))
        if number % 2:
            del data[random.integers(len(data)) :]
        else:
            data[random.integers(len(data))] ^= 1 << random.integers(8)
        outcomes = []
        for work in (store, lambda data: decode(data, "x")):
            try:
                work(bytes(data))
                outcomes.append("")
            except UserError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
        found.append(bool(outcomes[0]))
    assert 100 < sum(found) < 250


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    "data",
    [
        file(GREY, "BMP"),
        file(GREY, "TIFF"),
        file(COLOUR, "GIF"),
        file(COLOUR.convert("P"), "PNG"),
        file(Image.new("RGBA", (9, 9), (1, 2, 3, 90)), "PNG"),
        file(GREY, "PNG", transparency=3),
        file(Image.fromarray(np.arange(99, dtype=np.uint16).reshape(9, 11) * 600), "PNG"),
    ],
)
def test_other_images_become_plain_png_of_the_same_pixels(data: bytes, check: bool):
    stored = store(data, check=check)
    assert stored.suffix == "png"
    assert stored.data != data
    again = decode(stored.data)
    assert again.plain
    assert stored.grey == (again.image.mode == "L")
    np.testing.assert_array_equal(np.asarray(again.image), np.asarray(decode(data).image))


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(("format", "suffix"), [("PNG", "png"), ("JPEG", "jpg"), ("BMP", "png")])
def test_larger_images_are_stored_smaller_if_asked(format: str, suffix: str, check: bool):
    stored = store(file(COLOUR, format), check=check, max_side=10)
    assert (stored.suffix, stored.grey) == (suffix, False)
    assert decode(stored.data).image.size == (10, 6)
    small = file(COLOUR.resize((10, 6)), "JPEG")
    assert store(small, check=check, max_side=10).data == small


def test_damage_is_found_unless_checking_is_off():
    cut = file(COLOUR, "JPEG")[:-200]
    with pytest.raises(UserError, match="damaged"):
        store(cut)
    assert store(cut, check=False).data == cut


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("data", [b"", b"a cat, from memory", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"])
def test_what_is_no_image_is_never_stored(data: bytes, check: bool):
    with pytest.raises(UserError):
        store(data, check=check)


@pytest.mark.parametrize("check", [True, False])
def test_too_many_bytes_are_never_stored(check: bool):
    with pytest.raises(UserError, match=f"at most {MAX_BYTES} are read"):
        store(file(GREY, "JPEG") + bytes(MAX_BYTES), check=check)


def test_vectors_have_the_shape_of_their_set():
    vector = as_payload(np.arange(4, dtype=np.float32))
    assert store_of("vector", (4,), ImportOptions())(vector, "x") == (vector, "npy", True)
    with pytest.raises(UserError, match="'x'"):
        store_of("vector", (5,), ImportOptions())(vector, "x")
