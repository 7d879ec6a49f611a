"""Histograms of the angles within and between classes of trained embeddings."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from trainer.errors import UserError
from trainer.evaluation.geometry import angles
from trainer.evaluation.plots_style import COLOURS, DOUBLE, new_figure, paper_style
from trainer.figures.plot_geometry import Panel

BIN = 4  # degrees


def angle_figure(panels: Sequence[Panel], columns: int = 4, width: float = DOUBLE) -> Figure:
    """Of each panel the angles between samples and their own class mean, and between any two class means.

    Raises:
        UserError: no panels, fewer than two classes, or an embedding of length zero.
    """
    if not panels:
        raise UserError("there is nothing to draw; name a loss")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    height = rows * 1.18 + 0.42
    with paper_style():
        figure = new_figure(width, height)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        figure.subplots_adjust(
            left=0.07, right=0.985, bottom=0.36 / height, top=1 - 0.34 / height, wspace=0.22, hspace=0.42
        )
        for place, axes in enumerate(grid.flat):
            if place < len(panels):
                _draw_angles(axes, panels[place], place // columns == rows - 1 or place + columns >= len(panels))
            else:
                axes.set_axis_off()
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper right", ncols=2, bbox_to_anchor=(0.99, 1.0), borderaxespad=0.1)
        for axes in grid[:, 0]:
            axes.set_ylabel("share")
        figure.align_ylabels(grid[:, 0])
    return figure


def _draw_angles(axes: Axes, panel: Panel, lowest: bool) -> None:
    measured = angles(panel.features_ND, panel.labels_N)
    edges = np.arange(0, 181, BIN)
    intra = np.histogram(measured.intra_N, edges)[0] / len(measured.intra_N)
    pairs = measured.inter_histogram.reshape(-1, BIN).sum(axis=1)
    axes.stairs(intra, edges, fill=True, color="#BBBBBB", label="sample to its class mean")
    axes.stairs(
        pairs / pairs.sum(),
        edges,
        fill=True,
        facecolor="none",
        edgecolor=COLOURS[1],
        hatch="//////",
        linewidth=0.7,
        label="between class means",
    )
    axes.axvline(measured.inter_smallest, color=COLOURS[2], linewidth=0.9, linestyle=(0, (2, 1)))
    axes.set_title(panel.title)
    top = max(float(intra.max()), float((pairs / pairs.sum()).max()))
    axes.set_ylim(0, top * 1.12)
    axes.set_xlim(0, 180)
    axes.set_xticks([0, 45, 90, 135, 180])
    axes.tick_params(labelbottom=lowest)
    axes.locator_params(axis="y", nbins=3)
    axes.yaxis.set_major_formatter(PercentFormatter(1, 0, symbol=" %"))
    axes.text(
        0.99,
        0.97,
        f"intra {measured.intra_mean:.1f}°\nleast inter {measured.inter_smallest:.1f}°",
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=6.5,
        linespacing=1.15,
    )
    if lowest:
        axes.set_xlabel("angle in degrees")
