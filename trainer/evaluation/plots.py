"""Figures for print: what all of them share, those of a Report (ROC, DET, scores, open set, CMC), a run's course.

They can be read in black and white, and need no display: the canvas comes with the format that is saved.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from io import BytesIO
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from numpy.typing import NDArray
from PIL import Image

from trainer.atomic import fresh_file
from trainer.evaluation.metrics import RESOLVED_ERRORS, SHOWN_ERRORS
from trainer.evaluation.report import AllPairs, OneShot, OpenSet, Report

SINGLE, DOUBLE = 3.5, 7.16  # inches: the widths of one and of two columns of a paper
HEIGHT = 2.75  # inches
DPI = 200  # of the PNG; the PDF is vectors

# Okabe and Ito's palette, whose colours differ under every common colour blindness; black first, no yellow on white.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
BLACK, BLUE = COLOURS[0], COLOURS[1]
GREY, PALE = "#777777", "#DDDDDD"
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.2, 1, 1.2)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)))
POINT: dict[str, Any] = {"color": BLACK, "markerfacecolor": "white", "markersize": 4.5, "zorder": 4}
COURSE_COLUMNS = 3
DEVIATE_TICKS = (1e-6, 1e-4, 1e-3, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95)

TICKS = {"labelsize": 7, "major.width": 0.6, "major.size": 2.5}
STYLE: dict[str, Any] = {
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlepad": 4,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **{f"{axis}tick.{name}": size for axis in "xy" for name, size in TICKS.items()},
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.1,
    "hatch.linewidth": 0.4,
    "pdf.fonttype": 42,  # text stays text
}


def paper_style() -> AbstractContextManager[None]:
    """The type and line widths of the figures, for what is made and saved inside."""
    return matplotlib.rc_context(STYLE)


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


def report_plots(report: Report, folder: Path) -> list[Path]:
    """Draw every figure of the report's parts into the folder, which is made where it is missing.

    Returns:
        `roc.png`, `det.png`, `scores.png`, `open_set.png` and `cmc.png`; the same report gives the same bytes.
    """
    pairs, shot, opened = report.verification, report.one_shot, report.open_set
    draws: dict[str, Callable[[Axes], None]] = {}
    if pairs is not None:
        draws |= {"roc": partial(draw_roc, found=pairs), "det": partial(draw_det, found=pairs)}
        draws["scores"] = partial(draw_scores, found=pairs, opened=opened)
    if opened is not None:
        draws["open_set"] = partial(draw_open_set, found=opened)
    if shot is not None:
        draws["cmc"] = partial(draw_cmc, found=shot)
    return draw_all(draws, folder)


def draw_all(draws: Mapping[str, Callable[[Axes], None]], folder: Path) -> list[Path]:
    """Draw figures of one column's width into the folder, each as a PNG of its name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with paper_style():
        for name, draw in draws.items():
            figure = Figure(figsize=(SINGLE, HEIGHT), layout="constrained")
            draw(figure.add_subplot())
            paths.append(_save(figure, folder / f"{name}.png"))
    return paths


def course_plot(course: Sequence[tuple[int, Mapping[str, float]]], path: Path) -> Path:
    """The measures of neural collapse over the steps of a training run, one panel each, as a PNG.

    Args:
        course: the step of each evaluation and what it measured, by name.
    """
    names = sorted({name for _, values in course for name in values})
    rows = -(-len(names) // COURSE_COLUMNS)
    with paper_style():
        figure = Figure(figsize=(DOUBLE, 1.5 * rows), layout="constrained")
        for place, name in enumerate(names, 1):
            axes = figure.add_subplot(rows, COURSE_COLUMNS, place)
            points = [(step, values[name]) for step, values in course if name in values]
            axes.plot(*zip(*points, strict=True), "o-", color=BLACK, markersize=3)
            # From 0, to which most of them tend; what is 0 but for rounding is drawn at 0.
            axes.set(xlim=(0, None), ylim=(0, 1.1 * max(0.05, *(value for _, value in points))))
            axes.set_title(name.replace("_", " "), loc="left")
            axes.grid(color=PALE, linewidth=0.4)
            if place > len(names) - COURSE_COLUMNS:
                axes.set_xlabel("step")
        return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    with fresh_file(path) as file:
        figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return path


def draw_roc(axes: Axes, found: AllPairs) -> None:
    """TAR over FAR, the latter logarithmic, with the operating points of the report marked."""
    far, tar = np.array(found.fmr), 1 - np.array(found.fnmr)
    lowest = 1 / found.non_mated_pairs
    axes.plot(np.maximum(far, lowest), tar, color=BLACK, drawstyle="steps-post", zorder=3)
    chance = np.geomspace(lowest, 1, 200)
    axes.plot(chance, chance, color=GREY, linestyle=LINES[2], linewidth=0.8)
    for point in found.tar_at_far:
        if point.tar is not None:
            axes.plot(point.far, point.tar, "o", **POINT)
            _note(axes, f"{percent(point.tar)} at {percent(point.far)}", (point.far, point.tar), (-5, 4), "right")
    _unresolved(axes, "x", lowest, RESOLVED_ERRORS / found.non_mated_pairs)
    axes.set(xscale="log", xlim=(lowest, 1), xlabel="false accept rate (FAR)", ylabel="true accept rate (TAR)")
    percent_axis(axes, "x")
    _zoom(axes, [point.tar for point in found.tar_at_far if point.tar is not None])
    axes.set_title(f"Verification: EER {percent(found.eer)}, AUC {found.auc:.4f}", loc="left")


def draw_det(axes: Axes, found: AllPairs) -> None:
    """FNMR over FMR on normal-deviate axes, where normally distributed scores give a straight line."""
    fmr, fnmr = np.array(found.fmr), np.array(found.fnmr)
    low_x, low_y = max(1 / found.non_mated_pairs, 1e-6), max(1 / found.mated_pairs, 1e-6)
    inside = (fmr > 0) & (fmr < 1) & (fnmr > 0) & (fnmr < 1)
    axes.plot(deviate(fmr[inside]), deviate(fnmr[inside]), color=BLACK, drawstyle="steps-post", zorder=3)
    band = found.band
    rates, low, high = (deviate(np.clip(ends, 1e-9, 1 - 1e-9)) for ends in (band.fmr, band.low, band.high))
    axes.fill_between(rates, low, high, color=BLUE, alpha=0.2, linewidth=0, label="95 %")
    if np.count_nonzero(inside) < 2:
        none = "no threshold makes both errors"
        axes.text(0.5, 0.5, none, ha="center", transform=axes.transAxes, backgroundcolor="w")
    ends = deviate(np.array([max(low_x, low_y), 0.5]))
    axes.plot(ends, ends, color=GREY, linestyle=LINES[2], linewidth=0.8)
    if 0 < found.eer < 1:
        at = deviate(np.array([found.eer]))
        axes.plot(at, at, "o", **POINT)
        _note(axes, f"EER {percent(found.eer)}", (at[0], at[0]), (6, 4))
    for axis, lowest in (("x", low_x), ("y", low_y)):
        ticks = [tick for tick in DEVIATE_TICKS if tick >= lowest]
        highest = max(0.5, found.eer)
        getattr(axes, f"set_{axis}ticks")(deviate(np.array(ticks)), [percent(tick) for tick in ticks])
        getattr(axes, f"set_{axis}lim")(*deviate(np.array([lowest, min(highest * 1.2, 0.99)])))
    _unresolved(axes, "x", *deviate(np.array([low_x, min(RESOLVED_ERRORS / found.non_mated_pairs, 0.5)])))
    _unresolved(axes, "y", *deviate(np.array([low_y, min(RESOLVED_ERRORS / found.mated_pairs, 0.5)])))
    axes.grid(color=PALE, linewidth=0.4)
    axes.set(xlabel="false match rate (FMR), normal deviate", ylabel="false non-match rate (FNMR)")
    axes.set_title("Detection error trade-off", loc="left")


def draw_scores(axes: Axes, found: AllPairs, opened: OpenSet | None) -> None:
    """Densities of mated and non-mated scores, with the thresholds of the report."""
    histogram = found.histogram
    edges = np.array(histogram.edges)
    axes.stairs(histogram.non_mated, edges, fill=True, color=PALE, edgecolor=GREY, label="non-mated pairs")
    axes.stairs(histogram.mated, edges, color=BLACK, hatch="////", label="mated pairs", zorder=3)
    top = max(*histogram.mated, *histogram.non_mated)
    lines = [(p.threshold, f"FAR {percent(p.far)}", LINES[1]) for p in found.tar_at_far[1:2]]
    lines += [
        (p.threshold, f"FPIR {percent(p.fpir)}", LINES[3])
        for p in (opened.points if opened else [])
        if p.threshold is not None
    ][:1]
    for threshold, label, style in lines:
        if threshold is not None:
            label = f"{label}: {threshold:.3f}"
            axes.axvline(threshold, ymax=0.78, color=BLUE, linestyle=style, linewidth=1.2, label=label, zorder=4)
    axes.set(xlabel="cosine similarity", ylabel="density (share per unit of score)", ylim=(0, 1.3 * top))
    axes.set_xlim(edges[0], edges[-1])
    axes.legend(loc="upper right", ncols=2, columnspacing=1.2)
    axes.set_title("Scores of all pairs", loc="left")


def draw_open_set(axes: Axes, found: OpenSet) -> None:
    """FNIR over FPIR, both logarithmic, with the operating points and their intervals."""
    fpir, fnir = np.array(found.fpir), np.array(found.fnir)
    low_x, low_y = 1 / found.non_mated_probes, 1 / found.mated_probes
    marks = iter("os^")
    axes.plot(np.maximum(fpir, low_x), np.maximum(fnir, low_y), color=BLACK, drawstyle="steps-post", zorder=3)
    for point in found.points:
        if point.fnir is None or point.low is None or point.high is None:
            continue
        at = max(point.fnir, low_y)
        bars = [[max(at - max(point.low, low_y), 0.0)], [max(point.high - at, 0.0)]]
        label = f"{percent(point.fnir)} at {percent(point.fpir)}"
        axes.errorbar([point.fpir], [at], yerr=bars, fmt=next(marks), capsize=2, label=label, **POINT)
    _unresolved(axes, "x", low_x, SHOWN_ERRORS / found.non_mated_probes)
    floor = min([point.low for point in found.points if point.low is not None], default=1.0) / 3
    axes.set(xscale="log", yscale="log", xlim=(low_x, 1), ylim=(max(low_y, floor), 1.05))
    axes.set(xlabel="false positive identification rate (FPIR)", ylabel="false negative identification rate (FNIR)")
    percent_axis(axes, "x")
    percent_axis(axes, "y")
    if axes.get_legend_handles_labels()[1]:  # beside the points they would lie upon each other where FNIR is high
        axes.legend(title="FNIR at FPIR", alignment="left")
    axes.set_title(f"Open set: {found.gallery_size} enrolled, {found.unenrolled} not", loc="left")


def draw_cmc(axes: Axes, found: OneShot) -> None:
    """The share of mates among the first k candidates."""
    ranks = np.arange(1, len(found.cmc) + 1)
    axes.plot(ranks, found.cmc, "o-", color=BLACK, markersize=3, label="first sample enrolled", zorder=3)
    bars = [[max(found.rank1 - found.low, 0.0)], [max(found.high - found.rank1, 0.0)]]
    axes.errorbar([1], [found.rank1], yerr=bars, color=BLACK, capsize=2, zorder=3)
    _note(axes, f"rank 1: {percent(found.rank1)}", (1, found.rank1), (8, -10))
    axes.set(xlabel="rank k", ylabel="mate among the first k", xlim=(0.5, len(found.cmc) + 0.5))
    axes.set_xticks([rank for rank in (1, 5, 10, 15, 20) if rank <= len(found.cmc)])
    _zoom(axes, [found.low, *found.cmc])
    axes.grid(axis="y", color=PALE, linewidth=0.4)
    axes.set_title(f"Closed set: {found.gallery_size} identities, one sample each", loc="left")


def _note(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], side: str = "left") -> None:
    """A remark beside a point, the offset in points of type."""
    axes.annotate(text, at, offset, textcoords="offset points", fontsize=7, ha=side, zorder=5)


def percent(rate: float) -> str:
    """A rate in per cent, with four digits and never a power of ten."""
    return f"{np.format_float_positional(100 * rate, precision=4, fractional=False, trim='-')} %"


def deviate(rates: NDArray[np.float64]) -> NDArray[np.float64]:
    """The normal deviate of each rate: 0.5 is 0, 0.0228 is -2."""
    return np.array([NormalDist().inv_cdf(rate) for rate in rates], dtype=np.float64)


def percent_axis(axes: Axes, which: Literal["x", "y"]) -> None:
    """A tick a decade, more where they are few and fewer where they are many, in per cent, on a logarithmic axis."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    lowest = (axes.get_xlim() if which == "x" else axes.get_ylim())[0]
    step, parts = (1, (1, 2, 5) if which == "y" and lowest > 2e-3 else (1,)) if lowest > 1e-6 else (2, (1,))
    axis.set_major_locator(FixedLocator([part * 10.0**power for power in range(0, -11, -step) for part in parts]))
    axis.set_major_formatter(FuncFormatter(lambda rate, _: percent(rate)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())
    axes.grid(axis=which, color=PALE, linewidth=0.4)


def _zoom(axes: Axes, rates: list[float]) -> None:
    """A rate axis that ends at 100 % and begins where the figures are."""
    low = min([*rates, 0.95])
    axes.set_ylim(max(0.0, 1 - 1.35 * (1 - low)), 1 + 0.03 * (1 - low))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: percent(rate)))


def _unresolved(axes: Axes, which: str, low: float, high: float) -> None:
    """Shade the rates that too few trials stand behind."""
    if high > low:
        span = axes.axvspan if which == "x" else axes.axhspan
        span(low, high, facecolor="none", edgecolor=PALE, hatch="\\\\\\\\", linewidth=0)
        if which == "x":
            anchor = axes.get_xaxis_transform()
            axes.text(low, 0.04, " too few trials", transform=anchor, rotation=90, va="bottom", fontsize=6, color=GREY)
