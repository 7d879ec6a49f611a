"""A pass over the blocks of an index by FAISS: the highest scores of each query, and their rows.

Axes: Q queries, N rows, E numbers of a vector, K results.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import faiss
import numpy as np
from numpy.typing import NDArray

from serving.search.blocks import View
from serving.search.codes import Form, Queries

Vectors = NDArray[np.float32]
Numbers = NDArray[np.int64]
Flags = NDArray[np.bool_]

# FAISS multiplies matrices instead of scanning query by query from this many queries x E on. Its default never does so
# below 250 queries at E = 512; a batch of 8 gains a factor of two.
BLAS_THRESHOLD = 2048


@dataclass(frozen=True)
class Found:
    """The K rows of each query with the highest scores, or bounds of scores, falling. `subject_QK`: their numbers as
    they were after the scan."""

    score_QK: Vectors
    row_QK: Numbers
    subject_QK: Numbers

    def best(self, depth: int) -> "Found":
        """The first `depth` when they are not in order yet."""
        if self.score_QK.shape[1] > depth:
            some_QK = np.argpartition(-self.score_QK, depth - 1, axis=1)[:, :depth]
            return self._taken(some_QK).best(depth)
        return self._taken(np.argsort(-self.score_QK, axis=1, kind="stable"))

    def of(self, query: int) -> tuple[list[float], list[int], list[int]]:
        """Scores, rows and subjects of one query."""
        return self.score_QK[query].tolist(), self.row_QK[query].tolist(), self.subject_QK[query].tolist()

    def _taken(self, place_QK: Numbers) -> "Found":
        return Found(*(np.take_along_axis(array, place_QK, axis=1) for array in vars(self).values()))

    @classmethod
    def joined(cls, parts: Iterable["Found"]) -> "Found":
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(np.concatenate(arrays, axis=1) for arrays in columns))


@dataclass(frozen=True)
class Scan:
    """What is looked for. `allowed`: by subject's number, whether its rows count; its last entry stands for GONE."""

    queries_QE: Vectors
    depth: int
    form: Form = "exact"
    allowed: Flags | None = None

    @cached_property
    def _coded(self) -> Queries:
        return Queries.of(self.queries_QE, self.form)

    def deeper(self, query_E: Vectors) -> "Scan":
        """For one query alone, and more of its rows."""
        return replace(self, queries_QE=query_E[None], depth=4 * self.depth)

    def run(self, view: View, numbers: range) -> Found:
        """The highest scores in these blocks. Called in a thread of its own for each share of the blocks."""
        faiss.cvar.distance_compute_blas_threshold = BLAS_THRESHOLD
        faiss.omp_set_num_threads(1)  # OpenMP keeps this number per calling thread
        found = [self._block(view, number) for number in numbers]
        return Found.joined(found).best(self.depth)

    def _block(self, view: View, number: int) -> Found:
        block, count = view.blocks[number], view.counts[number]
        subject_N, codes, selector, most = block.subject_N[:count], block.codes, None, count
        if self.allowed is not None:
            allowed_N = self.allowed[subject_N]
            most = int(np.count_nonzero(allowed_N))
            selector = faiss.IDSelectorBitmap(np.packbits(allowed_N, bitorder="little"))  # type: ignore[call-arg, arg-type]
        depth = min(most, self.depth)
        score_QK = np.empty((len(self.queries_QE), depth), np.float32)
        row_QK = np.empty(score_QK.shape, np.int64)
        if depth and codes is None:
            _exact(self.queries_QE, block.vectors_NE[:count], score_QK, row_QK, selector)
        elif depth and codes is not None:
            score_QK = codes.scan(self._coded, count, score_QK, row_QK, selector)
        return Found(score_QK, row_QK + view.starts[number], subject_N[row_QK])


def _exact(
    queries_QE: Vectors,
    vectors_NE: Vectors,
    score_QK: Vectors,
    row_QK: Numbers,
    selector: "faiss.IDSelector | None",
) -> None:
    """`faiss.knn` with a selector."""
    (queries, width), rows, results = queries_QE.shape, len(vectors_NE), score_QK.shape[1]
    arrays = faiss.swig_ptr(queries_QE), faiss.swig_ptr(vectors_NE), width, queries, rows, results
    faiss.knn_inner_product(*arrays, faiss.swig_ptr(score_QK), faiss.swig_ptr(row_QK), selector)
