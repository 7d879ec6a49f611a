"""Figures of the margins themselves: psi and target logits, gradients, and the binary decision boundaries.

Legend: T angles on a grid; all angles in degrees.
"""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from trainer.evaluation.plots import COLOURS, DOUBLE, GREY, LINES, PALE, SINGLE, paper_style
from trainer.figures.margins import BoundaryRow, CurveGroup, MarginCurve, Vector

MARKERS = "os^vDP"
PLANE_COLUMNS = 4
Values = tuple[Callable[[MarginCurve], Vector], str]  # what is drawn of a curve, and the label of its axis


def psi_figure(groups: Sequence[CurveGroup]) -> Figure:
    """psi(theta) above, the target's logit below, a column for each group."""
    psi: Values = (lambda curve: curve.psi_T, r"$\psi(\theta)$")
    return _two_rows(groups, psi, (lambda curve: curve.target_T, "target logit"), logarithmic=False)


def gradient_figure(groups: Sequence[CurveGroup]) -> Figure:
    """The margin's factor d psi / d cos(theta) above, the size of dL/dcos(theta) / length below."""
    slope: Values = (lambda curve: curve.slope_T, r"$\mathrm{d}\psi/\mathrm{d}\cos\theta$")
    loss: Values = (lambda curve: -curve.gradient_T / curve.length, r"$-(\mathrm{d}L/\mathrm{d}\cos\theta)/s$")
    return _two_rows(groups, slope, loss, logarithmic=True)


def negatives_figure(group: CurveGroup) -> Figure:
    """What re-weighting makes of the cosine of a hard negative; the diagonal is no re-weighting."""
    with paper_style():
        figure = Figure(figsize=(SINGLE, 2.5))
        axes = figure.subplots()
        figure.subplots_adjust(left=0.13, right=0.98, bottom=0.15, top=0.97)
        axes.plot([-1, 1], [-1, 1], color=GREY, linewidth=0.7, zorder=1)
        for place, curve in enumerate(group.curves):
            _line(axes, np.cos(np.radians(curve.theta_T)), curve.psi_T, place, len(group.curves))
        axes.set(xlim=(-1, 1), xlabel=r"$\cos\theta_j$", ylabel=r"re-weighted $\cos\theta_j$")
        axes.set_xticks([-1, -0.5, 0, 0.5, 1], ["$-1$", "$-0.5$", "$0$", "$0.5$", "$1$"])
        handles = [*_handles(group.curves), Line2D([], [], color=GREY, linewidth=0.7, label="unchanged")]
        axes.legend(handles=handles, loc="upper left")
    return figure


def boundary_plane_figure(rows: Sequence[BoundaryRow]) -> Figure:
    """The plane of both angles: where class 1 and class 2 are decided with their margins; between them is neither.

    Rows with the same regions share a panel; a note says which.
    """
    shared: dict[tuple[tuple[float, float], ...], list[BoundaryRow]] = {}
    for row in rows:
        shared.setdefault(tuple((a, round(b, 6)) for a, b in row.region_degrees), []).append(row)
    panels, columns = list(shared.values()), PLANE_COLUMNS
    count = -(-(len(panels) + 1) // columns)
    height = count * 1.86 + 0.34
    with paper_style():
        figure = Figure(figsize=(DOUBLE, height))
        grid = figure.subplots(count, columns, squeeze=False, sharex=True, sharey=True)
        figure.subplots_adjust(left=0.06, right=0.985, bottom=0.42 / height, top=1 - 0.32 / height)
        figure.subplots_adjust(wspace=0.12, hspace=0.34)
        for place, (axes, same) in enumerate(zip(grid.flat, panels, strict=False)):
            _plane(axes, same[0])
            axes.tick_params(labelbottom=place + columns >= len(panels))
            if place + columns >= len(panels):
                axes.set_xlabel(r"$\theta_1$ in degrees")
            if place % columns == 0:
                axes.set_ylabel(r"$\theta_2$ in degrees")
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        _note_shared(grid.flat[len(panels)], panels)
    return figure


def _note_shared(axes: Axes, panels: Sequence[Sequence[BoundaryRow]]) -> None:
    lines: list[str] = []
    labels = [row.label for same in panels for row in same]
    for same in panels:
        others = list(dict.fromkeys(row.label for row in same[1:]))
        if others:
            setting = f", {same[0].setting.split(', ')[0]}" if labels.count(same[0].label) > 1 else ""
            lines += textwrap.wrap(f"As {same[0].label}{setting}: {', '.join(others)}.", 34, subsequent_indent="   ")
    axes.text(0.0, 0.98, "\n".join(lines), transform=axes.transAxes, va="top", fontsize=7, linespacing=1.35)


def boundary_table_figure(rows: Sequence[BoundaryRow]) -> Figure:
    """The table of binary decision boundaries, with rules as books set them."""
    line, top = 0.185, 0.52
    height = top + line * len(rows) + 0.1
    heads = (
        (0.01, "left", "loss"),
        (0.185, "left", "decision boundary of class 1"),
        (0.575, "left", "numbers for"),
        (0.865, "right", "boundary"),
        (0.99, "right", "gap"),
    )
    with paper_style():
        figure = Figure(figsize=(DOUBLE, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, 1), ylim=(height, 0))
        for x, side, text in heads:
            axes.text(x, top - 0.14, text, ha=side, va="baseline", fontweight="bold")
        apart = rows[0].apart_degrees
        axes.text(0.99, 0.16, f"centres {apart:g}° apart", ha="right", va="baseline", fontsize=7, color="#333333")
        for y, width in ((0.22, 0.9), (top - 0.06, 0.5), (height - 0.06, 0.9)):
            axes.plot([0.005, 0.995], [y, y], color="black", linewidth=width)
        for place, row in enumerate(rows):
            y = top + line * (place + 0.62)
            known = row.boundary_degrees is not None
            cells = (
                "" if place and rows[place - 1].label == row.label else row.label,
                f"${row.tex}$",
                row.setting,
                rf"$\theta_1={row.boundary_degrees:.1f}°$" if known else "none",
                f"${row.gap_degrees:.1f}°$" if known else "none",
            )
            for (x, side, _), text in zip(heads, cells, strict=True):
                axes.text(x, y, text, ha=side, va="baseline")
    return figure


def _two_rows(groups: Sequence[CurveGroup], above: Values, below: Values, logarithmic: bool) -> Figure:
    columns, most = len(groups), max(len(group.curves) for group in groups)
    legend = 0.128 * most + 0.1
    height = 3.35 + legend
    with paper_style():
        figure = Figure(figsize=(DOUBLE, height))
        grid = figure.subplots(2, columns, squeeze=False, sharex=True, sharey="row" if logarithmic else False)
        figure.subplots_adjust(left=0.07, right=0.985, bottom=(legend + 0.42) / height, top=1 - 0.22 / height)
        figure.subplots_adjust(wspace=0.14 if logarithmic else 0.34, hspace=0.10)
        for column, group in enumerate(groups):
            for axes, (values, label) in zip(grid[:, column], (above, below), strict=True):
                for place, curve in enumerate(group.curves):
                    _line(axes, curve.theta_T, values(curve), place, len(group.curves))
                _angle_axis(axes, logarithmic)
                if column == 0:
                    axes.set_ylabel(label)
            grid[0, column].set_title(group.title)
            grid[1, column].set_xlabel(r"$\theta$ in degrees")
            _legend_below(grid[1, column], group)
        if logarithmic:
            grid[0, 0].set_ylim(0.08, 40)
            grid[1, 0].set_ylim(0.003, 40)
        figure.align_ylabels(grid[:, 0])
    return figure


def _legend_below(axes: Axes, group: CurveGroup) -> None:
    spacing = {"borderaxespad": 0, "labelspacing": 0.25, "handlelength": 2.4, "handletextpad": 0.5}
    axes.legend(handles=_handles(group.curves), loc="upper left", bbox_to_anchor=(-0.06, -0.3), fontsize=6.3, **spacing)


def _angle_axis(axes: Axes, logarithmic: bool) -> None:
    axes.set_xlim(0, 180)
    axes.set_xticks([0, 90, 180])
    axes.set_xticks([45, 135], minor=True)
    axes.grid(color=PALE, linewidth=0.4)
    axes.set_axisbelow(True)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())


def _line(axes: Axes, x: Vector, y: Vector, place: int, among: int) -> None:
    """A curve with its line style, and markers set off from those of the curves beside it."""
    step = len(x) // 6
    axes.plot(x, y, markevery=(step // 2 + place * step // among, step), zorder=3 + place, **_style(place))


def _handles(curves: Sequence[MarginCurve]) -> list[Line2D]:
    return [Line2D([], [], label=curve.label, **_style(place)) for place, curve in enumerate(curves)]


def _style(place: int) -> dict[str, Any]:
    """Of the curve at this place, told from the others' without colour."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": LINES[place % len(LINES)],
        "marker": MARKERS[place % len(MARKERS)],
        "markersize": 3,
        "markerfacecolor": "white",
        "markeredgewidth": 0.7,
    }


def _plane(axes: Axes, row: BoundaryRow) -> None:
    theta_1, least_2 = np.array(row.region_degrees).T
    axes.fill_between(theta_1, least_2, 180, facecolor="#D6E4F0", edgecolor="#0072B2", hatch="////", linewidth=0)
    axes.fill_betweenx(theta_1, least_2, 180, facecolor="#F6E3D3", edgecolor="#D55E00", hatch="....", linewidth=0)
    axes.plot(theta_1, least_2, color="#0072B2", linewidth=1.2)
    axes.plot(least_2, theta_1, color="#D55E00", linewidth=1.2, linestyle=(0, (4, 1.5)))
    axes.plot([0, 180], [0, 180], color=GREY, linewidth=0.5, linestyle=(0, (1, 2)))
    box = {"facecolor": "white", "edgecolor": "none", "boxstyle": "round,pad=0.12"}
    axes.text(0.04, 0.95, "1", transform=axes.transAxes, va="top", fontsize=8, fontweight="bold", bbox=box)
    axes.text(0.96, 0.05, "2", transform=axes.transAxes, ha="right", fontsize=8, fontweight="bold", bbox=box)
    axes.set_title(row.label + (f", {row.setting}" if row.setting else ""), fontsize=7.5)
    axes.set(xlim=(0, 180), ylim=(0, 180), aspect="equal")
    axes.set(xticks=[0, 45, 90, 135, 180], yticks=[0, 45, 90, 135, 180])
