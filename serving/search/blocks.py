"""The rows of an index, in blocks that never move: vectors, and of each its subject's number and its sample's id.

A change writes where no search looks yet, or marks rows as gone, and then shows a new `View`; a search takes the view
that it finds, so that neither waits for the other.

Axes: B rows of one call, N rows, M some of them, Q queries, E numbers of a vector, K results of a scan.
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from serving.search.codes import Codes

Vectors = NDArray[np.float32]
Numbers = NDArray[np.int64]

BLOCK_BYTES = 32 * 2**20  # of vectors: few enough that a search of a million rows has 60 blocks, and copied in 10 ms
FIRST_ROWS = 1024  # of the first block; blocks grow with the index
GONE = -1  # in place of a row's subject


def block_rows(width: int, held: int | None = None) -> int:
    """Rows of the next block of an index that holds so many; of the largest block."""
    most = max(FIRST_ROWS, BLOCK_BYTES // (4 * width))
    return most if held is None else min(most, max(FIRST_ROWS, held))


def digest(subject_N: Numbers, sample_N: NDArray[np.uint8]) -> int:
    """Of samples and whose they are, in any order; those of parts add up, modulo 2^64. GONE rows count nothing."""
    low_N, high_N = np.ascontiguousarray(sample_N).view("<u8").T
    return int((low_N * (2 * subject_N.astype(np.uint64) + np.uint64(1)) + high_N).sum()) % 2**64


class Block:
    """Rows in one piece of memory: vectors, subjects' numbers (or GONE), the 16 bytes of the samples' UUIDs.

    `codes`: the vectors in fewer bytes, where these are scanned in their place.
    """

    def __init__(self, vectors_NE: Vectors, subject_N: Numbers, sample_N: NDArray[np.uint8], codes: Codes | None):
        self.vectors_NE, self.subject_N, self.sample_N, self.codes = vectors_NE, subject_N, sample_N, codes

    @classmethod
    def empty(cls, rows: int, width: int, codes: Codes | None) -> "Block":
        return cls(np.empty((rows, width), np.float32), np.empty(rows, np.int64), np.empty((rows, 16), np.uint8), codes)

    def __len__(self) -> int:
        return len(self.subject_N)

    def put(self, at: int, subject_B: Numbers, sample_B: NDArray[np.uint8], vectors_BE: Vectors) -> None:
        part = slice(at, at + len(subject_B))
        self.vectors_NE[part], self.subject_N[part], self.sample_N[part] = vectors_BE, subject_B, sample_B
        if self.codes is not None:
            self.codes = self.codes.put(at, at + len(subject_B), self.vectors_NE)

    def erase(self, rows: Numbers) -> None:
        self.subject_N[rows], self.vectors_NE[rows], self.sample_N[rows] = GONE, 0, 0
        if self.codes is not None:
            self.codes.erase(rows)


Find = Callable[[Block, int], Numbers]  # some of the first rows of a block


def of_subjects(numbers: Sequence[int] | Numbers) -> Find:
    return lambda block, count: np.flatnonzero(np.isin(block.subject_N[:count], numbers))


def of_sample(numbers: Sequence[int] | Numbers, sample_id: bytes) -> Find:
    """The rows of one sample of these subjects."""

    def find(block: Block, count: int) -> Numbers:
        rows = of_subjects(numbers)(block, count)
        same = (block.sample_N[rows] == np.frombuffer(sample_id, np.uint8)).all(axis=1)
        return np.asarray(rows[same], np.int64)

    return find


@dataclass(frozen=True)
class View:
    """What a search sees: the first `counts` rows of each block; `starts` is the number of the first one."""

    blocks: tuple[Block, ...] = ()
    counts: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    rows: int = 0

    @classmethod
    def of(cls, parts: Sequence[tuple[Block, int]]) -> "View":
        counts = tuple(count for _, count in parts)
        return cls(tuple(block for block, _ in parts), counts, tuple(accumulate(counts[:-1], initial=0)), sum(counts))

    def parts(self) -> list[tuple[Block, int]]:
        return list(zip(self.blocks, self.counts, strict=True))

    def place(self, row: int) -> tuple[Block, int]:
        number = bisect.bisect_right(self.starts, row) - 1
        return self.blocks[number], row - self.starts[number]

    def products(self, queries_QE: Vectors, row_QK: Numbers) -> Vectors:
        """Of each query with the vectors of its rows."""
        product_QK = np.empty(row_QK.shape, np.float32)
        number_QK = np.searchsorted(self.starts, row_QK, side="right") - 1
        for number in np.unique(number_QK):
            query_M, place_M = np.nonzero(number_QK == number)
            vectors_ME = self.blocks[number].vectors_NE[row_QK[query_M, place_M] - self.starts[number]]
            product_QK[query_M, place_M] = np.einsum("me,me->m", vectors_ME, queries_QE[query_M])
        return product_QK

    def compacted(self, gone: int) -> tuple["View", int]:
        """The blocks without those that are mostly gone, and how many of the `gone` rows are still in them; what was
        left in a block shares one with the block before it where both are small."""
        kept = list[tuple[Block, int]]()
        for block, count in self.parts():
            live = int(np.count_nonzero(block.subject_N[:count] != GONE))
            if 2 * live > count:
                kept.append((block, count))
                continue
            pieces = [(block, count)]
            if kept and live + kept[-1][1] <= block_rows(block.vectors_NE.shape[1]) // 2:
                pieces.insert(0, kept.pop())
            smaller = _joined(pieces)
            gone -= sum(size for _, size in pieces) - len(smaller)
            if len(smaller):
                kept.append((smaller, len(smaller)))
        return View.of(kept), gone


def _joined(pieces: Sequence[tuple[Block, int]]) -> Block:
    """A block of what is not gone in these."""
    rows = [np.flatnonzero(block.subject_N[:count] != GONE) for block, count in pieces]
    first, total = pieces[0][0], sum(map(len, rows))
    width = first.vectors_NE.shape[1]
    joined, done = Block.empty(total, width, first.codes and first.codes.fresh(total)), 0
    for (block, _), live in zip(pieces, rows, strict=True):
        joined.put(done, block.subject_N[live], block.sample_N[live], block.vectors_NE[live])
        done += len(live)
    return joined
