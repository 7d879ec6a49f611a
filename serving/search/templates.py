"""What of a subject is searched: all its samples, of which the best counts, or one vector made of them.

Axes: B samples, S subjects, D dimensions.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serving.storage.reading import Piece

Template = Literal["maximum", "mean", "weighted"]
NO_SAMPLE = bytes(16)  # stands for the sample that a template is not


def whole_subjects(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The samples of pieces that are ordered by subject, in pieces that each hold all of their subjects'."""
    rest: Piece | None = None
    for piece in pieces:
        both = piece if rest is None else joined([rest, piece])
        end = int(np.searchsorted(both.numbers_B, both.numbers_B[-1]))  # the last subject may go on
        if end:
            yield _part(both, slice(0, end))
        rest = _part(both, slice(end, None))
    if rest is not None:
        yield rest


def templates(piece: Piece, template: Template) -> Piece:
    """One row a subject of a piece with all of its samples, side by side: the mean of the vectors, of length 1.

    `weighted`: by quality, where a negative one is 0, and an unknown one is the mean of the subject's others, or 1.
    Where the vectors or the weights add up to nothing, there is no direction: the subject's first sample is taken.
    """
    starts_S = np.flatnonzero(np.diff(piece.numbers_B, prepend=-1))
    x_BD = piece.vectors_BD.astype(np.float64)
    if template == "weighted":
        x_BD *= _weights(piece.qualities_B, starts_S)[:, None]
    sum_SD = np.add.reduceat(x_BD, starts_S, axis=0)
    length_S = np.linalg.norm(sum_SD, axis=1)
    mean_SD = np.where(
        length_S[:, None] > 1e-6, sum_SD / np.maximum(length_S, 1e-6)[:, None], piece.vectors_BD[starts_S]
    )
    names = [piece.subject_ids[start] for start in starts_S]
    unknown_S = np.full(len(starts_S), np.nan)
    return Piece(names, [NO_SAMPLE] * len(names), mean_SD.astype(np.float32), unknown_S, piece.numbers_B[starts_S])


def _weights(qualities_B: NDArray[np.float64], starts_S: NDArray[np.int64]) -> NDArray[np.float64]:
    known_B = ~np.isnan(qualities_B)
    quality_B = np.where(known_B, np.maximum(qualities_B, 0), 0)
    known_S, sum_S = np.add.reduceat(known_B.astype(np.float64), starts_S), np.add.reduceat(quality_B, starts_S)
    usual_S = np.where(known_S > 0, sum_S / np.maximum(known_S, 1), 1)
    usual_B = np.repeat(usual_S, np.diff(starts_S, append=len(qualities_B)))
    return np.where(known_B, quality_B, usual_B)


def _part(piece: Piece, rows: slice) -> Piece:
    arrays = piece.vectors_BD[rows], piece.qualities_B[rows], piece.numbers_B[rows]
    return Piece(piece.subject_ids[rows], piece.sample_ids[rows], *arrays)


def joined(pieces: Sequence[Piece]) -> Piece:
    """The samples of all of them, in their order."""
    return Piece(
        [name for piece in pieces for name in piece.subject_ids],
        [sample_id for piece in pieces for sample_id in piece.sample_ids],
        np.concatenate([piece.vectors_BD for piece in pieces]),
        np.concatenate([piece.qualities_B for piece in pieces]),
        np.concatenate([piece.numbers_B for piece in pieces]),
    )
