"""From an Embedder's calibration, or an operator's option, to the rule by which the service decides.

The service never guesses a threshold: without a calibration, and without an option, it does not start.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from trainer.embedder import EmbedderManifest
from trainer.errors import UserError
from trainer.evaluation.curve import HIGHEST_RATE, LEAST_HITS, Curve, Reached
from trainer.evaluation.report import Threshold


@dataclass(frozen=True)
class Rule:
    """Scores at or above `value` are a match.

    Attributes:
        source: where the value came from, in words.
        rate: the FMR (verify) or FPIR (identify) it was calibrated for; None: set by hand, not known.
        interval: bounds of the rate that the calibration reached.
        gallery_size: subjects in the gallery it was calibrated for (identify).
        curve: the thresholds of galleries of other sizes; None: there is only the one.
        extrapolated: fewer than one false positive is expected among the samples that the value rests on.
    """

    value: float
    source: str
    rate: float | None = None
    interval: tuple[float, float] | None = None
    gallery_size: int | None = None
    curve: Curve | None = None
    extrapolated: bool = False

    def matches(self, score: float) -> bool:
        return score >= self.value

    def at(self, gallery_size: int, rate: float | None = None) -> "Rule":
        """The rule for a gallery of the size that it has, by the curve; this one where there is none.

        Args:
            rate: an FPIR to take instead of the calibrated one.

        Raises:
            UserError: a `rate` that the calibration does not know: without a curve, or one with too few expected
                false positives. The calibrated rate is followed to any size, and the source says when it is too far.
        """
        size = max(gallery_size, 1)
        if self.curve is None or self.rate is None:
            if rate is None or rate == self.rate:
                return self
            raise UserError(f"no FPIR can be chosen: {self.source}; run 'hypersphere calibrate' on the embedder")
        if rate is not None:
            self.curve.at(size, rate)
        rate = self.rate if rate is None else rate
        if (size, rate) == (self.gallery_size, self.rate):
            return self
        found = _reached(self.curve, size, rate)
        source = f"{self.source}; by its curve for FPIR {rate:g} at {size} enrolled"
        if extrapolated := found.expected_hits < LEAST_HITS:
            source += (
                f", extrapolated: {found.expected_hits:.2g} false positives expected among the samples it rests on"
            )
        return replace(
            self,
            value=found.value,
            source=source,
            rate=rate,
            interval=(found.low, found.high),
            gallery_size=size,
            extrapolated=extrapolated,
        )

    def lowest(self, gallery_size: int) -> float | None:
        """The lowest FPIR that `at` takes in a gallery of this size; None where it takes none but the calibrated."""
        if self.curve is None or self.curve.expected_hits(max(gallery_size, 1), HIGHEST_RATE) < LEAST_HITS:
            return None
        low, high = 0.0, HIGHEST_RATE
        for _ in range(40):
            middle = (low + high) / 2
            enough = self.curve.expected_hits(max(gallery_size, 1), middle) >= LEAST_HITS
            low, high = (low, middle) if enough else (middle, high)
        return high

    def rate_at(self, gallery_size: int) -> float | None:
        """FPIR to expect in a gallery of another size where there is no curve: 1 - (1 - FPIR)^(N / N0).

        This is FPIR = 1 - (1 - FMR)^N, which holds for independent comparisons, solved for FMR at the calibrated N0.
        Real comparisons of one probe depend on each other, so it is an upper bound for N > N0, and a lower one for
        N < N0.
        """
        if self.rate is None or self.gallery_size is None:
            return None
        return float(1.0 - (1.0 - self.rate) ** (gallery_size / self.gallery_size))

    def explain(self, gallery_size: int) -> str:
        """`source`, and what it means that the gallery holds `gallery_size` subjects now."""
        expected = self.rate_at(gallery_size)
        if expected is None or max(gallery_size, 1) == self.gallery_size:
            return self.source
        bound = "at most" if gallery_size > (self.gallery_size or 0) else "at least"
        return (
            f"{self.source}; it was calibrated for {self.gallery_size} subjects and the gallery holds {gallery_size}, "
            f"where FPIR is {bound} about {expected:.2g}: calibrate for this size"
        )


@lru_cache(maxsize=1024)
def _reached(curve: Curve, gallery_size: int, rate: float) -> Reached:
    return curve.at(gallery_size, rate, least_hits=0.0)


def rules(manifest: EmbedderManifest, verify: float | None, identify: float | None) -> tuple[Rule, Rule]:
    """The rules for verify (1:1) and identify (1:N): the operator's values where given, else the calibration's.

    Raises:
        UserError: a value is missing, cannot be a similarity, or was calibrated for another model.
    """
    calibration = manifest.calibration
    return (
        _rule(manifest, "verify", verify, calibration.verify if calibration else None, None),
        _rule(
            manifest,
            "identify",
            identify,
            *((calibration.identify, calibration.curve) if calibration else (None, None)),
        ),
    )


def _rule(
    manifest: EmbedderManifest, use: str, by_hand: float | None, calibrated: Threshold | None, curve: Curve | None
) -> Rule:
    if by_hand is not None:
        if not -1.0 <= by_hand <= 1.0001:
            raise UserError(f"the {use} threshold {by_hand} is not a cosine similarity; allowed is -1 to 1.0001")
        return Rule(by_hand, "set by the operator, not calibrated: its error rates are not known")
    if calibrated is None:
        raise UserError(
            f"the embedder {manifest.model_id} has no calibration, so there is no threshold to {use} by; "
            f"run 'hypersphere calibrate' on it, or give one with --{use}-threshold"
        )
    if calibrated.model_id != manifest.model_id:
        raise UserError(
            f"the {use} threshold was calibrated for model {calibrated.model_id}, but the embedder is model "
            f"{manifest.model_id}; run 'hypersphere calibrate' on this embedder"
        )
    wanted, size = ("FMR", None) if use == "verify" else ("FPIR", calibrated.gallery_size)
    if calibrated.target != wanted:
        raise UserError(
            f"the {use} threshold was calibrated for {calibrated.target}; {use} needs one for {wanted}: "
            "run 'hypersphere calibrate' again"
        )
    source = f"calibrated for {wanted} {calibrated.rate:g}: {calibrated.source}"
    interval = calibrated.low, calibrated.high
    return Rule(calibrated.value, source, calibrated.rate, interval, size, curve)
