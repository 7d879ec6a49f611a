import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from tests.serving.hostile.images import scans, segment
from trainer.data import image as module
from trainer.data.image import (
    FORMATS,
    MAX_BYTES,
    MAX_SCANS,
    Preprocessing,
    TooManyPixels,
    decode,
    load_image,
    read_file,
)
from trainer.errors import UserError

GREY = Preprocessing(mode="L", height=8, width=8)
COLOUR = Preprocessing(mode="RGB", height=8, width=8)
RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises pixels it does not have."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def test_grey_image_comes_through_unchanged():
    pixels = load_image(encode(Image.fromarray(RAMP)), GREY)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, RAMP[None])


def test_colour_is_channels_first():
    colours = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=-1)
    pixels = load_image(encode(Image.fromarray(colours)), COLOUR)
    np.testing.assert_array_equal(pixels, colours.transpose(2, 0, 1))
    assert pixels.flags.c_contiguous


def test_grey_becomes_three_equal_channels_and_colour_becomes_luma():
    np.testing.assert_array_equal(load_image(encode(Image.fromarray(RAMP)), COLOUR), np.stack([RAMP] * 3))
    red = load_image(encode(Image.new("RGB", (8, 8), (255, 0, 0))), GREY)
    np.testing.assert_array_equal(red, np.full((1, 8, 8), 76))  # 0.299 x 255, ITU-R 601


@pytest.mark.parametrize("format", ["PNG", "PPM", "BMP", "TIFF", "GIF", "WEBP", "PCX", "SGI", "JPEG2000"])
def test_lossless_formats_give_the_pixels(format: str):
    options = {"lossless": True} if format == "WEBP" else {}
    mode = "RGB" if format == "WEBP" else "L"
    data = encode(Image.fromarray(RAMP).convert(mode), format, **options)
    np.testing.assert_array_equal(load_image(data, GREY), RAMP[None])
    assert format in FORMATS


def test_jpeg_is_near():
    pixels = load_image(encode(Image.fromarray(RAMP), "JPEG", quality=95), GREY)
    assert np.abs(pixels[0].astype(int) - RAMP).max() < 12


def test_pgm_of_16_bits_is_scaled_to_8():
    values = (RAMP.astype(np.uint16) * 257).astype(">u2")
    data = b"P5 8 8 65535\n" + values.tobytes()
    np.testing.assert_array_equal(load_image(data, GREY), RAMP[None])


def test_png_of_16_bits_is_scaled_to_8():
    data = encode(Image.fromarray(RAMP.astype(np.uint16) * 257))
    np.testing.assert_array_equal(load_image(data, GREY), RAMP[None])


def test_plain_text_pgm_is_read():
    data = b"P2 8 8 255\n" + " ".join(map(str, RAMP.ravel().tolist())).encode()
    np.testing.assert_array_equal(load_image(data, GREY), RAMP[None])


def test_one_bit_is_black_and_white():
    bits = RAMP > 100
    np.testing.assert_array_equal(load_image(encode(Image.fromarray(bits)), GREY)[0], bits * 255)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparent_pixels_are_laid_on_white(mode: str):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    expected = np.full((8, 8), 255)
    expected[:, :4] = 0
    if mode == "P":
        palette = Image.fromarray((expected // 255).astype(np.uint8), mode="L").convert("P")
        palette.putpalette([0, 0, 0, 0, 0, 0])
        data = encode(palette, transparency=1)
    else:
        data = encode(image.convert(mode))
    np.testing.assert_array_equal(load_image(data, GREY)[0], expected)


def test_grey_with_transparency_stays_grey_and_is_not_plain():
    decoded = decode(encode(Image.new("LA", (4, 4), (7, 255))))
    assert (decoded.image.mode, decoded.plain) == ("L", False)


def test_cmyk_jpeg_is_read_as_colour():
    pixels = load_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95), COLOUR)
    assert pixels[0].min() > 200
    assert pixels[1:].max() < 60


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation: int):
    upright = Image.fromarray(RAMP[:, :6])
    stored = {
        1: lambda i: i,
        2: lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda i: i.rotate(180),
        4: lambda i: i.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda i: i.transpose(Image.Transpose.TRANSPOSE),
        6: lambda i: i.rotate(90, expand=True),
        7: lambda i: i.transpose(Image.Transpose.TRANSVERSE),
        8: lambda i: i.rotate(270, expand=True),
    }[orientation](upright)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    decoded = decode(encode(stored, exif=exif))
    np.testing.assert_array_equal(np.asarray(decoded.image), RAMP[:, :6])
    assert decoded.plain == (orientation == 1)


def test_broken_exif_does_not_cost_the_image():
    good = encode(Image.fromarray(RAMP), "JPEG", quality=95)
    data = good[:2] + b"\xff\xe1" + struct.pack(">H", 18) + b"Exif\0\0MM\0\x2a\xff\xff\xff\xff" + b"\0\0" + good[2:]
    with pytest.warns(UserWarning, match="Corrupt EXIF"):  # Pillow's own word on it
        assert load_image(data, GREY).shape == (1, 8, 8)


def test_resize_averages_instead_of_picking():
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    pixels = load_image(encode(Image.fromarray(stripes)), GREY)
    assert np.abs(pixels[0, :, 1:-1].astype(int) - 127).max() <= 2


def test_height_and_width_are_not_mixed_up():
    assert load_image(encode(Image.fromarray(RAMP)), Preprocessing(mode="RGB", height=16, width=9)).shape == (3, 16, 9)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"not an image", "not an image in an allowed format; allowed: PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not an image in an allowed format"),
        (encode(Image.fromarray(RAMP))[:50], "damaged"),
        (encode(Image.new("RGB", (90, 90)), "JPEG")[:400], "damaged"),
        (b"P5 8 8 255\n123", "damaged"),
        (png_header(7000, 7000), "7000 x 7000 pixels; at most 40,000,000"),
        (png_header(10_000, 10_000), "at most 40,000,000 pixels"),
        (png_header(60_000, 60_000), "at most 40,000,000 pixels"),
        (b"\0" * (MAX_BYTES + 1), f"{MAX_BYTES + 1} bytes; at most {MAX_BYTES}"),
        (encode(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "floating-point"),
        (encode(Image.fromarray(RAMP.astype(np.int32) * 1000), "TIFF"), "0 to 65535"),
    ],
    ids=[
        *("empty", "text", "eps", "cut png", "cut jpeg", "cut pgm"),
        *("49 MP", "100 MP", "3600 MP", "10 MiB", "float", "wide"),
    ],
)
def test_unusable_image_is_refused_by_name(data: bytes, words: str):
    with pytest.raises(UserError, match=words) as caught:
        load_image(data, GREY, "face.png")
    assert str(caught.value).startswith("image 'face.png' ")


def test_missing_and_oversized_files_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_file(tmp_path / "none.png", "none.png")
    big = tmp_path / "big.png"
    with big.open("wb") as file:
        file.truncate(2**40)  # sparse; reading it whole would not end well
    with pytest.raises(UserError, match="at most"):
        load_image(read_file(big, "big.png"), GREY)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "PPM", "BMP", "TIFF", "GIF", "WEBP", "PCX", "SGI", "JPEG2000"])
def test_damaged_bytes_never_raise_anything_else(format: str):
    random = np.random.default_rng(FORMATS.index(format))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    options = {"exif": exif} if format in ("PNG", "JPEG", "TIFF", "WEBP") else {}
    good = encode(Image.fromarray(np.stack([RAMP] * 3, -1)), format, **options)
    refused = 0
    for _ in range(150):
        data = bytearray(good)
        for _ in range(random.integers(1, 6)):
            data[random.integers(len(data))] = random.integers(256)
        cut = random.integers(1, len(data)) if random.random() < 0.3 else len(data)
        try:
            assert load_image(bytes(data[:cut]), COLOUR).shape == (3, 8, 8)
        except UserError:
            refused += 1
    assert refused > 10


def test_runs_without_torch():
    code = "import sys, trainer.data.image, trainer.data.manifest, trainer.data.reader; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def noise(mode: str, width: int = 37, height: int = 53) -> Image.Image:
    """Random pixels, transparency included, in one of Pillow's modes."""
    random = np.random.default_rng(7)
    if mode in ("I;16", "I"):
        return Image.fromarray(
            random.integers(0, 65536, (height, width)).astype(np.uint16 if mode == "I;16" else np.int32)
        )
    image = Image.fromarray(random.integers(0, 256, (height, width, 4), dtype=np.uint8))
    if mode in ("P", "palette with alpha"):
        flat = image.convert("RGB").quantize(16)
        flat.info["transparency"] = 3 if mode == "P" else bytes(range(0, 256, 16))
        return flat
    if mode in ("L", "RGB"):
        flat = image.convert(mode)
        flat.info["transparency"] = flat.getpixel((5, 5))
        return flat
    return image.convert(mode)


def converted_at_once(image: Image.Image) -> Image.Image:
    """The whole picture in one step: what working in strips must not change."""
    if image.mode.startswith("I"):
        return Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).astype(np.uint8))
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("L" if image.mode in ("L", "LA") else "RGB")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "palette with alpha", "L", "RGB", "I;16", "I"])
@pytest.mark.parametrize("strip", [1, 200, 2**20])
def test_strips_give_the_pixels_of_the_whole(mode: str, strip: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_STRIP", strip)
    data = encode(noise(mode), "TIFF" if mode == "I" else "PNG")
    expected = converted_at_once(Image.open(BytesIO(data)))
    found = decode(data).image
    assert found.mode == expected.mode
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_fewer_pixels_can_be_allowed():
    data = encode(Image.fromarray(RAMP))
    assert decode(data, max_pixels=64).image.size == (8, 8)
    with pytest.raises(TooManyPixels, match="8 x 8 pixels; at most 63 pixels are read"):
        decode(data, max_pixels=63)


def test_honest_progressive_jpegs_are_read():
    for mode in ("L", "RGB", "CMYK"):
        data = encode(Image.new(mode, (64, 64)), "JPEG", progressive=True)
        assert decode(data).image.size == (64, 64)
    assert decode(scans(MAX_SCANS, side=64)).image.size == (64, 64)


@pytest.mark.parametrize(("number", "side", "allowed"), [(101, 64, 100), (64, 4000, 62), (101, 3000, 100)])
@pytest.mark.parametrize("fill_bytes", [0, 2])
def test_jpegs_with_more_scans_are_refused(number: int, side: int, allowed: int, fill_bytes: int):
    words = f"has {number} scans of {side} x {side} pixels; a JPEG of this size may have {allowed}: store it without"
    with pytest.raises(UserError, match=words):
        decode(scans(number, side, fill_bytes=fill_bytes))


def test_what_looks_like_a_scan_elsewhere_does_not_count():
    good = encode(Image.fromarray(RAMP), "JPEG")
    thumbnail = segment(0xE1, b"Exif\0\0" + b"\xff\xda" * 5000)
    film = b"\xff\xda" * 5000
    decoded = decode(good[:2] + thumbnail + good[2:] + film)
    np.testing.assert_array_equal(np.asarray(decoded.image), np.asarray(decode(good).image))


@pytest.mark.parametrize(("orientation", "enough", "size"), [(1, (200, 50), (200, 50)), (6, (50, 200), (50, 200))])
def test_drafts_know_which_side_is_up(orientation: int, enough: tuple[int, int], size: tuple[int, int]):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = BytesIO()
    Image.new("RGB", (400, 100), "red").save(file, "JPEG", exif=exif)
    assert decode(file.getvalue(), enough=enough).image.size == size
    assert decode(file.getvalue(), enough=(size[0] + 1, size[1])).image.size == (2 * size[0], 2 * size[1])
    assert decode(file.getvalue()).image.size == (2 * size[0], 2 * size[1])
