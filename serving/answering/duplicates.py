"""Subjects of a gallery who look like one another: every sample is searched for among all the others.

Compared with one search, the thread that does this gives way: it works on few samples at a time, and its priority is
low. Samples that come or go meanwhile may be missed, or be in it.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from serving.gallery import Gallery
from serving.search.index import Candidate

Vectors = NDArray[np.float32]
A_SCAN = 32  # samples searched for together: as many as are searched for at once when many clients ask
FIRST_DEPTH = 8  # subjects looked at beside the sample's own


class Pairs:
    """The best pairs of subjects: (one, another) with the best score of their samples, at most about `most`."""

    def __init__(self) -> None:
        self.scores = dict[tuple[str, str], float]()
        self.truncated = False

    def add(self, one: str, another: str, score: float, most: int) -> None:
        pair = (min(one, another), max(one, another))
        self.scores[pair] = max(score, self.scores.get(pair, score))
        if len(self.scores) > 2 * most:
            self.truncated, self.scores = True, dict(self.best(most))

    def best(self, most: int) -> list[tuple[tuple[str, str], float]]:
        """Highest scores first."""
        return sorted(self.scores.copy().items(), key=lambda item: (-item[1], item[0]))[:most]


def duplicates(
    gallery: Gallery, threshold: float, most: int, pairs: Pairs, progress: Callable[[int, int], object]
) -> None:
    """Add the pairs of subjects with samples that score at or above `threshold` to `pairs`.

    Args:
        progress: told of (samples done, samples in all), many times a second; what it raises ends the work.
    """
    done = 0
    progress(done, gallery.samples)
    for piece in gallery.pieces():
        for start in range(0, len(piece.vectors_BD), A_SCAN):
            part = slice(start, start + A_SCAN)
            names, vectors_BD = piece.subject_ids[part], piece.vectors_BD[part]
            for name, others in zip(names, _above(gallery, vectors_BD, threshold, most), strict=True):
                for other in others:
                    if other.subject_id != name:
                        pairs.add(name, other.subject_id, other.score, most)
            progress(done := done + len(names), max(done, gallery.samples))


def _above(gallery: Gallery, vectors_BD: Vectors, threshold: float, most: int) -> list[list[Candidate]]:
    """The subjects at or above the threshold for each vector, itself among them; looks deeper where there are more."""
    depth, found = FIRST_DEPTH, list[list[Candidate]]()
    while True:
        found = [
            [one for one in candidates if one.score >= threshold] for candidates in gallery.nearest(vectors_BD, depth)
        ]
        if max(map(len, found)) < depth or depth > most:
            return found
        depth *= 4
