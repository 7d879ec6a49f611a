"""From an Embedder's calibration, or an operator's option, to the rule by which the service decides.

The service never guesses a threshold: without a calibration, and without an option, it does not start.
"""

from dataclasses import dataclass

from trainer.embedder import EmbedderManifest
from trainer.errors import UserError
from trainer.evaluation.report import Threshold


@dataclass(frozen=True)
class Rule:
    """Scores at or above `value` are a match.

    Attributes:
        source: where the value came from, in words.
        rate: the FMR (verify) or FPIR (identify) it was calibrated for; None: set by hand, not known.
        interval: bounds of the rate that the calibration reached.
        gallery_size: subjects in the gallery it was calibrated for (identify).
    """

    value: float
    source: str
    rate: float | None = None
    interval: tuple[float, float] | None = None
    gallery_size: int | None = None

    def matches(self, score: float) -> bool:
        return score >= self.value

    def rate_at(self, gallery_size: int) -> float | None:
        """FPIR to expect in a gallery of another size: 1 - (1 - FPIR)^(N / N0).

        This is FPIR = 1 - (1 - FMR)^N, which holds for independent comparisons, solved for FMR at the calibrated N0.
        Real comparisons of one probe depend on each other, so it is an upper bound for N > N0.
        """
        if self.rate is None or self.gallery_size is None:
            return None
        return float(1.0 - (1.0 - self.rate) ** (gallery_size / self.gallery_size))

    def explain(self, gallery_size: int) -> str:
        """`source`, and what it means that the gallery holds `gallery_size` subjects now."""
        expected = self.rate_at(gallery_size)
        if expected is None or gallery_size == self.gallery_size:
            return self.source
        advice = " or less: calibrate for this size" if gallery_size > (self.gallery_size or 0) else ""
        return (
            f"{self.source}; it was calibrated for {self.gallery_size} subjects and the gallery holds {gallery_size}, "
            f"where FPIR is about {expected:.2g}{advice}"
        )


def rules(manifest: EmbedderManifest, verify: float | None, identify: float | None) -> tuple[Rule, Rule]:
    """The rules for verify (1:1) and identify (1:N): the operator's values where given, else the calibration's.

    Raises:
        UserError: a value is missing, cannot be a similarity, or was calibrated for another model.
    """
    calibration = manifest.calibration
    return (
        _rule(manifest, "verify", verify, calibration.verify if calibration else None),
        _rule(manifest, "identify", identify, calibration.identify if calibration else None),
    )


def _rule(manifest: EmbedderManifest, use: str, by_hand: float | None, calibrated: Threshold | None) -> Rule:
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
    return Rule(calibrated.value, source, calibrated.rate, (calibrated.low, calibrated.high), size)
