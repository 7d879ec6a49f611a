"""What stands below the figures of the geometry of losses: what is drawn, how, and with which constants."""

from collections.abc import Sequence

from trainer.figures.boundaries import BoundaryRow
from trainer.figures.curves import CLASSES, RAW_LENGTH, CurveGroup
from trainer.figures.plot_geometry import Panel

BOUNDARY_PLANES = (
    "Where class 1 (hatched) and class 2 (dotted) are decided with their margins, over the angles θ₁ and θ₂ to both "
    "centres. White belongs to neither; the dotted diagonal is the boundary without margin."
)


def of_family(
    what: str, panels: Sequence[Panel], not_learned: Sequence[str], *, dimension: int, steps: int, seed: int
) -> str:
    """Below the embeddings of a family.

    Args:
        what: the family, for people.
        not_learned: titles of the panels whose loss has not learned to tell the digits apart.
    """
    about = (
        f"Test digits of scikit-learn's load_digits, embedded in {dimension} dimensions by a small network trained "
        f"under {what} ({steps} steps, seed {seed}; constants in geometry.json)."
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
    if not_learned:
        how += f" Not learned with these constants: {', '.join(not_learned)}."
    return f"{about} {how}"


def of_angles(geometry: str) -> str:
    """Below the histograms of angles that belong to the figure `geometry_<geometry>`."""
    return (
        f"Angles of the embeddings of geometry_{geometry}: each test sample to the mean direction of its class, and "
        "any two class means to each other. Dashed: the smallest angle between two class means."
    )


def of_boundaries(rows: Sequence[BoundaryRow]) -> str:
    """Below the table of binary decision boundaries."""
    return (
        f"Binary decision boundaries. Numbers: two centres {rows[0].apart_degrees:g}° apart, a sample between them "
        "in their plane at θ₁ from the first; class 1 is decided with its margin up to the boundary, and the gap "
        "between the boundaries of both classes belongs to neither. The boundary of class 2 is the mirror image."
    )


def of_negatives(group: CurveGroup) -> str:
    """Below the curves of re-weighted negatives."""
    margins = " and ".join(dict.fromkeys(curve.label.partition(", ")[0] for curve in group.curves))
    return (
        f"What {margins} make of the cosine between a sample and another class's centre, where that class is hard: "
        "its cosine exceeds the target's."
    )


def of_psi(groups: Sequence[CurveGroup]) -> str:
    """Below the curves of psi(theta) and of the target's logit."""
    return (
        "Above: ψ(θ), the target's logit divided by what its cosine is multiplied by. Below: the target's logit with "
        f"the papers' constants; {_lengths(groups)}."
    )


def of_gradients(groups: Sequence[CurveGroup]) -> str:
    """Below the curves of dL/dcos(theta)."""
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
