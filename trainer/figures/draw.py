"""The figures of the geometry of losses: digits trained, curves computed, figures drawn and captioned.

Beside the figures (PDF and PNG) lie `captions.md`, the tables as Markdown and JSON, and the numbers as JSON.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from matplotlib.figure import Figure

from trainer.atomic import write_file
from trainer.config import Config
from trainer.errors import UserError
from trainer.evaluation.plots import save
from trainer.figures import digits, plot_margins
from trainer.figures.digits import Trained
from trainer.figures.margins import (
    CLASSES,
    RAW_LENGTH,
    CurveGroup,
    boundary_markdown,
    boundary_records,
    boundary_rows,
    curve_groups,
    negative_curves,
)
from trainer.figures.plot_geometry import angle_figure, geometry_figure
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
    files: list[Path]
    caption: str


@dataclass(frozen=True)
class Written:
    """All that a command wrote into its folder: the figures, and the captions, tables and numbers beside them."""

    figures: Sequence[Drawn]
    beside: Sequence[Path]

    @property
    def files(self) -> list[Path]:
        return [*(path for figure in self.figures for path in figure.files), *self.beside]


def geometry(
    folder: Path, losses: Sequence[str], dimensions: Sequence[int], *, steps: int, seed: int, show: Show
) -> Written:
    """Train losses on the digits in every dimension, and draw a figure for each family; then the margins' curves and
    the table of binary decision boundaries.

    Args:
        losses: names, as `check_losses` gives them.
        dimensions: 2, 3 or both.
        show: called with (stage, done, total).

    Raises:
        UserError: other dimensions.
    """
    if wrong := [dimension for dimension in dimensions if dimension not in (2, 3)]:
        raise UserError(f"an embedding of {wrong[0]} dimensions cannot be drawn; choose 2 or 3")
    drawn: list[Drawn] = []
    numbers: list[dict[str, Any]] = []
    split = digits.load(seed)
    for dimension in dimensions:
        for family, what, members in _wanted(losses, dimension, steps):
            name, trained = f"{family}_{dimension}d", []
            for place, (title, config) in enumerate(members):
                show(f"{family}, {dimension}-D", place, len(members))
                trained.append(replace(digits.train(config, steps, seed, split), title=title))
                numbers.append(_numbers(f"geometry_{name}", config, trained[-1]))
            show(f"{family}, {dimension}-D", len(members), len(members))
            about = (
                f"Test digits of scikit-learn's load_digits, embedded in {dimension} dimensions by a small network "
                f"trained under {what} ({steps} steps, seed {seed}; constants in geometry.json). "
            )
            drawn.append(_draw(folder, f"geometry_{name}", geometry_figure(trained), about + family_caption(trained)))
            drawn.append(_draw(folder, f"angles_{name}", angle_figure(trained), angle_caption(name)))
    margins = _draw_margins(folder)
    drawn += margins.figures
    numbers_file = _write_json(folder / "geometry.json", {"steps": steps, "seed": seed, "embeddings": numbers})
    return Written(drawn, [*margins.beside, numbers_file, _write_captions(folder, drawn)])


def gradients(folder: Path) -> Written:
    """Draw dL/dcos(theta) over theta for every margin; the numbers, every 16th point, are written beside it."""
    groups = curve_groups()
    drawn = [_draw(folder, "gradients", plot_margins.gradient_figure(groups), gradient_caption(groups))]
    records = [
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
    return Written(drawn, [_write_json(folder / "gradients.json", records), _write_captions(folder, drawn)])


def check_losses(losses: Sequence[str], families: Sequence[str]) -> list[str]:
    """The names of the losses asked for, in the order of the table; all where none is asked for.

    Raises:
        UserError: a loss or a family that is not known.
    """
    known = by_name()
    for what, names, allowed in (("loss", losses, list(known)), ("family", families, FAMILIES)):
        for name in names:
            if name not in allowed:
                raise UserError(f"{what} '{name}' is not known; allowed: {', '.join(allowed)}")
    everything = not losses and not families
    return [name for name, spec in known.items() if everything or name in losses or spec.family in families]


def _wanted(losses: Sequence[str], dimension: int, steps: int) -> Iterator[tuple[str, str, list[tuple[str, Config]]]]:
    """A figure for each family that is asked for, and one of L-Softmax over m: its name, what it shows for people,
    and what is trained for each panel, by title."""
    known = by_name()
    for family in FAMILIES:
        names = [name for name in losses if known[name].family == family]
        if names:
            members = [(known[name].title, digits.settings(name, dimension, steps)) for name in names]
            yield family, f"the {family} family", members
    if _L_SOFTMAX in losses:
        members = [
            (f"L-Softmax, $m = {m}$", digits.settings(_L_SOFTMAX, dimension, steps, margin=m)) for m in MULTIPLES
        ]
        yield _L_SOFTMAX, "L-Softmax with growing m", members


def _numbers(figure: str, config: Config, trained: Trained) -> dict[str, Any]:
    measured = trained.angles()
    return {
        "figure": figure,
        "name": trained.name,
        "dimension": config.backbone.dimension,
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
    drawn = [
        _draw(folder, "psi", plot_margins.psi_figure(groups), psi_caption(groups)),
        _draw(folder, "negatives", plot_margins.negatives_figure(negatives), negatives_caption(negatives)),
        _draw(folder, "boundaries", plot_margins.boundary_table_figure(rows), BOUNDARIES.format(rows[0].apart_degrees)),
        _draw(folder, "boundary_planes", plot_margins.boundary_plane_figure(rows), BOUNDARY_PLANES),
    ]
    table = folder / "boundaries.md"
    write_file(table, boundary_markdown(rows))
    return Written(drawn, [table, _write_json(folder / "boundaries.json", boundary_records(rows))])


def _draw(folder: Path, name: str, figure: Figure, caption: str) -> Drawn:
    return Drawn(name, save(figure, folder, name), caption)


def _write_json(path: Path, content: object) -> Path:
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


BOUNDARIES = (
    "Binary decision boundaries. Numbers: two centres {:g}° apart, a sample between them in their plane at θ₁ from the "
    "first; class 1 is decided with its margin up to the boundary, and the gap between the boundaries of both classes "
    "belongs to neither. The boundary of class 2 is the mirror image."
)
BOUNDARY_PLANES = (
    "Where class 1 (hatched) and class 2 (dotted) are decided with their margins, over the angles θ₁ and θ₂ to both "
    "centres. White belongs to neither; the dotted diagonal is the boundary without margin."
)
PLANE = (
    "Arrows: directions of the class centres, or of the class means where the loss has no centres. {}Grey lines: where "
    "two classes' scores without margin are equal. Losses for which only the direction counts are drawn on the unit "
    "circle, where the place within the ring means nothing."
)
PLANE_LEARNED = (
    "The arrows of this family are the softmax's rows. Crosses: the centres that the centre loss itself learns in {}, "
    "at their place among the features. "
)
SPHERE = (
    "Directions on the unit sphere: left the near half, right the far half as seen through it. Upright crosses: class "
    "centres, or class means where the loss has no centres. {}Grey lines: where two classes' scores without margin are "
    "equal, for embeddings of the median length."
)
SPHERE_LEARNED = (
    "The upright crosses of this family are the softmax's rows. Slanted crosses: the directions of the centres that "
    "the centre loss itself learns in {}. "
)


def family_caption(panels: Sequence[Trained]) -> str:
    """How the embeddings of a family are drawn, and which losses have not learned to tell the digits apart."""
    drawn, followed = (PLANE, PLANE_LEARNED) if panels[0].test_ND.shape[1] == 2 else (SPHERE, SPHERE_LEARNED)
    learned = " and ".join(panel.title for panel in panels if panel.learned_CD is not None)
    lost = ", ".join(panel.title for panel in panels if panel.accuracy_by_means() < LEARNED)
    caption = drawn.format(followed.format(learned) if learned else "")
    return f"{caption} Not learned with these constants: {lost}." if lost else caption


def angle_caption(name: str) -> str:
    """Below the histograms of angles that belong to the figure `geometry_<name>`."""
    return (
        f"Angles of the embeddings of geometry_{name}: each test sample to the mean direction of its class, and any "
        "two class means to each other. Dashed: the smallest angle between two class means."
    )


def negatives_caption(group: CurveGroup) -> str:
    """Below the curves of re-weighted negatives."""
    margins = " and ".join(dict.fromkeys(curve.label.partition(", ")[0] for curve in group.curves))
    return (
        f"What {margins} make of the cosine between a sample and another class's centre, where that class is hard: "
        "its cosine exceeds the target's."
    )


def psi_caption(groups: Sequence[CurveGroup]) -> str:
    """Below the curves of psi(theta) and of the target's logit."""
    return (
        "Above: ψ(θ), the target's logit divided by what its cosine is multiplied by. Below: the target's logit with "
        f"the papers' constants; {_lengths(groups)}."
    )


def gradient_caption(groups: Sequence[CurveGroup]) -> str:
    """Below the curves of dL/dcos(theta)."""
    return (
        "Above: dψ/dcos θ, what the margin multiplies the gradient by. Below: -dL/dcos θ of the target, divided by s, "
        f"for {CLASSES:,} classes whose other centres are all at right angles to the sample (biases 0); "
        f"{_lengths(groups)}. The loss is the cross entropy, weighted or focal where the loss is; by autograd, from "
        "the margins' own targets. Both slopes are on logarithmic axes: each downward spike is an angle at which ψ is "
        "flat. Additive angles have a pole at 0° and 180°."
    )


def _lengths(groups: Sequence[CurveGroup]) -> str:
    lengths: dict[float, dict[str, None]] = {}  # names in order, each once
    for curve in (curve for group in groups for curve in group.curves):
        lengths.setdefault(curve.length, {})[curve.name] = None
    most = max(lengths, key=lambda length: len(lengths[length]))
    others = "; ".join(f"{length:g} for {', '.join(names)}" for length, names in lengths.items() if length != most)
    return f"s = {most:g}, but {others} (|x||w| = {RAW_LENGTH:g} where embeddings enter as they are)"
