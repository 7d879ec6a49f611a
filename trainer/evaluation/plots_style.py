"""What all figures for print share: sizes, type, and lines and markers that can be told apart without colour."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from trainer.atomic import fresh_file

SINGLE, DOUBLE = 3.5, 7.16  # inches: the widths of one and of two columns of a paper
DPI = 200  # of the PNG; the PDF is vectors

# Okabe and Ito's palette, whose colours differ under every common colour blindness; black first, no yellow on white.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.2, 1, 1.2)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "v", "D", "P")

# One colour and one marker for each of up to ten classes; neighbours differ in lightness as well.
CLASS_COLOURS = (
    "#332288",
    "#E69F00",
    "#117733",
    "#88CCEE",
    "#882255",
    "#B8A22E",
    "#CC6677",
    "#1B7F79",
    "#AA4499",
    "#666666",
)
CLASS_MARKERS = ("o", "^", "s", "v", "D", "<", "P", ">", "X", "p")
GREY, PALE = "#777777", "#DDDDDD"

_STYLE: dict[str, Any] = {
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlepad": 4,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.1,
    "hatch.linewidth": 0.4,
    "pdf.fonttype": 42,  # text stays text
}


@contextmanager
def paper_style() -> Iterator[None]:
    """The type and line widths of the figures, for what is made and saved inside."""
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that needs no display."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write `name.pdf` and `name.png`; the same figure gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    pdf, png = folder / f"{name}.pdf", folder / f"{name}.png"
    pixels = BytesIO()
    with paper_style():
        with fresh_file(pdf) as file:
            figure.savefig(file, format="pdf", metadata={"CreationDate": None})
        figure.savefig(pixels, format="png", dpi=DPI)
    with Image.open(pixels) as image, fresh_file(png) as file:  # without the transparency that nothing uses
        image.convert("RGB").save(file, format="png", optimize=True, dpi=(DPI, DPI))
    return [pdf, png]


def bare(axes: Axes) -> None:
    """No ticks and no frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
