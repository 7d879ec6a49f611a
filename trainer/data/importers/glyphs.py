"""Characters of many scripts, rendered from the fonts that matplotlib carries and distorted: needs no network.

An identity is a character across faces and weights: 105 x 105 pixels, dark strokes on white paper, as in Omniglot.
"""

import threading
import unicodedata
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageFont, ImageOps

from trainer.data.importers import Entry, Importer, ImportOptions, Listing, Progress, Read
from trainer.errors import UserError

SIDE = 105
SAMPLES = 20  # of each character
MAX_CHARACTERS = 600
_FACES = (  # all styles in which matplotlib carries a face with more than the ASCII letters
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
)  # fmt: skip
_LETTER_FACES = ("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10")  # TeX's encoding agrees with ASCII on letters alone
_MIN_FACES = 4
_RANGES = (  # in order of preference where two characters look alike
    (0x21, 0x7E),  # ASCII
    (0xA1, 0x17F),  # Latin-1, Latin Extended-A
    (0x370, 0x3FF),  # Greek and Coptic
    (0x400, 0x52F),  # Cyrillic
    (0x531, 0x58A),  # Armenian
    (0x10A0, 0x10FF),  # Georgian
    (0x5D0, 0x5EA),  # Hebrew
    (0x250, 0x2AF),  # IPA
    (0x180, 0x24F),  # Latin Extended-B
    (0xE81, 0xEDF),  # Lao
    (0x2100, 0x214F),  # letter-like symbols
    (0x2200, 0x22FF),  # mathematical operators
    (0x2190, 0x21FF),  # arrows
    (0x2600, 0x26FF),  # symbols
)
_FONT_PIXELS = 96
_REFERENCE_PIXELS = 24
_CELLS = 5  # of the mesh that bends a character, in each direction
_FRAME = 4
_GREYS = np.arange(256) / 255
_ALIKE = 0.9  # correlation of two characters, brought to one size, above which they count as one


def list_glyphs(source: str | None, options: ImportOptions, progress: Progress) -> Listing:
    """Several hundred characters with 20 samples each; the same fonts and seed give the same pixels.

    Characters that look alike (Latin A, Greek Alpha, Cyrillic A; s and S, since size is no feature; d and p, a half
    turn apart) are taken once.

    Raises:
        UserError: matplotlib, whose fonts are used, is not installed.
    """
    fonts = _Fonts()
    samples = (
        (code, faces[j % len(faces)], j) for code, faces in _distinct(fonts, MAX_CHARACTERS) for j in range(SAMPLES)
    )
    return Listing(
        entries=(Entry(_identity(code), name := f"U+{code:04X}/{face}/{j:02d}", name) for code, face, j in samples),
        source="",
        provenance={
            "source": f"fonts of matplotlib {fonts.version}",
        },
    )


def read_glyphs(source: str, options: ImportOptions) -> Read:
    """Draws a sample by its name."""
    fonts = _Fonts()

    def draw(place: str) -> bytes:
        code, face, number = place.removeprefix("U+").split("/")
        return _draw(fonts, int(code, 16), face, int(number), options.seed)

    return draw


IMPORTER = Importer(list_glyphs, read_glyphs)


class _Fonts:
    """matplotlib's faces, and a character's ink in one of them."""

    def __init__(self) -> None:
        try:
            import matplotlib
            from matplotlib.ft2font import FT2Font
        except ImportError as error:
            raise UserError(
                "--kind glyphs renders the fonts of matplotlib, which is not installed; "
                "pip install 'hypersphere[trainer]', or import another kind"
            ) from error
        self.version: str = matplotlib.__version__
        folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
        paths = {face: folder / f"{face}.ttf" for face in (*_FACES, *_LETTER_FACES)}
        self._fonts = {
            face: ImageFont.truetype(path, _FONT_PIXELS, layout_engine=ImageFont.Layout.BASIC)
            for face, path in paths.items()
            if path.exists()
        }
        self._covered = {face: set(FT2Font(str(paths[face])).get_charmap()) for face in self._fonts}
        self._lock = threading.Lock()  # a FreeType face serves one thread at a time

    def faces(self, code: int) -> list[str]:
        letter = chr(code).isascii() and chr(code).isalpha()
        wanted = (*_FACES, *_LETTER_FACES) if letter else _FACES
        return [face for face in wanted if face in self._fonts and code in self._covered[face]]

    def ink(self, code: int, face: str) -> Image.Image | None:
        """The character, white on black, cut to its outline; None if it leaves no ink."""
        with self._lock:
            left, top, right, bottom = self._fonts[face].getbbox(chr(code))
            if right <= left or bottom <= top:
                return None
            mask = self._fonts[face].getmask(chr(code), mode="L")
            image = Image.frombytes("L", mask.size, bytes(mask))
        box = image.getbbox()
        return image.crop(box) if box is not None else None


def _identity(code: int) -> str:
    return f"U+{code:04X} {unicodedata.name(chr(code), 'character')}"


def _distinct(fonts: _Fonts, most: int) -> list[tuple[int, list[str]]]:
    """The first `most` characters with enough faces, each unlike all before it, also after quarter turns."""
    kept: list[tuple[int, list[str]]] = []
    shapes = np.empty((0, _REFERENCE_PIXELS**2), dtype=np.float32)
    for code in (code for first, last in _RANGES for code in range(first, last + 1)):
        if unicodedata.category(chr(code))[0] not in "LNSP" or unicodedata.decomposition(chr(code)):
            continue  # accented letters differ too little from each other
        faces = fonts.faces(code)
        ink = fonts.ink(code, faces[0]) if len(faces) >= _MIN_FACES else None
        if ink is None:
            continue
        turned = np.stack([np.rot90(_reference(ink), turns).ravel() for turns in range(4)])
        if len(kept) and float((shapes @ turned.T).max()) > _ALIKE:
            continue
        kept.append((code, faces))
        shapes = np.concatenate([shapes, turned[:1]])
        if len(kept) == most:
            break
    return kept


def _reference(ink: Image.Image) -> NDArray[np.float32]:
    """A character at one size, blurred a little, with mean 0 and norm 1: products are correlations."""
    scale = _REFERENCE_PIXELS / max(ink.size)
    size = (max(1, round(ink.width * scale)), max(1, round(ink.height * scale)))
    paper = Image.new("L", (_REFERENCE_PIXELS, _REFERENCE_PIXELS))
    paper.paste(ink.resize(size), ((_REFERENCE_PIXELS - size[0]) // 2, (_REFERENCE_PIXELS - size[1]) // 2))
    values = np.asarray(paper.filter(ImageFilter.GaussianBlur(0.7)), dtype=np.float32)
    values = values - values.mean()
    unit: NDArray[np.float32] = values / max(float(np.linalg.norm(values)), 1e-6)
    return unit


def _draw(fonts: _Fonts, code: int, face: str, number: int, seed: int) -> bytes:
    """One sample as a PNG file; its random numbers depend on the character and its number alone."""
    random = np.random.default_rng([seed, code, number])
    ink = fonts.ink(code, face)
    if ink is None:
        raise UserError(f"U+{code:04X} leaves no ink in {face}; report this font")
    # The width of the stroke: blur, then cut at a level below (thicker) or above (thinner) the edge's middle.
    soft = _warp(ink, random).filter(ImageFilter.GaussianBlur(random.uniform(0.8, 1.8)))
    level, steepness = random.uniform(0.25, 0.5), random.uniform(3, 8)
    paper = soft.point((255 * np.clip((level - _GREYS) * steepness + 0.5, 0, 1)).astype(int).tolist())
    buffer = BytesIO()
    paper.save(buffer, format="PNG")
    return buffer.getvalue()


def _warp(ink: Image.Image, random: np.random.Generator) -> Image.Image:
    """Resample the ink on the sample's grid, cell by cell of a bent mesh; lengths are in pixels of the sample."""
    size, stretch = random.uniform(52, 82), random.uniform(0.85, 1.18)
    angle, shear = np.deg2rad(random.uniform(-12, 12)), random.uniform(-0.25, 0.25)
    shift_x, shift_y = random.uniform(-8, 8), random.uniform(-8, 8)
    elastic = random.uniform(1.0, 3.5)
    zoom = max(ink.size) / size
    nodes = np.linspace(0, SIDE, _CELLS + 1)
    y, x = np.meshgrid(nodes - SIDE / 2, nodes - SIDE / 2, indexing="ij")
    x = x - shift_x + elastic * _smooth_field(random)
    y = y - shift_y + elastic * _smooth_field(random)
    turned_x, turned_y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    from_x = (turned_x + shear * turned_y) * zoom * stretch + ink.width / 2
    from_y = turned_y * zoom / stretch + ink.height / 2
    # shrinking needs an average over the pixels that fall together; the frame of paper is what lies outside
    soft = ImageOps.expand(ink, _FRAME).filter(ImageFilter.BoxBlur(max(0.0, (zoom - 1) / 2)))
    from_xy = (np.stack([from_x, from_y], axis=-1) + _FRAME).tolist()
    edges = np.round(nodes).astype(int).tolist()
    mesh = [
        (
            (edges[j], edges[i], edges[j + 1], edges[i + 1]),
            (*from_xy[i][j], *from_xy[i + 1][j], *from_xy[i + 1][j + 1], *from_xy[i][j + 1]),
        )
        for i in range(_CELLS)
        for j in range(_CELLS)
    ]
    return soft.transform((SIDE, SIDE), Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def _smooth_field(random: np.random.Generator) -> NDArray[np.float32]:
    """Displacements of about unit size at the mesh's nodes (elastic distortion, Simard et al. 2003)."""
    coarse = Image.fromarray(random.standard_normal((4, 4), dtype=np.float32))
    return np.asarray(coarse.resize((_CELLS + 1, _CELLS + 1), Image.Resampling.BICUBIC), dtype=np.float32)
