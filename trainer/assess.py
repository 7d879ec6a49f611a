"""An Embedder on the samples of a split: its embeddings, its Report, its Calibration. Runs without torch.

Axes: N samples, B of them, C channels, H and W pixels, D dimensions of the embedding.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.manifest import Manifest
from trainer.data.reader import Progress, Reader, ahead
from trainer.data.split import Split
from trainer.embedder import Embedder
from trainer.evaluation.calibration import HeldOut, calibrate
from trainer.evaluation.curve import LEAST_HITS
from trainer.evaluation.normalise import Kind, Normaliser, set_aside
from trainer.evaluation.protocols import evaluate
from trainer.evaluation.report import Calibration, Report

_BATCH = 256  # samples decoded at a time
_AHEAD = 3
COHORT_SHARE, MOST_COHORT = 0.2, 1000  # subjects that are set aside to normalise by


def evaluate_split(
    embedder: Embedder,
    data: Path,
    split: str,
    *,
    unenrolled: float = 0.5,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Verification, one-shot and open-set identification on a split.

    Args:
        data: folder of the data set.
        unenrolled: share of the identities that are not enrolled, for open-set errors.
        seed: chooses who is not enrolled.
        progress: called with the stage "embed", what is done and what there is to do.

    Raises:
        UserError: as `embed_split`, or too few identities or samples for a protocol.
    """
    part = Manifest.read(data).split(split)
    vectors_ND, labels_N = embed_split(embedder, part, progress)
    return evaluate(vectors_ND, labels_N, part.classes, seed=seed, unenrolled_share=unenrolled)


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
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Calibration, Normaliser | None]:
    """Thresholds for allowed error rates, from a split of identities that were not trained on, and what normalises.

    Args:
        fpir, fmr: allowed error rates of identification and of verification.
        gallery_size: subjects in the gallery; None: as many as the split has.
        samples_per_subject: enrolled of each.
        extrapolate: below one expected false positive, too.
        prior: probability of a mate before a score is known.
        normalise: scores, by a cohort: a fifth of the subjects (a thousand at most), who are set aside.
        seed: chooses the samples that are enrolled, and those left out where there are too many.

    Raises:
        UserError: as `embed_split`, or a rate that so few subjects cannot show.
    """
    manifest = Manifest.read(data)
    part = manifest.split(split)
    vectors_ND, labels_N = embed_split(embedder, part, progress)
    source, normaliser = f"{manifest.kind}, split '{split}'", None
    if normalise is not None:
        cohort, rest = set_aside(labels_N, COHORT_SHARE, MOST_COHORT, seed)
        normaliser = Normaliser(normalise, vectors_ND[cohort])
        vectors_ND, labels_N = vectors_ND[rest], labels_N[rest]
        source += f", {normalise.upper()}-norm by {len(cohort)} of its subjects"
    subjects = len(np.unique(labels_N))
    found = calibrate(
        HeldOut(vectors_ND, labels_N, embedder.model_id, source, seed, normaliser),
        fpir=fpir,
        fmr=fmr,
        gallery_size=subjects if gallery_size is None else gallery_size,
        samples_per_subject=samples_per_subject,
        least_hits=0.0 if extrapolate else LEAST_HITS,
        prior=prior,
    )
    return found, normaliser


def embed_split(
    embedder: Embedder, split: Split, progress: Progress | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Unit vectors [N, D] and labels [N] of all samples of a split, in the order of its shards.

    Raises:
        UserError: samples that the Embedder does not take, a damaged shard or sample, or one that has no embedding.
    """
    reader = Reader(split, embedder.preprocessing)
    vectors, labels = [], []
    starts = range(0, split.samples, _BATCH)
    with reader.pool() as pool:
        places = (np.arange(start, min(start + _BATCH, split.samples)) for start in starts)
        for images_BCHW, labels_B, _ in ahead(lambda rows: reader.read(rows, pool), places, threads=1, most=_AHEAD):
            vectors.append(embedder.embed(images_BCHW))
            labels.append(labels_B)
            if progress is not None:
                progress("embed", sum(map(len, labels)), split.samples)
    return np.concatenate(vectors), np.concatenate(labels).astype(np.int64)
