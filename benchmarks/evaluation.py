"""Verification of many pairs: the exact curve, its band by subject, EER, AUC and TAR with intervals; time and memory.

  python benchmarks/evaluation.py                      # 20,000 x 20,000 = 4e8 scores of different samples, D = 512
  python benchmarks/evaluation.py --samples 100000 --dimension 128   # 1e10 scores of a square, 5e9 pairs

Made-up identities: a random centre each, and noise of such a spread that the EER is about 2 %. Embedding is not part of
it. The peak is that of the whole process, the embeddings included.
"""

import argparse
import math
import resource
import sys
import time
from collections.abc import Iterator

import numpy as np

from trainer.evaluation import evidence, scores, verification
from trainer.evaluation.scores import check


def made_up(samples: int, dimension: int, each: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of `samples / each` identities."""
    generator = np.random.default_rng(0)
    labels = np.arange(samples) // each
    vectors = generator.standard_normal((labels[-1] + 1, dimension), dtype=np.float32)[labels]
    vectors += np.float32(spread) * generator.standard_normal(vectors.shape, dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors, labels


def telling() -> None:
    """From here on, every pass over all pairs tells on stderr how far it is."""
    blocks = scores.pair_blocks

    def told(vectors: np.ndarray, *others: np.ndarray | None) -> Iterator[tuple]:
        for block in blocks(vectors, *others):  # type: ignore[arg-type]
            left = 1 - block[0] / len(vectors)
            print(f"\r{1 - left * left:.0%} of the pairs", end="", file=sys.stderr, flush=True)
            yield block
        print(file=sys.stderr)

    scores.pair_blocks = evidence.pair_blocks = told  # type: ignore[assignment]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scores", type=float, default=4e8, help="different pairs; their samples follow from it")
    parser.add_argument("--samples", type=int, help="instead of --scores")
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--each", type=int, default=10, help="samples of an identity")
    parser.add_argument("--spread", type=float, default=2.2)
    options = parser.parse_args()
    samples = options.samples or math.ceil((1 + math.sqrt(1 + 8 * options.scores)) / 2)
    vectors, labels = check(*made_up(samples, options.dimension, options.each, options.spread))
    verification.MOST_PAIR_SAMPLES = samples
    telling()
    started, before = time.perf_counter(), time.process_time()
    report, curve, _ = verification.verification(vectors, labels, seed=0)
    seconds, cpu = time.perf_counter() - started, time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    pairs = curve.mated + curve.non_mated
    print(f"{samples} samples of {labels[-1] + 1} identities, D = {options.dimension}: {pairs:.3g} pairs")
    print(f"{seconds:.1f} s, {cpu:.1f} s of cores, peak {peak:.2f} GiB, {len(curve.thresholds_T)} thresholds")
    print(f"EER {report.eer:.4%} ({report.eer_interval[0]:.4%} to {report.eer_interval[1]:.4%}), AUC {report.auc:.6f}")
    for point in report.tar_at_far:
        shown = f"{point.tar:.4%} ({point.low:.4%} to {point.high:.4%})" if point.tar is not None else point.reason
        print(f"TAR at FAR {point.far:g}: {shown}")


if __name__ == "__main__":
    main()
