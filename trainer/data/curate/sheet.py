"""Sheets of pictures: rows of samples with a line of text above each, as a PNG file. Pillow alone."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from trainer.data.image import Preprocessing, load_image
from trainer.data.reader import places_in, read_bytes
from trainer.data.split import Split

CELL = 96  # pixels, each way
_GAP, _LINE, _MARGIN = 6, 22, 12
_LETTERS = 1000  # of a text that are looked at: names may be long, and no sheet is so wide
_PAPER, _INK = "white", "black"
_PREVIEW = Preprocessing(mode="RGB", height=CELL, width=CELL)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of text and the pictures below it; None leaves a gap between two groups of them."""

    text: str
    pictures: Sequence[NDArray[np.uint8] | None]


def pictures(split: Split, positions: Sequence[int]) -> list[NDArray[np.uint8]]:
    """The samples at these positions as RGB pixels [CELL, CELL, 3].

    Raises:
        UserError: a shard cannot be had, or one of the samples is damaged.
    """
    drawn = []
    for position in positions:
        shard = int(np.searchsorted(split.ends, position, side="right"))
        index, file = split.index(shard), split.shards[shard].file
        row = position - (int(split.ends[shard]) - index.samples)
        (place,) = places_in(Path(file.name), index, np.array([row]))
        with split.store.open({file: [(place.offset, place.size)]}, whole=False) as files:
            payload = read_bytes(files[file], place)
        drawn.append(load_image(payload, _PREVIEW, f"{file.name}: {place.key}").transpose(1, 2, 0))
    return drawn


def draw(title: str, rows: Sequence[Row]) -> bytes:
    """The sheet as a PNG file.

    Args:
        title: stands above all rows.
        rows: from top to bottom. A text that is wider than the sheet is cut off; letters that Pillow's own font does
            not have are drawn as boxes.
    """
    width = max([len(row.pictures) for row in rows] + [6]) * (CELL + _GAP) - _GAP + 2 * _MARGIN
    height = 2 * _MARGIN + _LINE + len(rows) * (_LINE + CELL + _GAP)
    paper = Image.new("RGB", (width, height), _PAPER)
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(14)
    top = _MARGIN
    for row in (Row(title, ()), *rows):
        pen.text((_MARGIN, top), _fit(row.text, font, width - 2 * _MARGIN), _INK, font)
        top += _LINE
        for place, picture in enumerate(row.pictures):
            if picture is not None:
                paper.paste(Image.fromarray(picture), (_MARGIN + place * (CELL + _GAP), top))
        top += CELL + _GAP if row.pictures else 0
    file = BytesIO()
    paper.save(file, "PNG")
    return file.getvalue()


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    text = "".join(letter if letter.isprintable() else "?" for letter in text[:_LETTERS])
    if font.getlength(text) <= width:
        return text
    fits = bisect_right(range(len(text)), width, key=lambda letters: font.getlength(text[:letters] + "…"))
    return text[: max(0, fits - 1)] + "…"
