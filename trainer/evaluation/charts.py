"""Pictures of a Report's page beside those of `plots`: growth, groups, the map, and two Embedders in one picture."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from trainer.evaluation.curve import HIGHEST_RATE, Curve
from trainer.evaluation.findings import Groups, Growth
from trainer.evaluation.plots import BLUE, COLOURS, GREY, LINES, PALE, deviate, percent, percent_axis
from trainer.evaluation.report import Calibration, Histogram, Report
from trainer.evaluation.scores import Labels

MOST_MAPPED = 1500  # samples; t-SNE takes seconds
RELIABILITY_BINS = 15
_NAMED = 6  # identities with a colour of their own
_DRAWN = 12  # groups, the largest


def report_charts(report: Report, calibration: Calibration | None) -> dict[str, Callable[[Axes], None]]:
    """What to draw of a report, by the name of the picture; with what the Embedder's calibration foretells."""
    draws: dict[str, Callable[[Axes], None]] = {}
    if report.growth is not None:
        draws["growth"] = partial(draw_growth, found=report.growth, curve=calibration.curve if calibration else None)
    model, pairs = calibration.probability if calibration else None, report.verification
    if model is not None and pairs is not None:
        probability, prior = model.probability, model.prior
        draws["reliability"] = partial(draw_reliability, scores=pairs.histogram, probability=probability, prior=prior)
    for place, groups in enumerate(report.groups, 1):
        draws[f"groups_{place}"] = partial(draw_groups, found=groups)
    return draws


def draw_growth(axes: Axes, found: Growth, curve: Curve | None) -> None:
    """FPIR over the size of the gallery at one threshold, with its band, and that of independent comparisons.

    Beyond the subjects at hand, what the calibration's curve foretells; without one, FPIR scaled by the size.
    """
    sizes, fpir = np.array(found.sizes), np.array(found.fpir)
    axes.fill_between(sizes, found.low, found.high, color=BLUE, alpha=0.2, linewidth=0, label="95 % by subject")
    axes.plot(sizes, fpir, color=COLOURS[0], label="measured")
    axes.plot(sizes, 1 - (1 - fpir[0]) ** sizes, color=GREY, linestyle=LINES[2], label=r"$1-(1-\mathrm{FMR})^N$")
    far = np.geomspace(sizes[-1], 10 * sizes[-1], 20)
    if curve is None or curve.target != "FPIR":
        beyond = 1 - (1 - min(fpir[-1], 1 - 1e-12)) ** (far / sizes[-1])
        axes.plot(far, beyond, color=COLOURS[0], linestyle=LINES[1], label="scaled, an upper bound")
    else:
        foretold = [(int(size), curve.rate_at(found.threshold, int(size))) for size in far]
        kept = [(size, rate, curve.at(size, rate, 0.0)) for size, rate in foretold if 0 < rate <= HIGHEST_RATE]
        if kept:
            where = [size for size, _, _ in kept]
            low, high = [one.low for _, _, one in kept], [one.high for _, _, one in kept]
            axes.fill_between(where, low, high, color=COLOURS[2], alpha=0.2, linewidth=0)
            axes.plot(where, [rate for _, rate, _ in kept], color=COLOURS[2], linestyle=LINES[1], label="foretold")
    positive = fpir[fpir > 0]
    axes.set(xscale="log", yscale="log", ylim=(float(positive.min(initial=1.0)) / 2, 1.05))
    axes.set(xlabel="subjects in the gallery, N", ylabel="FPIR")
    axes.legend(loc="lower right")
    percent_axis(axes, "y")
    axes.set_title(f"Strangers taken for somebody, threshold {found.threshold:.3f}", loc="left")


def draw_reliability(axes: Axes, scores: Histogram, probability: Callable[[float], float], prior: float) -> None:
    """How many of the pairs of a stated probability are mates, at the prior, in fifteen bins."""
    edges = np.array(scores.edges)
    stated_k = np.array([probability(score) for score in (edges[:-1] + edges[1:]) / 2])
    mates_k = prior * np.array(scores.mated) * np.diff(edges)
    all_k = mates_k + (1 - prior) * np.array(scores.non_mated) * np.diff(edges)
    bins_k = np.minimum((stated_k * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
    weight, mates, said = (
        np.bincount(bins_k, part_k, RELIABILITY_BINS) for part_k in (all_k, mates_k, all_k * stated_k)
    )
    used = weight > 0
    error = float(np.abs(said - mates).sum())
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=LINES[2], linewidth=0.8)
    axes.bar((np.arange(RELIABILITY_BINS) + 0.5) / RELIABILITY_BINS, weight, 0.9 / RELIABILITY_BINS, color=PALE)
    axes.plot(said[used] / weight[used], mates[used] / weight[used], "o-", color=COLOURS[0], markersize=3.5)
    axes.set(xlabel="stated probability of a mate", ylabel="share of mates", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"Reliability at a prior of {prior:g}: ECE {error:.3f}; grey: share of pairs", loc="left")


def draw_groups(axes: Axes, found: Groups) -> None:
    """FMR and FNMR of each group at the common threshold, with their intervals."""
    groups = [group for group in found.groups if group.fmr is not None]
    groups = sorted(groups, key=lambda group: -group.subjects)[:_DRAWN][::-1]
    for shift, colour, marker, name in ((0.15, COLOURS[2], "o", "fmr"), (-0.15, BLUE, "s", "fnmr")):
        for row, group in enumerate(groups):
            rate, (low, high) = getattr(group, name), getattr(group, f"{name}_interval")
            at, floor = max(rate, 1e-7), 1e-7
            bars = [[max(at - max(low, floor), 0.0)], [max(high - at, 0.0)]]
            label = name.upper() if row == 0 else None
            axes.errorbar(
                [at], [row + shift], xerr=bars, fmt=marker, color=colour, markersize=3.5, capsize=2, label=label
            )
    axes.set(xscale="log", xlabel="error rate at one threshold")
    axes.set_yticks(range(len(groups)), [f"{group.value[:18]} ({group.subjects})" for group in groups])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: percent(rate)))
    axes.grid(axis="x", color=PALE, linewidth=0.4)
    if groups:
        axes.legend(loc="best")
    axes.set_title(f"Groups by {found.attribute} (subjects)", loc="left")


def mapped(vectors_ND: NDArray[np.float32], labels_N: Labels, seed: int) -> tuple[Labels, NDArray[np.float64]]:
    """Rows of whole identities, and their places in two dimensions: t-SNE (van der Maaten and Hinton, JMLR 2008)."""
    from sklearn.manifold import TSNE

    from trainer.evaluation.verification import whole_identities

    rows = whole_identities(labels_N, MOST_MAPPED, seed)[: 2 * MOST_MAPPED]
    perplexity = min(30.0, max(1.0, (len(rows) - 1) / 3))
    found = TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=seed).fit_transform(
        vectors_ND[rows]
    )
    return rows, np.asarray(found, np.float64)


def draw_map(axes: Axes, places_n2: NDArray[np.float64], labels_n: Labels, names: Sequence[str]) -> None:
    """The map, with a few identities in colours; distances between clusters mean little."""
    named = np.random.default_rng(0).permutation(np.unique(labels_n))[:_NAMED]
    others = ~np.isin(labels_n, named)
    axes.plot(*places_n2[others].T, ".", color=PALE, markersize=2.5, zorder=1)
    for label, colour, marker in zip(named.tolist(), COLOURS[1:], "os^Dv*", strict=False):
        text = names[label].replace("$", r"\$")
        text = text if len(text) <= 24 else "…" + text[-23:]
        axes.plot(*places_n2[labels_n == label].T, marker, color=colour, markersize=3.5, label=text, zorder=3)
    axes.set(xticks=[], yticks=[])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, handletextpad=0.2, columnspacing=0.8)
    axes.set_title("Map of the embeddings (t-SNE)", loc="left")


def comparison_charts(reports: Mapping[str, Report]) -> dict[str, Callable[[Axes], None]]:
    """Curves of two Embedders in one picture each, as far as both have them."""
    draws: dict[str, Callable[[Axes], None]] = {}
    if all(report.verification is not None for report in reports.values()):
        draws["det"] = partial(_draw_dets, reports=reports)
    if all(report.open_set is not None for report in reports.values()):
        draws["open_set"] = partial(_draw_open_sets, reports=reports)
    if all(report.one_shot is not None for report in reports.values()):
        draws["cmc"] = partial(_draw_cmcs, reports=reports)
    return draws


def _draw_dets(axes: Axes, reports: Mapping[str, Report]) -> None:
    for (name, report), colour, line in zip(reports.items(), COLOURS[1:], LINES, strict=False):
        assert report.verification is not None
        found, style = report.verification, {"color": colour, "linestyle": line, "label": name}
        rates, low, high = (_deviates(ends) for ends in (found.band.fmr, found.band.low, found.band.high))
        axes.fill_between(rates, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(_deviates(found.fmr), _deviates(found.fnmr), **style)
    ticks = [1e-6, 1e-4, 1e-3, 0.01, 0.05, 0.2, 0.5]
    shown = [percent(tick) for tick in ticks]
    axes.set_xticks(deviate(np.array(ticks)), shown)
    axes.set_yticks(deviate(np.array(ticks)), shown)
    limits = deviate(np.array([1e-5, 0.6]))
    axes.set(xlim=limits, ylim=deviate(np.array([1e-4, 0.95])), xlabel="FMR, normal deviate", ylabel="FNMR")
    axes.grid(color=PALE, linewidth=0.4)
    axes.legend()
    axes.set_title("Detection error trade-off, with 95 % bands", loc="left")


def _deviates(rates: Sequence[float]) -> NDArray[np.float64]:
    return deviate(np.clip(rates, 1e-9, 1 - 1e-9))


def _draw_open_sets(axes: Axes, reports: Mapping[str, Report]) -> None:
    for (name, report), colour, line in zip(reports.items(), COLOURS[1:], LINES, strict=False):
        assert report.open_set is not None
        found = report.open_set
        lowest = 1 / found.non_mated_probes, 1 / found.mated_probes
        axes.plot(
            np.maximum(found.fpir, lowest[0]),
            np.maximum(found.fnir, lowest[1]),
            color=colour,
            linestyle=line,
            label=name,
        )
    axes.set(xscale="log", xlabel="FPIR", ylabel="FNIR", ylim=(0, 1.02))
    percent_axis(axes, "x")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: percent(rate)))
    axes.legend()
    axes.set_title("Open set", loc="left")


def _draw_cmcs(axes: Axes, reports: Mapping[str, Report]) -> None:
    for (name, report), colour, line in zip(reports.items(), COLOURS[1:], LINES, strict=False):
        assert report.one_shot is not None
        cmc = report.one_shot.cmc
        axes.plot(range(1, len(cmc) + 1), cmc, color=colour, linestyle=line, label=name)
    axes.set(xlabel="rank k", ylabel="mate among the first k", xticks=[1, 5, 10, 15, 20])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: percent(rate)))
    axes.grid(axis="y", color=PALE, linewidth=0.4)
    axes.legend()
    axes.set_title("Closed set", loc="left")
