"""The figures of the geometry of losses: digits trained, curves computed, figures drawn and captioned.

Beside the figures (PDF and PNG) lie `captions.md`, the tables as Markdown and JSON, and the numbers as JSON.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import digits
from trainer.config import Config
from trainer.digits import Trained
from trainer.errors import UserError
from trainer.evaluation.plots_angles import angle_figure
from trainer.evaluation.plots_geometry import Panel, geometry_figure
from trainer.evaluation.plots_margins import (
    CurveGroup,
    boundary_markdown,
    boundary_plane_figure,
    boundary_records,
    boundary_table_figure,
    gradient_figure,
    negatives_figure,
    psi_figure,
)
from trainer.evaluation.plots_style import save
from trainer.losses import by_name
from trainer.margin_boundaries import boundary_rows
from trainer.margin_curves import CLASSES, RAW_LENGTH, curve_groups, negative_curves

FAMILIES = ("softmax", "margin", "pair", "centre")
MULTIPLES = (1, 2, 3, 4)
LEARNED = 0.7  # below this accuracy the caption says that a loss has not learned to tell the digits apart
_L_SOFTMAX = "l_softmax"
_TITLES: Mapping[str, str] = {
    "weighted_softmax": "weighted softmax",
    "modified_softmax": "modified softmax",
    "l_softmax": "L-Softmax",
    "a_softmax": "A-Softmax",
    "l2_softmax": "$L_2$-softmax",
    "normface": "NormFace",
    "coco": "CoCo",
    "cosface": "CosFace",
    "arcface": "ArcFace",
    "sub_center_arcface": "sub-centre ArcFace",
    "adaface": "AdaFace",
    "magface": "MagFace",
    "elasticface": "ElasticFace",
    "dynamic": "dynamic margin",
    "curricularface": "CurricularFace",
    "mv_softmax": "MV-softmax",
    "tse": "softmax, then TSE",
    "tpe": "softmax, then TPE",
    "center": "softmax + centre",
    "center_invariant": "softmax + centre-invariant",
    "range": "softmax + range",
}

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
    folder: Path, losses: Sequence[str], dimensions: Sequence[int], steps: int, seed: int, show: Show
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
            total = len(wanted.members) * steps
            for place, (_, config) in enumerate(wanted.members):
                stage, before = f"{wanted.name}, {dimension}-D", place * steps

                def tell(step: int, _: int, stage: str = stage, before: int = before, total: int = total) -> None:
                    show(stage, before + step, total)

                trained.append(digits.train(config, steps, seed, split, tell))
                numbers.append(_numbers(wanted.name, dimension, config, trained[-1]))
            drawn += _draw_family(folder, wanted, trained, dimension, steps, seed)
    margins = _draw_margins(folder)
    drawn += margins.figures
    numbers_file = _write_json(folder / "geometry.json", {"steps": steps, "seed": seed, "embeddings": numbers})
    return Written(tuple(drawn), (*margins.beside, numbers_file, _write_captions(folder, drawn)))


def gradients(folder: Path) -> Written:
    """Draw dL/dcos(theta) over theta for every margin; the numbers are written beside it."""
    groups = curve_groups()
    files = save(gradient_figure(groups), folder, "gradients")
    numbers_file = _write_json(folder / "gradients.json", _curve_records(groups))
    drawn = Drawn("gradients", tuple(files), _gradient_caption(groups))
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
            (_TITLES.get(name, name), digits.settings(name, dimension, steps))
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


def _draw_family(
    folder: Path, wanted: _Wanted, trained: Sequence[Trained], dimension: int, steps: int, seed: int
) -> list[Drawn]:
    panels = [_panel(title, one, dimension) for (title, _), one in zip(wanted.members, trained, strict=True)]
    suffix = f"{wanted.name}_{dimension}d"
    about = (
        f"Test digits of scikit-learn's load_digits, embedded in {dimension} dimensions by a small network trained "
        f"under {wanted.what} ({steps} steps, seed {seed}; constants in geometry.json)."
    )
    if dimension == 2:
        how = (
            "Arrows: directions of the class centres, or of the class means where the loss has no centres. "
            f"{_about_learned(panels, dimension)}Grey lines: where two classes' scores without margin are equal. "
            "Losses for which only the direction counts are drawn on the unit circle, where the place within the ring "
            "means nothing."
        )
    else:
        how = (
            "Directions on the unit sphere: left the near half, right the far half as seen through it. Upright "
            "crosses: class centres, or class means where the loss has no centres. "
            f"{_about_learned(panels, dimension)}Grey lines: where two classes' scores without margin are equal, for "
            "embeddings of the median length."
        )
    lost = [panel.title for panel, one in zip(panels, trained, strict=True) if one.accuracy_by_means() < LEARNED]
    if lost:
        how += f" Not learned with these constants: {', '.join(lost)}."
    angles = (
        f"Angles of the embeddings of geometry_{suffix}: each test sample to the mean direction of its class, and any "
        "two class means to each other. Dashed: the smallest angle between two class means."
    )
    geometry_files = save(geometry_figure(panels), folder, f"geometry_{suffix}")
    angle_files = save(angle_figure(panels), folder, f"angles_{suffix}")
    return [
        Drawn(f"geometry_{suffix}", tuple(geometry_files), f"{about} {how}"),
        Drawn(f"angles_{suffix}", tuple(angle_files), angles),
    ]


def _about_learned(panels: Sequence[Panel], dimension: int) -> str:
    """What tells a centre loss's own centres from the rows of the softmax beside it; nothing where none are drawn."""
    names = " and ".join(panel.title for panel in panels if panel.learned_CD is not None)
    if not names:
        return ""
    if dimension == 2:
        return (
            "The arrows of this family are the softmax's rows. Crosses: the centres that the centre loss itself learns "
            f"in {names}, at their place among the features. "
        )
    return (
        "The upright crosses of this family are the softmax's rows. Slanted crosses: the directions of the centres "
        f"that the centre loss itself learns in {names}. "
    )


def _panel(title: str, trained: Trained, dimension: int) -> Panel:
    by_centres = trained.accuracy_by_centres()
    accuracy = trained.accuracy_by_means() if by_centres is None else by_centres
    if trained.centres is None:
        directions_MD = trained.mean_directions_CD
    else:
        directions_MD = trained.centres.rows_CKD.reshape(-1, dimension)
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
        "loss": config.loss.model_dump(mode="json"),
        "auxiliary": [spec.model_dump(mode="json") for spec in config.auxiliary],
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
    table.write_text(boundary_markdown(rows))
    records = _write_json(folder / "boundaries.json", boundary_records(rows))
    parts = [
        ("psi", psi_figure(groups), _psi_caption(groups)),
        (
            "negatives",
            negatives_figure(negatives),
            "What CurricularFace (at three values of its running mean t) and MV-softmax make of the cosine between a "
            "sample and another class's centre, where that class is hard: its cosine exceeds the target's.",
        ),
        (
            "boundaries",
            boundary_table_figure(rows),
            f"Binary decision boundaries. Numbers: two centres {rows[0].apart_degrees:g}° apart, a sample between them "
            "in their plane at θ₁ from the first; class 1 is decided with its margin up to the boundary, and the gap "
            "between the boundaries of both classes belongs to neither. The boundary of class 2 is the mirror image.",
        ),
        (
            "boundary_planes",
            boundary_plane_figure(rows),
            "Where class 1 (hatched) and class 2 (dotted) are decided with their margins, over the angles θ₁ and θ₂ to "
            "both centres. White belongs to neither; the dotted diagonal is the boundary without margin.",
        ),
    ]
    drawn = tuple(Drawn(name, tuple(save(figure, folder, name)), caption) for name, figure, caption in parts)
    return Written(drawn, (table, records))


def _psi_caption(groups: Sequence[CurveGroup]) -> str:
    return (
        "Above: ψ(θ), the target's logit divided by what its cosine is multiplied by. Below: the target's logit with "
        f"the papers' constants; {_lengths(groups)}."
    )


def _gradient_caption(groups: Sequence[CurveGroup]) -> str:
    return (
        "Above: dψ/dcos θ, what the margin multiplies the gradient by. Below: -dL/dcos θ of the target, divided by s, "
        f"for {CLASSES:,} classes whose other centres are all at right angles to the sample (biases 0); "
        f"{_lengths(groups)}. The loss is the cross entropy, weighted or focal where the loss is; by autograd, from "
        "the margins' own targets. Both slopes are on logarithmic axes: each downward spike is an angle at which ψ is "
        "flat. Additive angles have a pole at 0° and 180°."
    )


def _lengths(groups: Sequence[CurveGroup]) -> str:
    lengths: dict[float, list[str]] = {}
    for group in groups:
        for curve in group.curves:
            names = lengths.setdefault(curve.length, [])
            if curve.name not in names:
                names.append(curve.name)
    most = max(lengths, key=lambda length: len(lengths[length]))
    others = "; ".join(f"{length:g} for {', '.join(names)}" for length, names in lengths.items() if length != most)
    return f"s = {most:g}, but {others} (|x||w| = {RAW_LENGTH:g} where embeddings enter as they are)"


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
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
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
    path.write_text("\n\n".join(f"**{name}**: {caption}" for name, caption in known.items()) + "\n")
    return path
