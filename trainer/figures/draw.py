"""The figures of the geometry of losses: digits trained, curves computed, figures drawn and captioned.

Beside the figures (PDF and PNG) lie `captions.md`, the tables as Markdown and JSON, and the numbers as JSON.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from trainer.atomic import write_file
from trainer.config import Config
from trainer.errors import UserError
from trainer.evaluation.plots_style import save
from trainer.figures import captions, digits
from trainer.figures.boundaries import boundary_markdown, boundary_records, boundary_rows
from trainer.figures.curves import CurveGroup, curve_groups, negative_curves
from trainer.figures.digits import Trained
from trainer.figures.plot_angles import angle_figure
from trainer.figures.plot_geometry import Panel, geometry_figure
from trainer.figures.plot_margins import (
    boundary_plane_figure,
    boundary_table_figure,
    gradient_figure,
    negatives_figure,
    psi_figure,
)
from trainer.losses import by_name
from trainer.losses.base import Family

FAMILIES: tuple[Family, ...] = get_args(Family)
MULTIPLES = (1, 2, 3, 4)
LEARNED = 0.7  # below this accuracy the caption says that a loss has not learned to tell the digits apart
_L_SOFTMAX = "l_softmax"
Show = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Drawn:
    """A written figure: its files, and what a reader must know."""

    name: str
    files: tuple[Path, ...]
    caption: str


@dataclass(frozen=True)
class Written:
    """All that a command wrote into its folder: the figures, and the captions, tables and numbers beside them."""

    figures: tuple[Drawn, ...]
    beside: tuple[Path, ...]

    @property
    def files(self) -> list[Path]:
        return [*(path for figure in self.figures for path in figure.files), *self.beside]


@dataclass(frozen=True)
class _Wanted:
    """A figure to be trained for: a name, a title for people, and what is trained for each panel."""

    name: str
    what: str
    members: tuple[tuple[str, Config], ...]


def geometry(
    folder: Path, losses: Sequence[str], dimensions: Sequence[int], *, steps: int, seed: int, show: Show
) -> Written:
    """Train every loss on the digits in every dimension, and draw a figure for each family; then the margins' curves
    and the table of binary decision boundaries.

    Args:
        losses: names; none for all.
        dimensions: 2, 3 or both.
        show: called with (stage, done, total).

    Raises:
        UserError: a name that is not known, or other dimensions.
    """
    if wrong := [dimension for dimension in dimensions if dimension not in (2, 3)]:
        raise UserError(f"an embedding of {wrong[0]} dimensions cannot be drawn; choose 2 or 3")
    drawn: list[Drawn] = []
    numbers: list[dict[str, Any]] = []
    split = digits.load(seed)
    for dimension in dimensions:
        for wanted in _wanted(losses, dimension, steps):
            trained: list[Trained] = []
            for place, (_, config) in enumerate(wanted.members):
                show(f"{wanted.name}, {dimension}-D", place, len(wanted.members))
                trained.append(digits.train(config, steps, seed, split))
                numbers.append(_numbers(wanted.name, dimension, config, trained[-1]))
            show(f"{wanted.name}, {dimension}-D", len(wanted.members), len(wanted.members))
            about = {"dimension": dimension, "steps": steps, "seed": seed}
            drawn += _draw_family(folder, wanted, trained, about)
    margins = _draw_margins(folder)
    drawn += margins.figures
    numbers_file = _write_json(folder / "geometry.json", {"steps": steps, "seed": seed, "embeddings": numbers})
    return Written(tuple(drawn), (*margins.beside, numbers_file, _write_captions(folder, drawn)))


def gradients(folder: Path) -> Written:
    """Draw dL/dcos(theta) over theta for every margin; the numbers are written beside it."""
    groups = curve_groups()
    files = save(gradient_figure(groups), folder, "gradients")
    numbers_file = _write_json(folder / "gradients.json", _curve_records(groups))
    drawn = Drawn("gradients", tuple(files), captions.of_gradients(groups))
    return Written((drawn,), (numbers_file, _write_captions(folder, [drawn])))


def check_losses(losses: Sequence[str], families: Sequence[str]) -> list[str]:
    """The names of the losses asked for, in the order of the table; all where none is asked for.

    Raises:
        UserError: a loss or a family that is not known.
    """
    known = by_name()
    for name in losses:
        if name not in known:
            raise UserError(f"loss '{name}' is not known; allowed: {', '.join(known)}")
    for family in families:
        if family not in FAMILIES:
            raise UserError(f"family '{family}' is not known; allowed: {', '.join(FAMILIES)}")
    everything = not losses and not families
    return [name for name, spec in known.items() if everything or name in losses or spec.family in families]


def _wanted(losses: Sequence[str], dimension: int, steps: int) -> list[_Wanted]:
    """A figure for each family that is asked for, and one of L-Softmax over m."""
    names = check_losses(losses, ())
    figures = []
    for family in FAMILIES:
        members = tuple(
            (by_name()[name].title, digits.settings(name, dimension, steps))
            for name in names
            if by_name()[name].family == family
        )
        if members:
            figures.append(_Wanted(family, f"the {family} family", members))
    if _L_SOFTMAX in names:
        members = tuple(
            (f"L-Softmax, $m = {m}$", digits.settings(_L_SOFTMAX, dimension, steps, margin=m)) for m in MULTIPLES
        )
        figures.append(_Wanted(_L_SOFTMAX, "L-Softmax with growing m", members))
    return figures


def _draw_family(folder: Path, wanted: _Wanted, trained: Sequence[Trained], about: Mapping[str, int]) -> list[Drawn]:
    dimension = about["dimension"]
    panels = [_panel(title, one, dimension) for (title, _), one in zip(wanted.members, trained, strict=True)]
    suffix = f"{wanted.name}_{dimension}d"
    lost = [panel.title for panel, one in zip(panels, trained, strict=True) if one.accuracy_by_means() < LEARNED]
    caption = captions.of_family(wanted.what, panels, lost, **about)
    geometry_files = save(geometry_figure(panels), folder, f"geometry_{suffix}")
    angle_files = save(angle_figure(panels), folder, f"angles_{suffix}")
    return [
        Drawn(f"geometry_{suffix}", tuple(geometry_files), caption),
        Drawn(f"angles_{suffix}", tuple(angle_files), captions.of_angles(suffix)),
    ]


def _panel(title: str, trained: Trained, dimension: int) -> Panel:
    by_centres = trained.accuracy_by_centres()
    accuracy = trained.accuracy_by_means() if by_centres is None else by_centres
    if trained.centres is None:
        directions_MD = trained.mean_directions_CD
    else:
        directions_MD = trained.centres.rows_cKD.reshape(-1, dimension)
    return Panel(
        title=title,
        note=f"test accuracy {100 * accuracy:.1f} %",
        angular=trained.angular,
        features_ND=trained.test_ND,
        labels_N=trained.test_labels_N,
        centres_MD=directions_MD,
        scores=trained.scores,
        learned_CD=trained.learned_CD,
    )


def _numbers(figure: str, dimension: int, config: Config, trained: Trained) -> dict[str, Any]:
    measured = trained.angles()
    return {
        "figure": f"geometry_{figure}_{dimension}d",
        "name": trained.name,
        "dimension": dimension,
        "loss": asdict(config.loss),
        "auxiliary": [asdict(spec) for spec in config.auxiliary],
        "learned_centres": None if trained.learned_CD is None else trained.learned_CD.round(4).tolist(),
        "accuracy_by_centres": trained.accuracy_by_centres(),
        "accuracy_by_means": trained.accuracy_by_means(),
        "intra_mean_degrees": measured.intra_mean,
        "inter_smallest_degrees": measured.inter_smallest,
    }


def _draw_margins(folder: Path) -> Written:
    groups, negatives, rows = curve_groups(), negative_curves(), boundary_rows()
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "boundaries.md"
    write_file(table, boundary_markdown(rows))
    records = _write_json(folder / "boundaries.json", boundary_records(rows))
    parts = [
        ("psi", psi_figure(groups), captions.of_psi(groups)),
        ("negatives", negatives_figure(negatives), captions.of_negatives(negatives)),
        ("boundaries", boundary_table_figure(rows), captions.of_boundaries(rows)),
        ("boundary_planes", boundary_plane_figure(rows), captions.BOUNDARY_PLANES),
    ]
    drawn = tuple(Drawn(name, tuple(save(figure, folder, name)), caption) for name, figure, caption in parts)
    return Written(drawn, (table, records))


def _curve_records(groups: Sequence[CurveGroup]) -> list[dict[str, Any]]:
    """Every 16th point of each curve."""
    return [
        {
            "group": group.name,
            "name": curve.name,
            "label": curve.label,
            "s": curve.length,
            "theta_degrees": [round(value, 4) for value in curve.theta_T[::16].tolist()],
            "psi_slope": curve.slope_T[::16].tolist(),
            "loss_slope": curve.gradient_T[::16].tolist(),
        }
        for group in groups
        for curve in group.curves
    ]


def _write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path


def _write_captions(folder: Path, drawn: Sequence[Drawn]) -> Path:
    """Into captions.md, beside those of figures that another command has written there."""
    path = folder / "captions.md"
    known: dict[str, str] = {}
    if path.is_file():
        for block in path.read_text().split("\n\n"):
            name, separator, caption = block.strip().partition(": ")
            if separator:
                known[name.strip("*")] = caption
    known |= {one.name: one.caption for one in drawn}
    write_file(path, "\n\n".join(f"**{name}**: {caption}" for name, caption in known.items()) + "\n")
    return path
