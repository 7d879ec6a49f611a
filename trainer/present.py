"""What was measured, for readers: one HTML page without network, and its pictures, of one Embedder or two."""

from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from trainer.assess import Evaluated
from trainer.atomic import write_file
from trainer.data.arrays import Pixels
from trainer.embedder import EmbedderManifest
from trainer.evaluation import page, verification
from trainer.evaluation.charts import comparison_charts, draw_map, mapped, report_charts
from trainer.evaluation.comparison import compare
from trainer.evaluation.findings import Comparison, HardPair
from trainer.evaluation.plots import draw_all, report_plots
from trainer.evaluation.report import Calibration, Report

PAGE = "index.html"
# What of a run's config the card shows; addresses of data and of the tracking, which may hold secrets, are left out.
_CARD_SECTIONS = ("backbone", "loss", "auxiliary", "head", "optimizer", "schedule", "augment", "engine")
_SHOWN_PIXELS = 112  # the least width of an image on the page
_CAPTIONS = {
    "det": "False non-matches over false matches at every threshold; the band is the 95 % interval by subject.",
    "roc": "True accepts over false accepts, with the operating points.",
    "scores": "Scores of mated and non-mated pairs, with thresholds.",
    "cmc": "How often the mate is among the first k candidates of a closed gallery.",
    "open_set": "Mates that are missed over strangers that are taken for somebody; bars are 95 % intervals.",
    "growth": "A threshold that is right for one size of gallery is wrong for a larger one.",
    "reliability": "Of the pairs that are given a probability of a mate, how many are mates.",
    "map": "Embeddings near each other are drawn near each other; distances between clusters mean little.",
    "neural_collapse": "The geometry of the training's features over its steps.",
}
One = tuple[Path, EmbedderManifest, Evaluated]


def present(found: Sequence[One], folder: Path) -> tuple[list[Path], list[str]]:
    """Write the page and its pictures into the folder.

    Args:
        found: of each Embedder its folder, its manifest and what was measured; one, or two on the same protocol.

    Returns:
        what was written, the page first; and what a comparison found, in sentences.
    """
    if len(found) == 1:
        pictures, text = _of_one(found[0], folder)
        sentences: list[str] = []
    else:
        pictures, text, sentences = _of_two(found, folder)
    write_file(folder / PAGE, text)
    return [folder / PAGE, *pictures], sentences


def _of_one(one: One, folder: Path) -> tuple[list[Path], str]:
    home, manifest, evaluated = one
    report = evaluated.measured.report
    calibration = manifest.calibration if manifest.normalisation is None else None  # of the scores that are drawn
    written = report_plots(report, folder) + draw_all(report_charts(report, calibration), folder)
    rows, places_n2 = mapped(evaluated.vectors_ND, evaluated.subjects_N, report.seed)
    labels_n = evaluated.subjects_N[rows]
    drawing = partial(draw_map, places_n2=places_n2, labels_n=labels_n, names=evaluated.names)
    written += draw_all({"map": drawing}, folder)
    course = home.parent / "neural_collapse.png"  # of the run whose folder the Embedder lies in
    pictures = [page.picture(path, _caption(path.stem, report, calibration)) for path in written]
    late = [page.picture(course, _CAPTIONS["neural_collapse"])] if course.is_file() else []
    text = page.page(
        f"Evaluation of {manifest.model_id[:12]}",
        f"{report.source}: {report.samples} samples of {report.identities} identities that the training has not seen.",
        [
            page.warnings(report.remarks),
            page.tiles(_headlines(report)),
            page.section("Curves", page.charts(pictures)),
            page.section("Figures", page.table(("what", "value", "95 % interval", "measured on"), _figures(report))),
            page.section("Several samples of a subject", page.table(_ENROLMENT_HEAD, _enrolments(report))),
            page.section("Groups", page.table(_GROUP_HEAD, _groups(report))),
            _hard("Hardest false matches", evaluated, evaluated.measured.hardest.matches),
            _hard("Hardest false non-matches", evaluated, evaluated.measured.hardest.non_matches),
            page.section("Course of neural collapse", page.charts(late)),
            page.section("Model card", *_card(home, manifest, report)),
        ],
    )
    return written, text


def _of_two(found: Sequence[One], folder: Path) -> tuple[list[Path], str, list[str]]:
    names = _names(*(home for home, _, _ in found))
    seen = [one.measured.seen.named(name) for name, (_, _, one) in zip(names, found, strict=True)]
    reports = {name: one.measured.report for name, (_, _, one) in zip(names, found, strict=True)}
    first = found[0][2].measured.report
    compared = compare(seen[0], seen[1], first.seed, verification.REPLICATES)
    written = draw_all(comparison_charts(reports), folder)
    pictures = [page.picture(path, _CAPTIONS[path.stem]) for path in written]
    remarks = list(dict.fromkeys(remark for report in reports.values() for remark in report.remarks))
    cards = [
        page.section(f"Model card of {name}", *_card(home, manifest, one.measured.report))
        for name, (home, manifest, one) in zip(names, found, strict=True)
    ]
    head = ("error rate", *names, "first minus second", "95 %")
    text = page.page(
        f"{names[0]} against {names[1]}",
        f"{first.source}: {first.samples} samples of {first.identities} identities. {compared.sentence}",
        [
            page.warnings(remarks),
            page.section("Differences", page.table(head, _differences(compared))),
            page.section("In words", page.paragraphs(*(one.sentence for one in compared.differences))),
            page.section("Curves", page.charts(pictures)),
            *cards,
        ],
    )
    write_file(folder / "comparison.json", compared.model_dump_json(indent=2) + "\n")
    sentences = [compared.sentence, *(one.sentence for one in compared.differences)]
    return [*written, folder / "comparison.json"], text, sentences


def _names(first: Path, second: Path) -> list[str]:
    """What tells two Embedders apart: their folders' names, or those of their runs, or their paths."""
    for one, other in ((first.name, second.name), (first.parent.name, second.parent.name), (str(first), str(second))):
        if one != other:
            return [one, other]
    return [f"{first.name} (A)", f"{second.name} (B)"]


def _caption(name: str, report: Report, calibration: Calibration | None) -> str:
    if name.startswith("groups_"):
        return "Errors of each group at one threshold for all."
    if name == "reliability" and calibration is not None and calibration.verify.source.startswith(report.source):
        assert calibration.probability is not None
        crosswise = min(calibration.probability.ece_platt, calibration.probability.ece_isotonic)
        return f"{_CAPTIONS[name]} Fitted to these very samples; crosswise, between halves, ECE is {crosswise:.2g}."
    return _CAPTIONS[name]


def _headlines(report: Report) -> list[tuple[str, str, str]]:
    found = []
    if (shot := report.one_shot) is not None:
        found.append(("rank-1", f"{shot.rank1:.1%}", f"{_ends((shot.low, shot.high))}, gallery of {shot.gallery_size}"))
    if (opened := report.open_set) is not None:
        for point in [one for one in opened.points if one.fnir is not None][-2:]:
            what, ends = f"FNIR at FPIR {point.fpir:.1%}", _ends((point.low, point.high))
            found.append((what, f"{point.fnir:.1%}", f"{ends}, gallery of {opened.gallery_size}"))
    if (pairs := report.verification) is not None:
        shown = [one for one in pairs.tar_at_far if one.tar is not None and one.far <= 1e-3][:1]
        found += [(f"TAR at FAR {one.far:g}", f"{one.tar:.1%}", _ends((one.low, one.high))) for one in shown]
        found.append(("EER", f"{pairs.eer:.2%}", _ends(pairs.eer_interval)))
        if pairs.ten_fold is not None:
            error = f"± {pairs.ten_fold.standard_error:.2%} standard error"
            found.append(("ten-fold accuracy", f"{pairs.ten_fold.accuracy:.2%}", error))
    return found


def _figures(report: Report) -> list[tuple[str, str, str, str]]:
    """Every figure; those that the data do not support say why."""
    rows: list[tuple[str, str, str, str]] = []
    if (pairs := report.verification) is not None:
        on = f"{pairs.mated_pairs} mated and {pairs.non_mated_pairs} non-mated pairs of {pairs.subjects} subjects"
        rows += [("EER", f"{pairs.eer:.3%}", _ends(pairs.eer_interval), on)]
        rows += [("AUC", f"{pairs.auc:.5f}", "{:.5f} to {:.5f}".format(*pairs.auc_interval), on)]
        for far in pairs.tar_at_far:
            rows.append((f"TAR at FAR {far.far:g}", _rate(far.tar), _ends((far.low, far.high)), far.reason or on))
        for cost in pairs.costs:
            ends = "{:.3f} to {:.3f}".format(*cost.interval)
            rows.append((f"least detection cost, prior {cost.prior:g}", f"{cost.cost:.3f}", ends, on))
    if (shot := report.one_shot) is not None:
        rows.append(("rank-1", _rate(shot.rank1), _ends((shot.low, shot.high)), f"{shot.probes} probes"))
    if (opened := report.open_set) is not None:
        on = f"{opened.mated_probes} mated and {opened.non_mated_probes} non-mated probes"
        for point in opened.points:
            ends = _ends((point.low, point.high))
            rows.append((f"FNIR at FPIR {point.fpir:g}", _rate(point.fnir), ends, point.reason or on))
    if (retrieved := report.retrieval) is not None:
        on = f"{retrieved.queries} queries"
        columns = zip(retrieved.ks, retrieved.recall, retrieved.recall_low, retrieved.recall_high, strict=True)
        rows += [(f"recall@{k}", _rate(recall), _ends((low, high)), on) for k, recall, low, high in columns]
        rows.append(("mAP@R", _rate(retrieved.map_at_r), _ends(retrieved.map_interval), on))
    return rows


_ENROLMENT_HEAD = ("put together by", "samples", "rank-1", "95 %", "FNIR at FPIR", "95 %")


def _enrolments(report: Report) -> list[tuple[str, ...]]:
    return [
        (one.way, str(one.samples), _rate(one.rank1), _ends(one.rank1_interval))
        + ((f"{_rate(one.fnir)} at {one.fpir:.1%}", _ends(one.fnir_interval)) if one.fpir else ("not resolved", ""))
        for one in report.enrolments
    ]


_GROUP_HEAD = ("group", "subjects", "FMR", "95 %", "FNMR", "95 %", "")


def _groups(report: Report) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for groups in report.groups:
        shown = [
            f"{one:.1f} times" if one else "not resolved" for one in (groups.fmr_differential, groups.fnmr_differential)
        ]
        title = f"by {groups.attribute}, at the threshold {groups.threshold:.3f} of FMR {groups.far:.2g}"
        rows.append((title, "", f"differential {shown[0]}", "", f"differential {shown[1]}", "", ""))
        for one in groups.groups:
            rates = _rate(one.fmr), _ends(one.fmr_interval), _rate(one.fnmr), _ends(one.fnmr_interval)
            rows.append((one.value, str(one.subjects), *rates, one.reason or ""))
    return rows


def _differences(compared: Comparison) -> list[tuple[str, ...]]:
    return [
        (
            one.what,
            _rate(one.first),
            _rate(one.second),
            f"{one.difference:+.2%}",
            "{:+.2%} to {:+.2%}".format(*one.interval),
        )
        for one in compared.differences
    ]


def _rate(rate: float | None) -> str:
    return "not resolved" if rate is None else f"{rate:.2%}"


def _ends(ends: tuple[float | None, float | None] | None) -> str:
    return "" if ends is None or ends[0] is None or ends[1] is None else f"{ends[0]:.2%} to {ends[1]:.2%}"


def _hard(heading: str, evaluated: Evaluated, found: Sequence[HardPair]) -> str:
    """The pairs as images; nothing where the samples are none."""
    if not found:
        return ""
    pixels = evaluated.pixels(np.array([(pair.first, pair.second) for pair in found], np.int64).ravel())
    if pixels.dtype != np.uint8:
        return ""
    names, subjects = evaluated.names, evaluated.subjects_N
    shown = [
        page.Pair(
            _png(pixels[2 * place]),
            _png(pixels[2 * place + 1]),
            " · ".join(dict.fromkeys(names[int(subjects[row])] for row in (pair.first, pair.second)))
            + f": {pair.score:.3f}",
        )
        for place, pair in enumerate(found)
    ]
    return page.section(heading, page.pairs(shown))


def _png(pixels_CHW: Pixels | NDArray[np.uint8]) -> bytes:
    image = Image.fromarray(np.moveaxis(np.asarray(pixels_CHW, np.uint8), 0, -1).squeeze())
    times = -(-_SHOWN_PIXELS // image.width)
    out = BytesIO()
    image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST).save(out, "png", optimize=True)
    return out.getvalue()


def _card(home: Path, manifest: EmbedderManifest, report: Report) -> list[str]:
    """Data, config, digest, thresholds and limits."""
    facts = [
        ("model", manifest.model_id),
        ("dimension", str(manifest.dimension)),
        ("takes", f"{manifest.preprocessing.reads}: {manifest.preprocessing.model_dump()}"),
        *((name.replace("_", " "), value) for name, value in manifest.provenance.items() if name != "tracking_uri"),
        (
            "measured on",
            f"{report.source}; {report.samples} samples, {report.identities} identities, seed {report.seed}",
        ),
    ]
    if (found := manifest.calibration) is not None:
        if manifest.normalisation is not None:
            facts.append(("scores of the service", f"{manifest.normalisation.kind}-normalised; here they are cosines"))
        for one in (found.verify, found.identify):
            size = f" in a gallery of {one.gallery_size}" if one.target == "FPIR" else ""
            reached = f"{one.value:.4f} for {one.target} {one.rate:g}{size}, reached {one.low:.2g} to {one.high:.2g}"
            facts.append((f"threshold ({one.target})", reached))
    limits = (
        "Figures hold for subjects and conditions like those measured. The errors of identification grow with the "
        "gallery. A rate is called not resolved where fewer than 30 false matches, or 3 strangers returned, are to be "
        "expected. Intervals are 95 %, by subject: samples of one subject err together."
    )
    return [page.definitions(facts), page.paragraphs(limits), page.folded("Config of the training", _config(home))]


def _config(home: Path) -> str:
    """The sections of the run's config that make the model, where the Embedder lies in the run's folder."""
    path = home.parent / "config.yaml"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    kept = {name: tree[name] for name in _CARD_SECTIONS if name in tree} if isinstance(tree, dict) else {}
    return yaml.safe_dump(kept, sort_keys=False) if kept else ""
