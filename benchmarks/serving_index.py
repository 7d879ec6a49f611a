"""What a search costs in each form of the index, beside a flat index of FAISS alone: seconds of one core.

    python benchmarks/serving_index.py [--rows 200000] [--batch 1 32] [--rounds 5]

Rows of 512 numbers; half of the probes are mated, at a score of 0.6. The contenders take turns; the seconds are those
of the thread, which a busy machine leaves alone. *a tenth*: the exact index with a filter that allows every tenth
subject. *alike*: the share of probes whose five candidates are those of the exact index.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.serving import DIMENSION, unit_vectors  # noqa: E402
from serving.search.codes import Form  # noqa: E402
from serving.search.index import Candidate, Index  # noqa: E402

FORMS: tuple[Form, ...] = ("exact", "fp16", "int8")
TOP_K, AT_ONCE = 5, 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    flat, indexes = faiss.IndexFlatIP(DIMENSION), {form: Index(DIMENSION, form=form) for form in FORMS}
    x_ND, noise_QD = unit_vectors(options.rows, seed=2), unit_vectors(max(options.batch), seed=3)
    flat.add(x_ND)
    for first in range(0, options.rows, AT_ONCE):
        numbers = range(first, min(options.rows, first + AT_ONCE))
        names, ids = [f"s{number}" for number in numbers], [number.to_bytes(16) for number in numbers]
        for index in indexes.values():
            index.add(names, ids, x_ND[first : first + AT_ONCE], np.arange(first, first + len(names)))
    probes_QD = noise_QD.copy()
    probes_QD[::2] = 0.6 * x_ND[: len(noise_QD) : 2] + 0.8 * noise_QD[::2]
    probes_QD /= np.linalg.norm(probes_QD, axis=1, keepdims=True)
    tenth_S = np.arange(0, options.rows, 10)
    print("| batch | FAISS ms | " + " | ".join(f"{form} ms" for form in FORMS) + " | a tenth ms |")
    for batch in options.batch:
        some_QD, exact = probes_QD[:batch], indexes["exact"]
        tasks: list[Callable[[], object]] = [lambda: flat.search(some_QD, TOP_K + 32)]  # noqa: B023
        tasks += [lambda index=index: index.search(some_QD, TOP_K) for index in indexes.values()]  # type: ignore[misc]  # noqa: B023
        tasks.append(lambda: exact.search(some_QD, TOP_K, tenth_S))  # noqa: B023
        rounds = [[seconds(task) for task in tasks] for _ in range(options.rounds)]
        medians = [f"{1000 * statistics.median(column):.1f}" for column in zip(*rounds, strict=True)]
        print(f"| {batch} | " + " | ".join(medians) + " |", flush=True)
    right = names_of(indexes["exact"].search(probes_QD, TOP_K))
    for form in FORMS[1:]:
        alike = [
            one == other for one, other in zip(names_of(indexes[form].search(probes_QD, TOP_K)), right, strict=True)
        ]
        print(f"{form}: alike {np.mean(alike):.3f}")


def names_of(found: list[list[Candidate]]) -> list[list[str]]:
    return [[candidate.subject_id for candidate in one] for one in found]


def seconds(task: Callable[[], object]) -> float:
    faiss.cvar.distance_compute_blas_threshold = 2048
    faiss.omp_set_num_threads(1)
    start = time.thread_time()
    task()
    return time.thread_time() - start


if __name__ == "__main__":
    main()
