"""Crafted images: each is small to send, quick to make, and as costly to decode as its format allows.

`ATTACKS` names them; call one for its bytes. MANY_PIXELS are those whose headers alone promise too much.
"""

import struct
import zlib
from collections.abc import Callable
from functools import partial
from io import BytesIO
from itertools import pairwise

import numpy as np
from PIL import Image

SIDE = 4000  # 16 megapixels: the most that the service takes by default
FULL = 10 * 2**20  # bytes of the largest file that is read at all


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def good(format: str, side: int = 24) -> bytes:
    """An honest image."""
    pixels = np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels), format)


def fill(head: bytes, unit: bytes, tail: bytes = b"", size: int = FULL) -> bytes:
    """`unit` between head and tail, as often as the size of a file allows."""
    return head + unit * ((size - len(head) - len(tail)) // len(unit)) + tail


# JPEG: segments FF, marker, length, content; the picture is coded in scans.


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def jpeg_parts(mode: str, side: int, **options: object) -> tuple[bytes, list[bytes]]:
    """A progressive JPEG cut up: all before the first scan, and the scans, each with the tables before it."""
    data = encode(Image.new(mode, (side, side), 77), "JPEG", progressive=True, **options)
    marks = [at for at in range(len(data) - 1) if data[at] == 0xFF and data[at + 1] in (0xC4, 0xDA, 0xD9)]
    ends = [later for at, later in pairwise(marks) if data[at + 1] == 0xDA]
    return data[: marks[0]], [data[start:end] for start, end in pairwise([marks[0], *ends])]


def scans(number: int, side: int = SIDE, mode: str = "L", fill_bytes: int = 0) -> bytes:
    """A real progressive JPEG whose last scan, a refinement of all coefficients, is there over and over."""
    head, parts = jpeg_parts(mode, side)
    again = parts[-1].replace(b"\xff\xda", b"\xff" * fill_bytes + b"\xff\xda")
    return head + b"".join(parts) + again * (number - len(parts)) + b"\xff\xd9"


def empty_scans(side: int = SIDE) -> bytes:
    """A scan header and no data, a hundred thousand times."""
    head, parts = jpeg_parts("L", side)
    bare = parts[-1][parts[-1].index(b"\xff\xda") :][: 2 + 8]
    return head + b"".join(parts) + bare * 100_000 + b"\xff\xd9"


def arithmetic_scans(number: int) -> bytes:
    """The arithmetic decoder makes something of any bytes, and comes to no early end."""
    head, parts = jpeg_parts("L", SIDE)
    noise = np.random.default_rng(0).integers(0, 255, 900, dtype=np.uint8).tobytes()
    headers = [part[part.index(b"\xff\xda") :][: 2 + 8] for part in parts]
    body = b"".join(header + noise for header in headers + headers[-1:] * (number - len(headers)))
    return head.replace(b"\xff\xc2", b"\xff\xca", 1) + body + b"\xff\xd9"


def jpeg_with(segments: bytes) -> bytes:
    data = good("JPEG")
    return data[:2] + segments + data[2:]


def exif(entries: int, size: int) -> bytes:
    """Tags whose contents all lie over one another."""
    head = b"MM\0\x2a\0\0\0\x08" + struct.pack(">H", entries)
    tags = b"".join(struct.pack(">HHII", tag, 7, size, 8) for tag in range(entries))
    return head + tags + b"\0" * 4


def exif_segments(tiff: bytes) -> bytes:
    pieces = [tiff[at : at + 65_000] for at in range(0, len(tiff), 65_000)]
    return b"".join(segment(0xE1, b"Exif\0\0" + piece) for piece in pieces)


# PNG: chunks of length, kind, content, checksum.


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    width: int = 8,
    height: int = 8,
    pixels: bytes | None = None,
    before: bytes = b"",
    after: bytes = b"",
    form: tuple[int, ...] = (8, 0, 0, 0, 0),
) -> bytes:
    """`form`: bits, colour type, compression, filter, interlace. Without `pixels`: grey of 8 bits, all black."""
    header = chunk(b"IHDR", struct.pack(">II5B", width, height, *form))
    data = zlib.compress(bytes((width + 1) * height)) if pixels is None else pixels
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", data) + after + chunk(b"IEND")


def bomb(size: int = 100 * 2**20) -> bytes:
    """A deflate stream of zeros: a thousandth of what it becomes."""
    packer = zlib.compressobj(9)
    return packer.compress(bytes(size)) + packer.flush()


def text_bombs(kind: bytes, number: int) -> bytes:
    middle = b"\0\x01\0\0\0" if kind == b"iTXt" else b"\0\0"
    packed = bomb(2**20 - 1)  # one byte more, and Pillow refuses by itself
    return b"".join(chunk(kind, b"key%d" % i + middle + packed) for i in range(number))


def png_rgba16(interlace: int) -> bytes:
    rows = bomb(8 * SIDE * SIDE + 8 * SIDE * 2)
    return png(SIDE, SIDE, rows, form=(16, 6, 0, 0, interlace))


# GIF, WebP, TIFF and the rest.


def gif(screen: tuple[int, int], frame: tuple[int, int], before: bytes = b"") -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0, 0, 0) + before
    return head + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\0;"


def large_gif() -> bytes:
    return encode(Image.new("P", (SIDE, SIDE), 3), "GIF")


def webp_frames(number: int, canvas: int) -> bytes:
    """An animation: frames of 1 x 1 on a large canvas."""
    picture = encode(Image.new("RGB", (2, 2)), "WEBP", lossless=True)[12:]
    frame = struct.pack("<4sI", b"ANMF", 16 + len(picture)) + bytes(6) + b"\1\0\0\1\0\0\1\0\0\0" + picture
    size = (canvas - 1).to_bytes(3, "little")
    head = struct.pack("<4sI", b"VP8X", 10) + b"\x02\0\0\0" + size * 2 + struct.pack("<4sI", b"ANIM", 6) + bytes(6)
    body = b"WEBP" + head + frame * number
    return struct.pack("<4sI", b"RIFF", len(body)) + body


def tiff(tags: dict[int, tuple[int, ...]], data: bytes = b"") -> bytes:
    """One directory; every value is a list of 32 bits, as libtiff takes for all that is used here."""
    values = len(data) + 8
    directory, extra = b"", b""
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            offset = struct.pack("<I", values + len(extra))
            extra += packed
            packed = offset
        directory += struct.pack("<HHI", tag, 4, len(numbers)) + packed
    return (
        struct.pack("<2sHI", b"II", 42, values + len(extra)) + data + extra
        + struct.pack("<H", len(tags)) + directory + bytes(4)
    )  # fmt: skip


def tiff_grey(side: int, **other: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    names = {"compression": 259, "offsets": 273, "rows": 278, "lengths": 279, "tile_width": 322, "tile_height": 323}
    names |= {"tile_offsets": 324, "tile_lengths": 325}
    form = {256: (side,), 257: (side,), 258: (8,), 259: (1,), 262: (1,), 277: (1,)}
    return form | {names[name]: value for name, value in other.items()}


def tiff_overlapping_strips() -> bytes:
    """Every row claims the same ten megabytes."""
    packed = zlib.compress(bytes(SIDE)) + bytes(9_000_000)
    rows = {"rows": (1,), "offsets": (8,) * SIDE, "lengths": (len(packed),) * SIDE}
    return tiff(tiff_grey(SIDE, compression=(8,), **rows), packed)


def tiff_tiles(side: int, tile: int) -> bytes:
    packed = bomb(tile * tile)
    number = (-(-side // tile)) ** 2
    where = {"tile_offsets": (8,) * number, "tile_lengths": (len(packed),) * number}
    return tiff(tiff_grey(side, compression=(8,), tile_width=(tile,), tile_height=(tile,), **where), packed)


def tiff_of_jpeg() -> bytes:
    """The scan bomb in another wrapping."""
    packed = scans(3000)
    return tiff(tiff_grey(SIDE, compression=(7,), rows=(SIDE,), offsets=(8,), lengths=(len(packed),)), packed)


def jpeg2000(patch: Callable[[bytearray, int], None] | None = None, side: int = 64, **options: object) -> bytes:
    """A codestream; `patch` gets it with the place of its COD marker's content."""
    data = bytearray(encode(Image.new("RGB", (side, side), (9, 99, 199)), "JPEG2000", no_jp2=True, **options))
    if patch:
        patch(data, data.index(b"\xff\x52") + 4)
    return bytes(data)


def many_tiles(data: bytearray, _: int) -> None:
    """65,025 tiles: a picture of 4,080 x 4,080 in tiles of 16 x 16."""
    data[8:40] = struct.pack(">8I", SIDE, SIDE, 0, 0, 16, 16, 0, 0)


def many_levels(data: bytearray, cod: int) -> None:
    data[cod + 5] = 32


def bmp_rle(bits: int, width: int = SIDE, height: int = SIDE) -> bytes:
    head = struct.pack("<2sIHHI", b"BM", 0, 0, 0, 54 + 4 * 2**bits)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 1 if bits == 8 else 2, 0, 0, 0, 0, 0)
    row = b"\xff\x12" * (width // 255) + bytes((width % 255, 0x12)) + b"\0\0"
    return head + info + bytes(4 * 2**bits) + row * height + b"\0\1"


def sgi_rle(side: int = SIDE) -> bytes:
    head = struct.pack(">HBBHHHHII", 474, 1, 1, 3, side, side, 3, 0, 255).ljust(512, b"\0")
    start = 512 + 8 * side * 3
    row = b"\x7f\x33" * (side // 127) + bytes((side % 127, 0x33, 0))
    table = struct.pack(">I", start) * (3 * side) + struct.pack(">I", len(row)) * (3 * side)
    return head + table + row


def pcx(side: int = SIDE) -> bytes:
    head = struct.pack("<4B4H2H", 10, 5, 1, 8, 0, 0, side - 1, side - 1, 72, 72) + bytes(49)
    head += struct.pack("<BHH", 3, side, 1)
    row = b"\xff\x33" * (3 * side // 63) + bytes((0xC0 + 3 * side % 63, 0x33))
    return head.ljust(128, b"\0") + row * side


def lies() -> dict[str, Callable[[], bytes]]:
    """Headers that promise far more pixels than there may be, with next to nothing behind them."""
    side = 60_000
    big = struct.pack(">I", side)

    def j2k() -> bytes:
        data = bytearray(jpeg2000())
        data[8:16] = data[24:32] = big * 2
        return bytes(data)

    def jpeg() -> bytes:
        data = good("JPEG")
        at = data.index(b"\xff\xc0") + 5
        return data[:at] + struct.pack(">HH", side, side) + data[at + 4 :]

    return {
        "png": partial(png, side, side, b""),
        "jpeg": jpeg,
        "gif by its screen": partial(gif, (side, side), (1, 1)),
        "gif by its frame": partial(gif, (1, 1), (side, side)),
        "tiff": lambda: tiff(tiff_grey(side, offsets=(8,), lengths=(1,)), b"\0"),
        "webp": lambda: webp_frames(1, 16_000),
        "jpeg2000": j2k,
        "bmp": lambda: bmp_rle(8, side, 1).replace(struct.pack("<ii", side, 1), struct.pack("<ii", side, side)),
        "pcx": lambda: pcx(64).replace(struct.pack("<HH", 63, 63), struct.pack("<HH", side, side)),
        "sgi": lambda: struct.pack(">HBBHHHHII", 474, 1, 1, 3, side, side, 3, 0, 255).ljust(600, b"\0"),
        "ppm": lambda: b"P6 60000 60000 255\n" + bytes(9),
        "ppm of text": lambda: b"P3 60000 60000 255\n1 2 3",
    }


ATTACKS: dict[str, Callable[[], bytes]] = {
    "jpeg: 3,000 scans of 16 MP": partial(scans, 3000),
    "jpeg: 250,000 scans of a small picture": partial(scans, 250_000, 64),
    "jpeg: scans behind fill bytes": partial(scans, 3000, fill_bytes=3),
    "jpeg: empty scans": empty_scans,
    "jpeg: as many scans as are allowed": partial(scans, 62),
    "jpeg: as many scans of colour as are allowed": partial(scans, 62, mode="RGB"),
    "jpeg: arithmetic scans": partial(arithmetic_scans, 60),
    "jpeg: progressive CMYK of 16 MP": lambda: encode(Image.new("CMYK", (SIDE, SIDE)), "JPEG", progressive=True),
    "jpeg: 2.6 million segments": lambda: jpeg_with(segment(0xE5, b"") * (FULL // 4 - 1000)),
    "jpeg: a profile of 9 MB": lambda: jpeg_with(
        b"".join(segment(0xE2, b"ICC_PROFILE\0" + bytes((n, 140)) + bytes(65_000)) for n in range(1, 141))
    ),
    "jpeg: quantisation tables": lambda: jpeg_with(segment(0xDB, (b"\0" + b"\1" * 64) * 1000) * 150),
    "jpeg: photoshop resources": lambda: jpeg_with(
        segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5000) * 150
    ),
    "jpeg: exif of 65,535 tags": lambda: jpeg_with(exif_segments(exif(65_535, 4))),
    "jpeg: exif of overlapping tags": lambda: jpeg_with(exif_segments(exif(65_535, 700_000))),
    "jpeg: 9 MB of exif": lambda: jpeg_with(exif_segments(exif(65_535, 5_000) + bytes(8_000_000))),
    "png: 16 MP of 64-bit pixels": partial(png_rgba16, 0),
    "png: 16 MP of 64-bit pixels, interlaced": partial(png_rgba16, 1),
    "png: 16-bit grey of 16 MP": lambda: png(SIDE, SIDE, bomb(2 * SIDE * SIDE + SIDE), form=(16, 0, 0, 0, 0)),
    "png: grey with alpha of 16 MP": lambda: png(SIDE, SIDE, bomb(2 * SIDE * SIDE + SIDE), form=(8, 4, 0, 0, 0)),
    "png: data beyond the picture": lambda: png(8, 8, bomb(2**27)),
    "png: zTXt": lambda: png(before=text_bombs(b"zTXt", 200)),
    "png: iTXt": lambda: png(before=text_bombs(b"iTXt", 200)),
    "png: iTXt after the pixels": lambda: png(after=text_bombs(b"iTXt", 200)),
    "png: iCCP": lambda: png(before=chunk(b"iCCP", b"name\0\0" + bomb(2**27))),
    "png: iCCP over and over": lambda: png(before=chunk(b"iCCP", b"name\0\0" + bomb(2**20 - 1)) * 5000),
    "png: small chunks": lambda: fill(png()[:33], chunk(b"tEXt", b"a\0"), png()[33:]),
    "png: small chunks after the pixels": lambda: fill(png()[:-12], chunk(b"tEXt", b"a\0"), png()[-12:]),
    "png: empty data chunks": lambda: fill(png()[:33], chunk(b"IDAT"), png()[33:]),
    "png: raw profile": lambda: png(before=chunk(b"zTXt", b"Raw profile type exif\0\0" + bomb(2**20 - 1)) * 60),
    "png: exif of overlapping tags": lambda: png(before=chunk(b"eXIf", exif(65_535, 780_000))),
    "png: exif over and over": lambda: png(before=chunk(b"eXIf", exif(3, 4)) * 100_000),
    "png: animation controls": lambda: png(
        before=chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))
        + b"".join(chunk(b"fcTL", struct.pack(">IIIIIHHBB", n, 8, 8, 0, 0, 1, 1, 0, 0)) for n in range(200_000))
    ),
    "gif: 16 MP screen, tiny frame": partial(gif, (SIDE, SIDE), (1, 1)),
    "gif: tiny screen, 16 MP frame": lambda: large_gif().replace(struct.pack("<HH", SIDE, SIDE), b"\1\0\1\0", 1),
    "gif: short comments": lambda: gif((8, 8), (8, 8), b"!\xfe\1a\0" * (FULL // 5 - 100)),
    "gif: extensions": lambda: gif((8, 8), (8, 8), b"!\xf9\0\0" * (FULL // 4 - 100)),
    "gif: short blocks": lambda: fill(gif((SIDE, SIDE), (SIDE, SIDE))[:-5], b"\1\x4c", b"\0;"),
    "gif: a million frames": lambda: fill(good("GIF")[:-1], gif((8, 8), (8, 8))[13:-1], b";"),
    "webp: 16 MP": lambda: encode(Image.new("RGB", (SIDE, SIDE)), "WEBP", lossless=True, method=0, quality=0),
    "webp: 16 MP with losses": lambda: encode(Image.new("RGB", (SIDE, SIDE)), "WEBP", method=0),
    "webp: 130,000 frames": partial(webp_frames, 130_000, 2),
    "webp: small frame on 16 MP": partial(webp_frames, 1, SIDE),
    "tiff: strips that overlap": tiff_overlapping_strips,
    "tiff: 62,500 tiles": partial(tiff_tiles, SIDE, 16),
    "tiff: a tile of 4 gigabytes": lambda: tiff(
        tiff_grey(
            64, compression=(8,), tile_width=(65_520,), tile_height=(65_520,), tile_offsets=(8,), tile_lengths=(9,)
        ),
        bytes(9),
    ),
    "tiff: a strip of 4 gigabytes": lambda: tiff(
        tiff_grey(64, compression=(8,), rows=(2**32 - 1,), offsets=(8,), lengths=(2**32 - 1,)), bomb(2**24)
    ),
    "tiff: scans of a JPEG": tiff_of_jpeg,
    "tiff: 65,535 tags": lambda: exif(65_535, 4) + bytes(100),
    "tiff: directories in a circle": lambda: (
        tiff(tiff_grey(8, offsets=(8,), lengths=(64,)), bytes(64))[:-4] + struct.pack("<I", 72)
    ),
    "tiff: fax of 16 MP": lambda: encode(Image.new("1", (SIDE, SIDE)), "TIFF", compression="group4"),
    "jpeg2000: 16 MP": lambda: jpeg2000(side=SIDE),
    "jpeg2000: noise of 3 MP": lambda: encode(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1500), dtype=np.uint8)), "JPEG2000"
    ),
    "jpeg2000: 62,500 tiles": lambda: jpeg2000(many_tiles),
    "jpeg2000: 32 levels": lambda: jpeg2000(many_levels),
    "bmp: RLE of 16 MP": partial(bmp_rle, 8),
    "bmp: RLE of 4 bits, 16 MP": partial(bmp_rle, 4),
    "bmp: runs of nothing": lambda: fill(bmp_rle(8, 8, 8)[:-2], b"\1\1"),
    "sgi: rows that overlap": sgi_rle,
    "pcx: 16 MP": pcx,
    "ppm: text": lambda: fill(b"P3 2000 2000 255\n", b"1 "),
    "ppm: bits as text": lambda: fill(b"P1 3200 3200\n", b"1"),
    "ppm: 10-bit values": lambda: fill(b"P6 1300 1300 1023\n", b"\1"),
    "ppm: a comment of ten megabytes": lambda: fill(b"P5 #", b"a", b"\n8 8 255\n" + bytes(64)),
    "ppm: blanks": lambda: fill(b"P5", b" ", b"8 8 255\n" + bytes(64)),
}
MANY_PIXELS: dict[str, Callable[[], bytes]] = lies()
