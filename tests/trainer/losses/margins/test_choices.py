"""Where papers, their authors' code and the edges of a formula leave a choice: the one that is taken."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.trainer.losses.margins.curves import ANGLES, plain, slope
from trainer.losses import AdaFace, ArcFace, CurricularFace, ElasticFace, MagFace, Margin, MVSoftmax, NormFace


def test_each_kind_has_its_papers_default() -> None:
    assert (ElasticFace().margin, ElasticFace(kind="cos").margin) == (0.5, 0.35)
    assert (MVSoftmax().margin, MVSoftmax(kind="arc").margin) == (0.35, 0.5)
    assert MVSoftmax().scale == 32
    assert ElasticFace(kind="cos", margin=0.2).margin == 0.2
    assert MVSoftmax(kind="arc", margin=0.2).margin == 0.2


def test_elasticface_has_the_deviation_that_its_authors_train_with() -> None:
    given = [ElasticFace(kind=kind, plus=plus).sigma for plus in (False, True) for kind in ("arc", "cos")]
    assert given == [0.05, 0.05, 0.0175, 0.02]
    assert ElasticFace(plus=True, sigma=0.1).sigma == 0.1


def test_elasticface_plus_deals_the_greatest_margin_to_the_furthest_sample() -> None:
    cos_B = torch.tensor([0.9, -0.3, 0.0, 0.5, 0.7], dtype=torch.float64)
    noise_B = torch.tensor([2.0, -1.0, 9.0, 0.5, 1.0], dtype=torch.float64)
    labels_B = torch.tensor([0, 1, -1, 2, 0])  # the third is padding
    given = replace(plain(cos_B, noise_B=noise_B), labels_B=labels_B, batch_cos_B=cos_B)
    margin = ElasticFace(kind="cos", plus=True, scale=1.0, sigma=0.1)
    margins_B = cos_B - margin.target(given)
    dealt = [0.35 + 0.1 * noise for noise in (-1.0, 2.0, 9.0, 1.0, 0.5)]
    assert margins_B.tolist() == pytest.approx(dealt)
    assert margin.compares_samples
    assert not ElasticFace().compares_samples


@pytest.mark.parametrize(
    ("margin", "far"),
    [
        (MVSoftmax(scale=1.0, easy_margin=True), MVSoftmax(scale=1.0)),
        (MVSoftmax(scale=1.0, kind="arc", easy_margin=True), MVSoftmax(scale=1.0, kind="arc")),
        (MagFace(scale=1.0, easy_margin=True), MagFace(scale=1.0)),
    ],
    ids=["am", "arc", "magface"],
)
def test_an_easy_margin_spares_samples_beyond_a_right_angle(margin: Margin, far: Margin) -> None:
    cos_B = ANGLES.cos()
    found, expected = margin.target(plain(cos_B)), far.target(plain(cos_B))
    torch.testing.assert_close(found[cos_B > 0], expected[cos_B > 0])
    torch.testing.assert_close(found[cos_B <= 0], cos_B[cos_B <= 0])
    assert bool((expected < cos_B).all())
    if isinstance(margin, MVSoftmax):  # what is hard is measured with the margin, spared or not
        torch.testing.assert_close(margin.hard_from(plain(cos_B)), expected)


def test_a_learned_scale_counts_as_the_least_where_it_is_less_and_still_learns() -> None:
    for value, counted in ((9.0, 9.0), (0.001, 0.01), (-1.0, 0.01)):
        scale = torch.tensor(value, requires_grad=True)
        found = NormFace(learnable=True).scale_of({"scale": scale})
        assert isinstance(found, Tensor)
        found.backward()
        assert float(found.detach()) == pytest.approx(counted)
        assert scale.grad == 1


def test_adaface_beyond_its_edges() -> None:
    """Nearer than m z the target does not change; beyond pi it goes on falling, with a derivative."""
    values = {"norm_mean": torch.tensor(20.0), "norm_std": torch.tensor(1.0)}
    margin = AdaFace(scale=1.0, margin=0.4, concentration=10.0)
    near = torch.tensor([0.1, 0.3], dtype=torch.float64)
    good = plain(near.cos(), norms_B=torch.full((2,), 30.0), values=values)  # z = 1
    assert margin.target(good).tolist() == pytest.approx([1 - 0.8] * 2)
    far = torch.tensor([2.9, 3.1], dtype=torch.float64)  # theta + 0.4 > pi

    def of_poor(cos: Tensor) -> Tensor:
        return margin.target(plain(cos, norms_B=torch.full((2,), 10.0), values=values))  # z = -1

    found, gradient = slope(of_poor, far.cos())
    assert found.tolist() == pytest.approx([-2 - math.cos(theta + 0.4) for theta in far.tolist()])
    assert bool((gradient > 0).all())


def test_momentum_is_the_share_of_the_old_value() -> None:
    """In every running statistic; a new batch weighs 0.01 by default."""
    norms, valid = torch.tensor([9.0, 11.0, 10.0, 10.0]), torch.ones(4, dtype=torch.bool)
    values = {"norm_mean": torch.tensor(20.0), "norm_std": torch.tensor(100.0), "t": torch.tensor(0.5)}
    cos = torch.full((4,), 0.9)
    for momentum, new in ((0.99, 0.01), (0.0, 1.0), (0.7, 0.3)):
        spec = AdaFace() if momentum == 0.99 else AdaFace(momentum=momentum)
        found = spec.observe(norms, None, valid, values)
        assert float(found["norm_mean"]) == pytest.approx(20 + new * (10 - 20))
        assert float(found["norm_std"]) == pytest.approx(100 + new * (math.sqrt(2 / 3) - 100), rel=1e-5)
        t = CurricularFace(momentum=momentum).observe(norms, cos, valid, values)["t"]
        assert float(t) == pytest.approx(0.5 + new * (0.9 - 0.5))


def test_adaface_statistics_leave_padding_out() -> None:
    values = {"norm_mean": torch.tensor(20.0), "norm_std": torch.tensor(100.0)}
    norms = torch.tensor([3.0, 5.0, 99.0])
    new = AdaFace(momentum=0.0).observe(norms, None, torch.tensor([True, True, False]), values)
    assert float(new["norm_mean"]) == pytest.approx(4)
    assert float(new["norm_std"]) == pytest.approx(2**0.5, rel=1e-5)
    alone = AdaFace().observe(norms, None, torch.tensor([True, False, False]), values)
    assert {key: float(value) for key, value in alone.items()} == {"norm_mean": 20.0, "norm_std": 100.0}


def test_arcface_beyond_pi_is_continuous_and_smooth() -> None:
    beside = torch.tensor([math.pi - 0.5 - 1e-7, math.pi - 0.5 + 1e-7], dtype=torch.float64)
    values, gradient = slope(lambda cos: ArcFace(scale=1.0).target(plain(cos)), beside.cos())
    assert values.tolist() == pytest.approx([-1, -1])
    assert gradient.tolist() == pytest.approx([0, 0], abs=1e-6)
    far, _ = slope(lambda cos: ArcFace(scale=1.0).target(plain(cos)), torch.tensor([3.0], dtype=torch.float64).cos())
    assert far.tolist() == pytest.approx([-2 - math.cos(3.5)])
