"""An Embedder on the samples of a split: its embeddings, its Report, its Calibration. Runs without torch.

Axes: N samples, B of them, C channels, H and W pixels, D dimensions of the embedding.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.arrays import Form, Pixels
from trainer.data.curate.columns import attribute_codes, attribute_numbers, positions_of_keys
from trainer.data.curate.overlap import overlap
from trainer.data.image import read_file
from trainer.data.manifest import Manifest
from trainer.data.reader import Progress, Reader, ahead
from trainer.data.split import Split
from trainer.embedder import Embedder
from trainer.errors import UserError
from trainer.evaluation.calibration import HeldOut, calibrate
from trainer.evaluation.curve import LEAST_HITS
from trainer.evaluation.listed import measure_lists, read_protocol
from trainer.evaluation.normalise import Kind, Normaliser, apart_from, set_aside
from trainer.evaluation.protocols import Measured, measure
from trainer.evaluation.report import Calibration

_BATCH = 256  # samples decoded at a time
_AHEAD = 3
COHORT_SHARE, MOST_COHORT = 0.2, 1000  # subjects that are set aside to normalise by


class Evaluated(NamedTuple):
    """What was measured, and on what: the rows are samples of a split, or images of a protocol from a file.

    Attributes:
        measured: the Report, and what a comparison needs.
        vectors_ND, subjects_N: of each row.
        names: of the subjects.
        pixels: reads rows as the model sees them.
    """

    measured: Measured
    vectors_ND: NDArray[np.float32]
    subjects_N: NDArray[np.int64]
    names: Sequence[str]
    pixels: Callable[[NDArray[np.int64]], Pixels]


def evaluate_split(
    embedder: Embedder,
    data: Path,
    split: str,
    *,
    unenrolled: float = 0.5,
    seed: int = 0,
    by: Sequence[str] = (),
    quality: str | None = None,
    trained_on: Path | None = None,
    normaliser: Normaliser | None = None,
    progress: Progress | None = None,
) -> Evaluated:
    """Verification, identification and retrieval on a split.

    Args:
        data: folder of the data set.
        unenrolled: share of the identities that are not enrolled, for open-set errors.
        seed: chooses who is not enrolled.
        by: attributes of the set by which errors are told apart.
        quality: a numeric attribute of the samples, by which templates are weighted.
        trained_on: the data set that the Embedder was trained on, if it is another one.
        normaliser: of the scores, as the service has them; subjects of its cohort are left out.
        progress: called with the stage "embed", what is done and what there is to do.

    Raises:
        UserError: as `embed_split`, a split that the Embedder was trained on, an attribute that is not there, or too
            few identities or samples for a protocol.
    """
    manifest = Manifest.read(data)
    part = manifest.split(split)
    remarks = _trained(embedder, part, Manifest.read(trained_on) if trained_on else manifest)
    groups, quality_N = _attributes(part, by, quality)
    vectors_ND, labels_N = embed_split(embedder, part, progress)
    rows = np.arange(len(labels_N))
    names: Sequence[str] = part.classes
    if normaliser is not None:
        rows = apart_from(normaliser.cohort_KD, vectors_ND, labels_N)
        kept, labels_N = np.unique(labels_N[rows], return_inverse=True)
        vectors_ND, names = vectors_ND[rows], [part.classes[label] for label in kept.tolist()]
        groups = {name: (codes_N[rows], values) for name, (codes_N, values) in groups.items()}
        quality_N = None if quality_N is None else quality_N[rows]
    measured = measure(
        vectors_ND,
        labels_N,
        names,
        seed=seed,
        unenrolled_share=unenrolled,
        source=f"{manifest.kind}, split '{split}'{_normalised(normaliser, part.identities - len(names))}",
        model_id=embedder.model_id,
        groups=groups,
        quality_N=quality_N,
        remarks=remarks,
        normaliser=normaliser,
    )
    return Evaluated(measured, vectors_ND, labels_N, names, partial(_of_keys, part, embedder.preprocessing, rows))


def _attributes(
    part: Split, by: Sequence[str], quality: str | None
) -> tuple[dict[str, tuple[NDArray[np.int64], list[str]]], NDArray[np.float64] | None]:
    """The groups and the qualities of all samples, as far as they are asked for."""
    groups = {name: attribute_codes(part, name) for name in by}
    return groups, None if quality is None else attribute_numbers(part, quality)


def _normalised(normaliser: Normaliser | None, left_out: int) -> str:
    """What the source of figures says of their scores."""
    if normaliser is None:
        return ""
    told = f", {normaliser.kind.upper()}-norm by a cohort of {len(normaliser.cohort_KD)}"
    return told + (f", {left_out} identities of which are left out" if left_out else "")


def evaluate_protocol(
    embedder: Embedder,
    protocol: Path,
    images: Path | None = None,
    *,
    data: Path | None = None,
    split: str = "val",
    seed: int = 0,
    normaliser: Normaliser | None = None,
    progress: Progress | None = None,
) -> Evaluated:
    """What a protocol from a file asks for: see `evaluation.lists`.

    Args:
        images: folder that the file's names are in; None: the file's own, or the folder that it is.
        data: a data set whose samples the names are keys of, instead.
        split: of `data`.
        seed, normaliser, progress: as for `evaluate_split`; all images are compared.

    Raises:
        UserError: the file is no protocol, an image is missing or cannot be read, or the lists give no rates.
    """
    lists = read_protocol(protocol)
    if data is not None:
        part = Manifest.read(data).split(split)
        positions_I = positions_of_keys(part, lists.images)
        pixels: Callable[[NDArray[np.int64]], Pixels] = partial(_of_keys, part, embedder.preprocessing, positions_I)
    else:
        folder = images or (protocol if protocol.is_dir() else protocol.parent)
        pixels = partial(_of_files, folder, lists.images, embedder.preprocessing)
    starts = range(0, len(lists.images), _BATCH)
    vectors = []
    for rows in (np.arange(start, min(start + _BATCH, len(lists.images))) for start in starts):
        vectors.append(embedder.embed(pixels(rows)))
        if progress is not None:
            progress("embed", int(rows[-1]) + 1, len(lists.images))
    vectors_ND = np.concatenate(vectors)
    source = f"protocol {protocol.name}{_normalised(normaliser, 0)}"
    measured = measure_lists(
        vectors_ND, lists, seed=seed, source=source, model_id=embedder.model_id, normaliser=normaliser
    )
    subjects_N = np.empty(len(lists.images), np.int64)
    subjects_N[lists.image_I] = lists.subject_T[lists.template_I]
    return Evaluated(measured, vectors_ND, subjects_N, lists.subjects, pixels)


def _of_split(split: Split, form: Form, positions: NDArray[np.int64]) -> Pixels:
    reader = Reader(split, form)
    with reader.pool() as pool:
        return reader.read(positions, pool)[0]


def _of_keys(split: Split, form: Form, positions_I: NDArray[np.int64], rows: NDArray[np.int64]) -> Pixels:
    return _of_split(split, form, positions_I[rows])


def _of_files(folder: Path, images: Sequence[bytes | str], form: Form, rows: NDArray[np.int64]) -> Pixels:
    """Images of a protocol, as they are in its file or by their names in a folder."""
    pixels = []
    for row in rows.tolist():
        image = images[row]
        name = image if isinstance(image, str) else f"image {row}"
        data = image if isinstance(image, bytes) else read_file(folder / image, str(folder / image))
        pixels.append(form.load(data, name))
    return np.stack(pixels)


def _trained(embedder: Embedder, part: Split, trained_on: Manifest) -> list[str]:
    """What of the split the Embedder was trained on, by its manifest and by digests of names and samples.

    Raises:
        UserError: all of it.
    """
    digest = embedder.manifest.provenance.get("class_digest")
    if digest == part.class_digest:
        raise UserError(
            f"the embedder was trained on the identities of split '{part.name}' themselves (digest {digest[:12]}): "
            "errors on them say nothing; name a split of others, or hold some out with 'hypersphere data split'"
        )
    found = []
    for name in trained_on.splits:
        training = trained_on.split(name)
        if training.class_digest != digest:
            continue
        shared = overlap(training, part)
        if shared.names:
            found.append(
                f"{len(shared.names)} of {part.identities} identities, such as '{shared.names[0]}', are names of the "
                f"training split '{name}' as well: their errors look smaller than those of strangers"
            )
        if shared.samples:
            found.append(f"{shared.samples} of {part.samples} samples are in the training split '{name}' byte for byte")
    return found


def calibrate_on_split(
    embedder: Embedder,
    data: Path,
    split: str,
    *,
    fpir: float,
    fmr: float,
    gallery_size: int | None = None,
    samples_per_subject: int = 1,
    extrapolate: bool = False,
    prior: float = 0.5,
    normalise: Kind | None = None,
    cohort: str | None = None,
    seed: int = 0,
    trained_on: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Calibration, Normaliser | None, list[str]]:
    """Thresholds for allowed error rates, from a split of identities that were not trained on; what normalises; and
    what is doubtful about the data, which is also in the thresholds' source.

    Args:
        fpir, fmr: allowed error rates of identification and of verification.
        gallery_size: subjects in the gallery; None: as many as the split has.
        samples_per_subject: enrolled of each.
        extrapolate: below one expected false positive, too.
        prior: probability of a mate before a score is known.
        normalise: scores, by a cohort: a fifth of the subjects (a thousand at most), who are set aside.
        cohort: the split that the cohort is of instead, one sample of each of a thousand subjects at most.
        seed: chooses the samples that are enrolled, and those left out where there are too many.
        trained_on: the data set that the Embedder was trained on, if it is another one.

    Raises:
        UserError: as `embed_split`, a split that the Embedder was trained on, or a rate that so few subjects cannot
            show.
    """
    manifest = Manifest.read(data)
    part = manifest.split(split)
    remarks = _trained(embedder, part, Manifest.read(trained_on) if trained_on else manifest)
    vectors_ND, labels_N = embed_split(embedder, part, progress)
    source, normaliser = f"{manifest.kind}, split '{split}'", None
    if normalise is not None:
        other = None if cohort is None else manifest.split(cohort)
        cohort_KD, rest, whose = _cohort(embedder, other, vectors_ND, labels_N, seed)
        normaliser = Normaliser(normalise, cohort_KD)
        vectors_ND, labels_N = vectors_ND[rest], labels_N[rest]
        source += f", {normalise.upper()}-norm by {len(cohort_KD)} {whose}"
    held = HeldOut(vectors_ND, labels_N, embedder.model_id, "; ".join([source, *remarks]), seed, normaliser)
    found = calibrate(
        held,
        fpir=fpir,
        fmr=fmr,
        gallery_size=len(np.unique(labels_N)) if gallery_size is None else gallery_size,
        samples_per_subject=samples_per_subject,
        least_hits=0.0 if extrapolate else LEAST_HITS,
        prior=prior,
    )
    return found, normaliser, remarks


def _cohort(
    embedder: Embedder, other: Split | None, vectors_ND: NDArray[np.float32], labels_N: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], str]:
    """Vectors of a cohort, of another split or set aside from these; the rows that are left; and whose they are."""
    if other is None:
        rows, rest = set_aside(labels_N, COHORT_SHARE, MOST_COHORT, seed)
        return vectors_ND[rows], rest, "of its subjects"
    cohort_KD, _ = embed_split(embedder, other, rows=one_of_each(other, MOST_COHORT, seed))
    return cohort_KD, np.arange(len(labels_N)), f"subjects of split '{other.name}'"


def one_of_each(split: Split, most: int, seed: int) -> NDArray[np.int64]:
    """Positions of one sample of each of so many identities, drawn by the seed, ascending."""
    counts_C = split.classes.counts()
    firsts_C = (np.cumsum(counts_C) - counts_C)[counts_C > 0]
    chosen = np.random.default_rng([seed, 8]).permutation(len(firsts_C))[:most]
    return np.sort(split.by_class[firsts_C[chosen]]).astype(np.int64)


def embed_split(
    embedder: Embedder, split: Split, progress: Progress | None = None, rows: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Unit vectors [N, D] and labels [N] of all samples of a split, in the order of its shards; or of some `rows`.

    Raises:
        UserError: samples that the Embedder does not take, a damaged shard or sample, or one that has no embedding.
    """
    reader = Reader(split, embedder.preprocessing)
    vectors, labels = [], []
    rows = np.arange(split.samples) if rows is None else rows
    with reader.pool() as pool:
        places = (rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH))
        for images_BCHW, labels_B, _ in ahead(lambda some: reader.read(some, pool), places, threads=1, most=_AHEAD):
            vectors.append(embedder.embed(images_BCHW))
            labels.append(labels_B)
            if progress is not None:
                progress("embed", sum(map(len, labels)), len(rows))
    return np.concatenate(vectors), np.concatenate(labels).astype(np.int64)
