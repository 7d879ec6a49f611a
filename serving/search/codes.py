"""Vectors in fewer bytes, and how far off a score from them can be.

A scan reads the codes of all rows; the scores that decide are of the vectors themselves. With x' and q' for what the
codes of a vector x and of a query q stand for,

    q.x <= q'.x' + |q - q'| |x'| + |q| |x - x'|        (Cauchy and Schwarz, twice)

so that a row whose bound does not reach the scores that were found cannot beat them: the result is the exact one.

Axes: B rows of one call, N rows, Q queries, E numbers of a vector, C bytes of a code.
"""

from dataclasses import dataclass
from typing import Literal

import faiss
import numpy as np
from numpy.typing import NDArray

Form = Literal["exact", "fp16", "int8"]
Vectors = NDArray[np.float32]

LEVELS = 127  # of an 8-bit number, on either side of zero
ROOM = 1.25  # 8-bit codes stand for numbers up to so many times the largest so far, and are seldom made anew
SLACK = 1e-6  # of sums in another order
BYTES = {"fp16": 2, "int8": 1}  # of a number
KINDS = {"fp16": faiss.ScalarQuantizer.QT_fp16, "int8": faiss.ScalarQuantizer.QT_8bit_direct_signed}
ROWS_AT_ONCE = 1024  # whose rounding stays in the processor's cache


class Codes:
    """Codes of a block's rows, in memory of their own.

    Attributes:
        scale: of 8-bit codes: LEVELS over the largest number that they stand for.
        off: the largest |x - x'| of the rows.
        longest: the largest |x'|.
    """

    def __init__(self, form: Form, rows: int, width: int, scale: float = 0.0) -> None:
        self.form, self.scale, self.off, self.longest = form, scale, 0.0, 0.0
        self._index = faiss.IndexScalarQuantizer(width, KINDS[form], faiss.METRIC_INNER_PRODUCT)
        self._index.codes.resize(rows * width * BYTES[form])
        self._index.ntotal = rows
        code_N = faiss.rev_swig_ptr(self._index.codes.data(), rows * width * BYTES[form])
        self.code_NC: NDArray[np.uint8] = code_N.reshape(rows, width * BYTES[form])

    def fresh(self, rows: int) -> "Codes":
        """Of the same form, for so many rows."""
        return Codes(self.form, rows, self.code_NC.shape[1] // BYTES[self.form])

    def put(self, start: int, end: int, vectors_NE: Vectors) -> "Codes":
        """Encode these rows of a block's vectors.

        Returns:
            Those to use from now on: others where the numbers of the new rows are too large for the scale. Searches go
            on with the ones that they have.
        """
        peak = float(np.abs(vectors_NE[start:end]).max(initial=1e-6)) if self.form == "int8" else 0.0
        codes, first = self, start
        if peak * self.scale > LEVELS or (self.form == "int8" and not self.scale):
            codes = Codes(self.form, len(self.code_NC), vectors_NE.shape[1], LEVELS / (ROOM * peak))
            first = 0
        for at in range(first, end, ROWS_AT_ONCE):
            codes._encode(at, vectors_NE[at : min(end, at + ROWS_AT_ONCE)])
        return codes

    def _encode(self, at: int, x_BE: Vectors) -> None:
        if self.form == "int8":
            level_BE = np.rint(x_BE * np.float32(self.scale))
            self.code_NC[at : at + len(x_BE)] = level_BE + (LEVELS + 1)
            near_BE = level_BE / np.float32(self.scale)
        else:
            half_BE = x_BE.astype(np.float16)
            self.code_NC[at : at + len(x_BE)] = half_BE.view(np.uint8)
            near_BE = half_BE.astype(np.float32)
        self.longest = max(self.longest, float(np.linalg.norm(near_BE, axis=1).max()))
        self.off = max(self.off, float(np.linalg.norm(x_BE - near_BE, axis=1).max()))

    def scan(
        self,
        queries: "Queries",
        count: int,
        score_QK: Vectors,
        row_QK: NDArray[np.int64],
        selector: "faiss.IDSelector | None",
    ) -> Vectors:
        """Find the K highest products with the first `count` codes, or with those of them that are selected; the most
        that the scores of their rows can be."""
        if selector is None and count < len(self.code_NC):  # rows that came after the search began are none of it
            selector = faiss.IDSelectorRange(0, count)
        parameters = None if selector is None else faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
        self._index.search(queries.near_QE, score_QK.shape[1], params=parameters, D=score_QK, I=row_QK)
        near_QK = score_QK / queries.scale_Q1 / np.float32(self.scale or 1.0)
        off_Q1 = queries.off_Q1 * self.longest + queries.length_Q1 * self.off + SLACK
        return near_QK + off_Q1.astype(np.float32)

    def erase(self, rows: NDArray[np.int64]) -> None:
        self.code_NC[rows] = LEVELS + 1 if self.form == "int8" else 0


@dataclass(frozen=True)
class Queries:
    """Queries as codes are scanned for them: q' times `scale_Q1`, |q - q'| and |q|."""

    near_QE: Vectors
    scale_Q1: Vectors
    off_Q1: Vectors
    length_Q1: Vectors

    @classmethod
    def of(cls, queries_QE: Vectors, form: Form) -> "Queries":
        one_Q1 = np.ones((len(queries_QE), 1), np.float32)
        length_Q1 = np.linalg.norm(queries_QE, axis=1, keepdims=True)
        if form != "int8":
            return cls(queries_QE, one_Q1, 0 * one_Q1, length_Q1)
        scale_Q1 = LEVELS / np.maximum(np.abs(queries_QE).max(axis=1, keepdims=True), np.float32(1e-6))
        near_QE = np.rint(queries_QE * scale_Q1)
        off_Q1 = np.linalg.norm(queries_QE - near_QE / scale_Q1, axis=1, keepdims=True)
        return cls(near_QE, scale_Q1, off_Q1, length_Q1)
