"""Whether the scores of strangers are still those of the calibration: their distribution, compared bin by bin.

The best score s of a search that found nobody, in a gallery of N subjects, with the threshold t, lies between the start
s0 of the calibration's tail and t with the probability

    P(S <= s | s0 <= S < t) = (R(s0, N) - R(s, N)) / (R(s0, N) - R(t, N)),

where R is the FPIR that the calibration's curve gives for a threshold. So this number is uniform on 0 to 1 as long as
strangers are like those of the calibration, whatever N was at the time of each search.
"""

import threading
from collections import deque

import numpy as np

from trainer.evaluation.curve import Curve

BINS, WINDOW, FEWEST = 10, 2000, 200  # the last so many searches count; fewer tell nothing


class Drift:
    """Watches the searches of one collection. `observe` may be called from several threads."""

    def __init__(self, curve: Curve | None) -> None:
        self._curve = curve
        self._lock = threading.Lock()
        self._counts = np.zeros(BINS, np.int64)
        self._last: deque[int] = deque()

    def observe(self, score: float, threshold: float, gallery_size: int) -> None:
        """The best score of a search; one at or above the threshold, or below the curve, is not compared."""
        curve = self._curve
        if curve is None or not curve.start <= score < threshold or not gallery_size:
            return
        highest, lowest = curve.rate_at(curve.start, gallery_size), curve.rate_at(threshold, gallery_size)
        if highest <= lowest:
            return
        share = (highest - curve.rate_at(score, gallery_size)) / (highest - lowest)
        place = min(BINS - 1, max(0, int(share * BINS)))
        with self._lock:
            self._last.append(place)
            self._counts[place] += 1
            if len(self._last) > WINDOW:
                self._counts[self._last.popleft()] -= 1

    @property
    def searches(self) -> int:
        """That are compared now."""
        return len(self._last)

    def stability(self) -> float:
        """The population stability index, sum over bins of (p - q) ln(p / q) with q = 1/10; NaN of too few searches.

        Where nothing has changed its mean is (bins - 1) / searches. By custom 0.1 asks for a look, and 0.25 for action
        (Siddiqi 2006, "Credit risk scorecards"). Half a search more in each bin keeps it finite.
        """
        with self._lock:
            counts = self._counts + 0.5
        if self.searches < FEWEST:
            return float("nan")
        shares = counts / counts.sum()
        return float(((shares - 1 / BINS) * np.log(shares * BINS)).sum())

    def shift(self) -> float:
        """Largest difference of the distribution functions (Kolmogorov and Smirnov), negative where scores are higher
        than the calibration's: then more strangers are taken for somebody than was promised."""
        with self._lock:
            counts = self._counts.copy()
        if self.searches < FEWEST:
            return float("nan")
        apart = counts.cumsum() / counts.sum() - np.arange(1, BINS + 1) / BINS
        return float(apart[np.abs(apart).argmax()])
