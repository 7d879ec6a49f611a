"""Figures of trained embeddings: features, centres and boundaries in the plane and on the sphere, and their angles.

Legend: N samples, C classes, M centres, D = 2 or 3 dimensions, G points of a grid.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from trainer.evaluation.plots import COLOURS, DOUBLE, GREY, PALE, paper_style
from trainer.figures.digits import Trained
from trainer.objective.geometry import of_length

Matrix = NDArray[np.float64]

GRID = 320  # points along each axis on which decision boundaries are found
RING = (0.80, 0.985)  # radii between which the samples of an angular panel lie
TURN = (np.radians(25), np.radians(-35))  # how the sphere is seen: elevation and azimuth
BIN = 4  # degrees, of the angles' histograms
ANGLE_COLUMNS = 4

# One colour and one marker for each of up to ten classes; neighbours differ in lightness as well.
CLASS_COLOURS = (
    *("#332288", "#E69F00", "#117733", "#88CCEE", "#882255"),
    *("#B8A22E", "#CC6677", "#1B7F79", "#AA4499", "#666666"),
)
CLASS_MARKERS = "o^svD<P>Xp"


def geometry_figure(panels: Sequence[Trained]) -> Figure:
    """The panels side by side: the plane for D = 2, both halves of the unit sphere for D = 3.

    In the plane: samples, class centres as arrows, boundaries as lines; angular losses on the unit circle, where the
    distance from it within the ring means nothing. On the sphere only directions are drawn; samples of the half that is
    turned away are seen in the right-hand disc, as through glass. A slanted cross is a centre of a centre loss, in the
    plane at its own place; an upright one on the sphere is a class centre, which in the plane is an arrow.
    """
    dimension = panels[0].test_ND.shape[1]
    columns = min(_columns(len(panels), dimension), len(panels))
    rows = -(-len(panels) // columns)
    cell = DOUBLE / columns
    height = rows * (cell + 0.30 if dimension == 2 else cell / 2 + 0.36) + 0.05
    with paper_style():
        figure = Figure(figsize=(DOUBLE, height))
        grid = figure.subplots(rows, columns, squeeze=False)
        figure.subplots_adjust(left=0.005, right=0.995, bottom=0.13 / height, top=1 - 0.2 / height)
        figure.subplots_adjust(wspace=0.04, hspace=0.36 / (cell if dimension == 2 else cell / 2))
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw(axes, panel, dimension)
    return figure


def _columns(panels: int, dimension: int) -> int:
    """As many as leave the fewest cells empty; globes are twice as wide as circles."""
    if dimension == 3:
        return 2 if panels in (1, 2, 4) else 3
    return min((4, 5, 3), key=lambda columns: -panels % columns)


def _draw(axes: Axes, panel: Trained, dimension: int) -> None:
    axes.set_title(panel.title)
    if dimension == 3:
        _sphere(axes, panel)
    elif panel.angular:
        _circle(axes, panel)
    else:
        _plane(axes, panel)
    by_centres = panel.accuracy_by_centres()
    note = f"test accuracy {100 * (panel.accuracy_by_means() if by_centres is None else by_centres):.1f} %"
    axes.text(0.5, -0.01, note, transform=axes.transAxes, ha="center", va="top", fontsize=7, color="#333333")


def _plane(axes: Axes, panel: Trained) -> None:
    """Features and learned centres as they are; the arrows are half as long as the median feature."""
    x_ND = panel.test_ND
    reach = float(np.quantile(np.linalg.norm(x_ND, axis=1), 0.99)) * 1.22
    if panel.learned_CD is not None:
        reach = max(reach, 1.1 * float(np.linalg.norm(panel.learned_CD, axis=1).max()))
    side = np.linspace(-reach, reach, GRID)
    grid_GD = np.stack(np.meshgrid(side, side), axis=2).reshape(-1, 2)
    _boundaries(axes, side, side, panel.scores(grid_GD).reshape(GRID, GRID, -1), None)
    _samples(axes, x_ND, panel.test_labels_N, 7)
    length = 0.5 * float(np.median(np.linalg.norm(x_ND, axis=1)))
    _arrows(axes, panel.centres_MD, length)
    if panel.learned_CD is not None:
        _crosses(axes, panel.learned_CD, 6)
    for label, direction_D in _name_directions(x_ND, panel.test_labels_N).items():
        along_N = x_ND[panel.test_labels_N == label] @ direction_D
        far = min(float(np.quantile(along_N, 0.98)) + 0.1 * reach, 0.95 * reach)
        _name(axes, far * direction_D, label)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")


def _circle(axes: Axes, panel: Trained) -> None:
    """Directions on the unit circle: rays of the centres inside, samples in a ring, boundaries through it."""
    unit_ND = of_length(panel.test_ND, 1.0)
    axes.add_patch(Circle((0, 0), 1.0, fill=False, linewidth=0.6, edgecolor=GREY))
    turn_G = np.linspace(-np.pi, np.pi, 3601)
    decided_G = panel.scores(np.stack([np.cos(turn_G), np.sin(turn_G)], axis=1)).argmax(axis=1)
    for at in np.flatnonzero(decided_G[1:] != decided_G[:-1]):
        middle = (turn_G[at] + turn_G[at + 1]) / 2
        ray = np.array([0.16, 1.06])
        axes.plot(ray * np.cos(middle), ray * np.sin(middle), color=GREY, linewidth=0.6, linestyle=(0, (4, 2)))
    # Golden-ratio steps spread the samples over the ring without two runs differing.
    jitter_N = RING[0] + (RING[1] - RING[0]) * (np.arange(len(unit_ND)) * 0.6180339887498949 % 1)
    _samples(axes, unit_ND * jitter_N[:, None], panel.test_labels_N, 5)
    _arrows(axes, panel.centres_MD, 0.74)
    if panel.learned_CD is not None:
        _crosses(axes, sum(RING) / 2 * of_length(panel.learned_CD, 1.0), 5)
    for label, direction_D in _name_directions(unit_ND, panel.test_labels_N).items():
        _name(axes, 1.13 * direction_D, label)
    axes.set(xlim=(-1.24, 1.24), ylim=(-1.24, 1.24), aspect="equal")


def _name_directions(x_ND: Matrix, labels_N: NDArray[np.int64]) -> dict[int, Matrix]:
    """The directions of the class means in the plane by class, moved apart where two names would meet."""
    classes_C = np.unique(labels_N)
    means_CD = np.stack([x_ND[labels_N == label].mean(axis=0) for label in classes_C])
    turn_C = np.arctan2(means_CD[:, 1], means_CD[:, 0])
    order_C = np.argsort(turn_C)
    sorted_C = turn_C[order_C]
    least = min(0.16, 2 * np.pi / len(classes_C))
    for _ in range(200):
        gap_C = np.roll(sorted_C, -1) - sorted_C
        gap_C[-1] += 2 * np.pi
        short_C = np.maximum(least - gap_C, 0) / 2
        sorted_C = sorted_C - short_C + np.roll(short_C, 1)
    turn_C[order_C] = sorted_C
    return dict(zip(classes_C.tolist(), np.stack([np.cos(turn_C), np.sin(turn_C)], axis=1), strict=True))


def _sphere(axes: Axes, panel: Trained) -> None:
    """Two discs: the near half of the unit sphere, and the far half as it is seen through the near one."""
    unit_ND = of_length(panel.test_ND, 1.0)
    turned_ND = unit_ND @ _view().T
    centres_MD = of_length(panel.centres_MD, 1.0) @ _view().T
    learned_MD = centres_MD[:0] if panel.learned_CD is None else of_length(panel.learned_CD, 1.0) @ _view().T
    length = float(np.median(np.linalg.norm(panel.test_ND, axis=1)))
    for middle, near in ((-1.06, True), (1.06, False)):
        sign = 1.0 if near else -1.0
        disc = Circle((middle, 0), 1.0, facecolor="#FBFBFB", linewidth=0.6, edgecolor=GREY, zorder=0)
        axes.add_patch(disc)
        _graticule(axes, middle, sign)
        side = np.linspace(-1, 1, GRID)
        flat_GG = np.meshgrid(side, side)
        depth_GG = 1 - flat_GG[0] ** 2 - flat_GG[1] ** 2
        rim_GG = np.sqrt(np.maximum(flat_GG[0] ** 2 + flat_GG[1] ** 2, 1.0))
        # Outside the disc its rim goes on, so that boundaries reach the edge, where the disc cuts them off.
        towards_GG = sign * np.sqrt(np.maximum(depth_GG, 0))
        seen_G3 = np.stack([towards_GG, flat_GG[0] / rim_GG, flat_GG[1] / rim_GG], axis=2).reshape(-1, 3)
        scores = panel.scores(length * seen_G3 @ _view()).reshape(GRID, GRID, -1)
        _boundaries(axes, side + middle, side, scores, disc)
        half_N = (turned_ND[:, 0] > 0) == near
        _samples(axes, turned_ND[half_N][:, 1:] + [middle, 0], panel.test_labels_N[half_N], 5)
        half_M = (centres_MD[:, 0] > 0) == near
        at_M2 = centres_MD[half_M][:, 1:] + [middle, 0]
        axes.plot(*at_M2.T, linestyle="", marker="+", color="white", markersize=6.5, markeredgewidth=2.2, zorder=5)
        axes.plot(*at_M2.T, linestyle="", marker="+", color="black", markersize=6, markeredgewidth=0.9, zorder=6)
        if panel.learned_CD is not None:
            _crosses(axes, learned_MD[(learned_MD[:, 0] > 0) == near][:, 1:] + [middle, 0], 5)
        crosses_MD = np.concatenate([centres_MD, learned_MD])
        _names_on_disc(axes, turned_ND, panel.test_labels_N, crosses_MD, middle=middle, near=near)
    axes.set(xlim=(-2.12, 2.12), ylim=(-1.06, 1.06), aspect="equal")


def _names_on_disc(
    axes: Axes, turned_ND: Matrix, labels_N: NDArray[np.int64], centres_MD: Matrix, *, middle: float, near: bool
) -> None:
    """Each class's name near its mean direction, where it covers neither samples nor centres nor other names."""
    half_N = (turned_ND[:, 0] > 0) == near
    crosses_M2 = centres_MD[(centres_MD[:, 0] > 0) == near][:, 1:]
    arms_42 = np.array([[0.05, 0.0], [-0.05, 0.0], [0.0, 0.05], [0.0, -0.05]])
    taken_M2 = np.concatenate([turned_ND[half_N][:, 1:], (crosses_M2[:, None] + arms_42).reshape(-1, 2)])
    turns = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    ways_G2 = np.concatenate([far * np.stack([np.cos(turns), np.sin(turns)], axis=1) for far in (0.14, 0.2, 0.27)])
    for label in np.unique(labels_N):
        mean_D = turned_ND[labels_N == label].mean(axis=0)
        mean_D = mean_D / max(float(np.linalg.norm(mean_D)), 1e-12)
        if (mean_D[0] > 0) != near:
            continue
        places_G2 = mean_D[1:] + ways_G2
        places_G2 = places_G2[np.linalg.norm(places_G2, axis=1) < 0.94]
        free_G = np.linalg.norm(places_G2[:, None] - taken_M2, axis=2).min(axis=1)
        away_G = np.linalg.norm(places_G2 - mean_D[1:], axis=1)
        x, y = places_G2[np.argmax(np.minimum(free_G, 0.13) - 0.15 * away_G)]
        taken_M2 = np.concatenate([taken_M2, [[x, y], [x - 0.05, y], [x + 0.05, y]]])
        _name(axes, np.array([x + middle, y]), int(label))


def _view() -> Matrix:
    """Rows: towards the viewer, right, up."""
    elevation, azimuth = TURN
    towards = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    right = np.array([-np.sin(azimuth), np.cos(azimuth), 0.0])
    return np.stack([towards, right, np.cross(towards, right)])


def _graticule(axes: Axes, middle: float, sign: float) -> None:
    """Circles of latitude and longitude, every 30 degrees."""
    along = np.linspace(0, 2 * np.pi, 241)
    circles = []
    for latitude in np.radians(np.arange(-60, 61, 30)):
        ring = np.stack([np.cos(along), np.sin(along), np.full_like(along, np.tan(latitude))], axis=1)
        circles.append(ring * np.cos(latitude))
    for longitude in np.radians(np.arange(0, 180, 30)):
        flat = np.cos(along)
        circles.append(np.stack([flat * np.cos(longitude), flat * np.sin(longitude), np.sin(along)], axis=1))
    for circle in circles:
        turned = circle @ _view().T
        hidden = sign * turned[:, 0] < 0
        turned[hidden] = np.nan
        axes.plot(turned[:, 1] + middle, turned[:, 2], color=PALE, linewidth=0.4, zorder=0.5)


def _boundaries(axes: Axes, x: Matrix, y: Matrix, scores_GGC: Matrix, clip: Circle | None) -> None:
    """Where the best class is as good as the second: one line for each pair of neighbours."""
    classes = scores_GGC.shape[2]
    best_GG = scores_GGC.argmax(axis=2)
    for label in np.unique(best_GG):
        others = scores_GGC[:, :, np.arange(classes) != label].max(axis=2)
        lead_GG = scores_GGC[:, :, label] - others
        lines = axes.contour(x, y, lead_GG, levels=[0.0], colors=[GREY], linewidths=0.6, zorder=1)
        if clip is not None:
            lines.set_clip_path(clip)


def _samples(axes: Axes, points_N2: Matrix, labels_N: NDArray[np.int64], size: float) -> None:
    for label in np.unique(labels_N):
        x_n, y_n = points_N2[labels_N == label].T
        marker, colour = CLASS_MARKERS[int(label) % 10], CLASS_COLOURS[int(label) % 10]
        axes.scatter(x_n, y_n, s=size, marker=marker, facecolor=colour, edgecolor="white", linewidth=0.15, zorder=3)


def _arrows(axes: Axes, centres_MD: Matrix, length: float) -> None:
    style = "-|>,head_length=0.28,head_width=0.14"
    arrow = {"arrowstyle": style, "linewidth": 0.7, "color": "black", "shrinkA": 0, "shrinkB": 0}
    for x, y in length * of_length(centres_MD, 1.0):
        axes.annotate("", (x, y), (0, 0), arrowprops=arrow, zorder=4)


def _crosses(axes: Axes, places_M2: Matrix, size: float) -> None:
    """Slanted black crosses with a white rim, above samples and arrows; the size is in points."""
    for colour, length, width, layer in (("white", size + 1.5, 3.2, 5), ("black", size, 1.5, 6)):
        axes.plot(
            *places_M2.T, linestyle="", marker="x", color=colour, markersize=length, markeredgewidth=width, zorder=layer
        )


def _name(axes: Axes, place_2: Matrix, label: int) -> None:
    rim = [withStroke(linewidth=1.6, foreground="white")]
    x, y = place_2.tolist()
    text = axes.text(x, y, str(label), ha="center", va="center_baseline", zorder=7, path_effects=rim)
    text.set(fontsize=7.5, fontweight="bold", color="black", clip_on=False)


def angle_figure(panels: Sequence[Trained]) -> Figure:
    """Of each panel the angles between samples and their own class mean, and between any two class means.

    Raises:
        UserError: fewer than two classes, or an embedding of length zero.
    """
    columns = min(ANGLE_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    height = rows * 1.18 + 0.42
    with paper_style():
        figure = Figure(figsize=(DOUBLE, height))
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        figure.subplots_adjust(left=0.07, right=0.985, bottom=0.36 / height, top=1 - 0.34 / height)
        figure.subplots_adjust(wspace=0.22, hspace=0.42)
        for place, (axes, panel) in enumerate(zip(grid.flat, panels, strict=False)):
            _draw_angles(axes, panel, lowest=place + columns >= len(panels))
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper right", ncols=2, bbox_to_anchor=(0.99, 1.0), borderaxespad=0.1)
        for axes in grid[:, 0]:
            axes.set_ylabel("share")
        figure.align_ylabels(grid[:, 0])
    return figure


def _draw_angles(axes: Axes, panel: Trained, lowest: bool) -> None:
    measured = panel.angles()
    edges = np.arange(0, 181, BIN)
    intra = np.histogram(measured.intra_N, edges)[0] / len(measured.intra_N)
    pairs = measured.inter_histogram.reshape(-1, BIN).sum(axis=1)
    inter = pairs / pairs.sum()
    axes.stairs(intra, edges, fill=True, color="#BBBBBB", label="sample to its class mean")
    hatched = axes.stairs(inter, edges, fill=True, label="between class means", hatch="//////", linewidth=0.7)
    hatched.set(facecolor="none", edgecolor=COLOURS[1])
    axes.axvline(measured.inter_smallest, color=COLOURS[2], linewidth=0.9, linestyle=(0, (2, 1)))
    axes.set_title(panel.title)
    axes.set(xlim=(0, 180), ylim=(0, 1.12 * max(float(intra.max()), float(inter.max()))))
    axes.set_xticks([0, 45, 90, 135, 180])
    axes.tick_params(labelbottom=lowest)
    axes.locator_params(axis="y", nbins=3)
    axes.yaxis.set_major_formatter(PercentFormatter(1, 0, symbol=" %"))
    note = f"intra {measured.intra_mean:.1f}°\nleast inter {measured.inter_smallest:.1f}°"
    text = axes.text(0.99, 0.97, note, transform=axes.transAxes, ha="right", va="top")
    text.set(fontsize=6.5, linespacing=1.15)
    if lowest:
        axes.set_xlabel("angle in degrees")
