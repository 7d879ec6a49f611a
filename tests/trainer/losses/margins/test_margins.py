"""The margins as functions of the angle: values, derivatives, edges, monotony, bounds, and what they refuse."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.losses.margins.curves import ANGLES, plain, slope
from trainer.errors import UserError
from trainer.losses import (
    LOSSES,
    AdaFace,
    ArcFace,
    ASoftmax,
    CoCo,
    Combined,
    CosFace,
    CurricularFace,
    DynamicMargin,
    ElasticFace,
    Focal,
    L2Softmax,
    LSoftmax,
    MagFace,
    Margin,
    MVSoftmax,
    NormFace,
    SubCenterArcFace,
    WeightedSoftmax,
    by_name,
)
from trainer.losses.bounds import cosface_scale, l2_softmax_scale
from trainer.losses.margins import (
    SINE_GUARD,
    angle,
    chebyshev,
    monotone_cosine,
    sine_of,
)

MARGIN_NAMES = [
    *("softmax", "weighted_softmax", "focal", "modified_softmax", "l_softmax", "a_softmax", "l2_softmax", "normface"),
    *("cosface", "arcface", "combined", "sub_center_arcface", "adaface", "magface", "elasticface", "dynamic"),
    *("curricularface", "mv_softmax"),
]


def test_every_margin_of_the_family_can_be_named() -> None:
    named = by_name()
    for name in MARGIN_NAMES:
        assert issubclass(named[name], Margin)
        assert named[name].formula
        assert named[name].source
        assert named[name].__doc__
    assert len(named) == len(LOSSES)


@pytest.mark.parametrize(
    ("factor", "offset"), [(1.0, 0.5), (2.0, 0.0), (3.0, 0.0), (4.0, 0.0), (1.35, 0.3), (3.0, 0.2)]
)
def test_derivatives_are_those_of_the_formula(factor: float, offset: float) -> None:
    """d psi / d cos = (-1)^k factor sin(phi) / sin(theta)."""
    values, gradient = slope(lambda cos: monotone_cosine(cos, factor, offset), ANGLES.cos())
    for theta, value, found in zip(ANGLES.tolist(), values.tolist(), gradient.tolist(), strict=True):
        phi = factor * theta + offset
        k = int(phi // math.pi)
        assert value == pytest.approx((-1) ** k * math.cos(phi) - 2 * k, abs=1e-12)
        assert found == pytest.approx((-1) ** k * factor * math.sin(phi) / math.sin(theta), abs=1e-9)


def test_arcface_has_the_factor_that_its_peers_leave_out() -> None:
    angles = torch.tensor([20.0, 40.0, 60.0], dtype=torch.float64).deg2rad()
    _, gradient = slope(lambda cos: ArcFace(scale=1.0).target(plain(cos)), angles.cos())
    assert gradient.tolist() == pytest.approx([2.18, 1.45, 1.15], abs=0.02)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_multiples_of_the_angle_are_exact_at_the_edges(m: int) -> None:
    """At theta = 0 and pi the slope is m^2; at k pi / m, where two branches meet, both value and slope agree."""
    edges = torch.tensor([1.0, -1.0], dtype=torch.float64)
    values, gradient = slope(lambda cos: monotone_cosine(cos, float(m)), edges)
    assert values.tolist() == pytest.approx([1, (-1) ** (m - 1) * (-1) ** m - 2 * (m - 1)])
    assert gradient.tolist() == pytest.approx([m * m, m * m])
    for k in range(1, m):
        beside = torch.tensor([k * math.pi / m - 1e-9, k * math.pi / m + 1e-9], dtype=torch.float64).cos()
        values, gradient = slope(lambda cos: monotone_cosine(cos, float(m)), beside)
        assert values.tolist() == pytest.approx([1 - 2 * k, 1 - 2 * k] if k % 2 == 0 else [-1 - 2 * (k - 1)] * 2)
        assert gradient.tolist() == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize("name", [name for name in MARGIN_NAMES if name not in ("weighted_softmax", "focal")])
def test_finite_at_the_edges_in_single_precision(name: str) -> None:
    margin = by_name()[name]()
    assert isinstance(margin, Margin)
    values = {key: torch.tensor(value) for key, value in margin.buffers().items()}
    cos = torch.tensor([1.0, -1.0, 1 - 6e-8, -1 + 6e-8, 0.0])
    found, gradient = slope(
        lambda cos: margin.target(
            plain(
                cos,
                scale=64.0,
                norms_B=torch.full((5,), 20.0),
                values=values,
                noise_B=torch.ones(5),
                class_values_B=torch.ones(5),
            )
        ),
        cos,
    )
    assert bool(torch.isfinite(found).all())
    assert bool(torch.isfinite(gradient).all())


@given(
    first=st.floats(0, math.pi),
    second=st.floats(0, math.pi),
    factor=st.sampled_from([1.0, 1.35, 2.0, 3.0, 4.0]),
    offset=st.floats(-1, math.pi),
)
def test_a_worse_angle_never_has_a_greater_target(first: float, second: float, factor: float, offset: float) -> None:
    """Also where factor theta + offset is beyond pi, or below 0."""
    angles = torch.tensor(sorted([first, second]), dtype=torch.float64)
    better, worse = monotone_cosine(angles.cos(), factor, offset).tolist()
    assert worse <= better + 1e-9


def test_angle_and_sine_near_their_poles() -> None:
    cos = (torch.tensor([0.0, 1e-6, 1e-3, 1.0, math.pi], dtype=torch.float64)).cos()
    values, gradient = slope(angle, cos)
    assert values.tolist() == pytest.approx([0, 1e-6, 1e-3, 1, math.pi], rel=1e-3, abs=1e-7)
    assert gradient.tolist() == pytest.approx(
        [-1 / max(math.sin(a), SINE_GUARD) for a in (0, 1e-6, 1e-3, 1, 0)], rel=1e-4
    )
    inside = torch.linspace(-0.99, 0.99, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(angle, (inside,))
    assert torch.autograd.gradcheck(sine_of, (inside,))


def test_chebyshev() -> None:
    for degree in range(6):
        first, second = chebyshev(ANGLES.cos(), degree)
        torch.testing.assert_close(first, torch.cos(degree * ANGLES))
        torch.testing.assert_close(second, torch.sin(degree * ANGLES) / ANGLES.sin())


def test_auto_scale_reaches_the_probability() -> None:
    """With centres as far apart as can be (cos = -1/(C-1)) and samples on them, the posterior is the one asked for."""
    for classes, probability in ((10, 0.9), (1000, 0.99), (10_575, 0.9)):
        scale = cosface_scale(classes, probability)
        posterior = 1 / (1 + (classes - 1) * math.exp(-scale * classes / (classes - 1)))
        assert posterior == pytest.approx(probability)
        for margin in (NormFace(scale="auto", probability=probability), CosFace(scale="auto", probability=probability)):
            assert margin.resolve(classes, 512).scale == pytest.approx(scale)
    assert (
        L2Softmax(alpha="auto").resolve(100, 8).alpha
        == pytest.approx(math.log(0.9 * 98 / 0.1))
        == l2_softmax_scale(100, 0.9)
    )


def test_auto_that_cannot_be() -> None:
    with pytest.raises(UserError, match="must be positive"):
        NormFace(scale="auto", probability=0.2).resolve(3, 8)
    with pytest.raises(UserError, match="not defined for 2 classes; it takes 3 or more"):
        L2Softmax(alpha="auto").resolve(2, 8)
    with pytest.raises(UserError, match="still 'auto'"):
        CosFace(scale="auto").target(plain(torch.zeros(1)))


def test_bounds_on_the_cosine_margin() -> None:
    assert CosFace(margin=0.35).resolve(5, 2).margin == 0.35  # 1 - cos(72 degrees) = 0.69
    with pytest.raises(
        UserError,
        match=r"margin 0\.35 of the cosine is more than 0\.191, the most that 10 centres in 2 dimensions allow",
    ):
        CosFace(margin=0.35).resolve(10, 2)
    with pytest.raises(UserError, match="choose a smaller margin"):
        CosFace(margin=1.02).resolve(100, 512)
    assert CosFace(margin=1.009).resolve(100, 512).margin == 1.009  # a simplex has room for it
    for margin in (
        CosFace(margin=1.009),  # but not in 3 dimensions
        MVSoftmax(margin=1.2),
        ElasticFace(kind="cos", margin=1.2),
        Combined(m1=1.0, m2=0.0, m3=1.2),
    ):
        with pytest.raises(UserError, match="is more than 1, the most that 1000 centres in 3 dimensions allow"):
            margin.resolve(1000, 3)
    for angular in (MVSoftmax(kind="arc", margin=1.2), ElasticFace(margin=1.2)):
        assert angular.resolve(1000, 3) == angular


def test_a_coco_scale_that_would_turn_the_loss_around_is_refused() -> None:
    assert CoCo(epsilon=0.5).resolve(2, 8).alpha > 0
    with pytest.raises(
        UserError, match=r"coco: alpha 'auto' is -0\.271 for 2 classes and epsilon 1\.0; it must be positive"
    ):
        CoCo(epsilon=1.0).resolve(2, 8)


@pytest.mark.parametrize(
    ("spec", "field", "value"),
    [
        (ArcFace, "margin", 3.2),
        (ArcFace, "margin", -0.1),
        (ArcFace, "scale", 0.0),
        (ArcFace, "scale", 1e5),
        (ArcFace, "scale", math.inf),
        (ArcFace, "scale", math.nan),
        (ArcFace, "margin", math.nan),
        (CosFace, "probability", 1.0),
        (Combined, "m1", 0.5),
        (LSoftmax, "margin", 5),
        (ASoftmax, "margin", 0),
        (Focal, "gamma", -1.0),
        (SubCenterArcFace, "centres", 0),
        (MVSoftmax, "emphasis", 0.9),
        (AdaFace, "momentum", 1.0),
        (ElasticFace, "sigma", -0.1),
        (WeightedSoftmax, "power", 0.0),
        (L2Softmax, "alpha", 0.0),
        (CurricularFace, "momentum", 1.0),
    ],
)
def test_constants_outside_their_range_are_refused(spec: type[Margin], field: str, value: float) -> None:
    with pytest.raises(UserError, match=field):
        spec(**{field: value})


def test_constants_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(UserError, match="exchange them"):
        DynamicMargin(least=0.6)
    with pytest.raises(UserError, match="the lower ones must come first"):
        MagFace(lower_norm=120.0)


def test_the_warmup_starts_without_margin() -> None:
    cos = ANGLES.cos()
    for margin in (ArcFace(), CosFace(), Combined(m1=1.4), CurricularFace(), MVSoftmax(), SubCenterArcFace()):
        torch.testing.assert_close(margin.at(0, 0.0).target(plain(cos)), margin.scale_of({}) * cos)
        torch.testing.assert_close(margin.at(9, 1.0).target(plain(cos)), margin.target(plain(cos)))
        half = margin.at(3, 0.5).target(plain(cos))
        assert bool((half <= margin.scale_of({}) * cos + 1e-9).all())
        assert bool((half >= margin.target(plain(cos)) - 1e-9).all())
    assert DynamicMargin().at(0, 0.5).greatest == 0.25
    assert MagFace().at(0, 0.5).upper_margin == 0.4


def test_lambda_falls_by_its_schedule() -> None:
    margin = ASoftmax()
    assert margin.at(0, 1.0).lambda_min == 1000
    assert margin.at(100, 1.0).lambda_min == pytest.approx(1000 / 13)
    assert margin.at(10**6, 1.0).lambda_min == 5
    assert LSoftmax().at(10**7, 1.0).lambda_min == pytest.approx(0, abs=1e-50)
    cos = ANGLES.cos()
    start, end = margin.at(0, 1.0).target(plain(cos)), margin.at(10**9, 1.0).target(plain(cos))
    torch.testing.assert_close(start, (1000 * cos + monotone_cosine(cos, 4.0)) / 1001)
    torch.testing.assert_close(end, margin.target(plain(cos)))


def test_dynamic_margins_span_their_range() -> None:
    shares = DynamicMargin().per_class(torch.tensor([1, 10, 1000]))
    assert shares.tolist() == pytest.approx([1, (10**-0.25 - 1000**-0.25) / (1 - 1000**-0.25), 0])
    assert DynamicMargin().per_class(torch.tensor([4, 4, 4])).tolist() == [1, 1, 1]


def test_class_weights_have_mean_one_over_the_samples() -> None:
    counts = torch.tensor([1, 10, 100])
    for power in (0.5, 1.0):
        weights = WeightedSoftmax(power=power).per_class(counts)
        assert float((weights * counts).sum() / counts.sum()) == pytest.approx(1, rel=1e-5)
        assert float(weights[0] / weights[2]) == pytest.approx(100**power, rel=1e-5)


def test_reweighting_is_its_own_derivative() -> None:
    values = {"t": torch.tensor(0.3, dtype=torch.float64)}
    cos, hard = torch.linspace(-0.9, 0.9, 10, dtype=torch.float64), torch.arange(10) % 2 == 0
    for margin in (CurricularFace(), MVSoftmax()):
        _, expected = slope(lambda cos, margin=margin: margin.reweight(cos, hard, values)[0], cos)
        torch.testing.assert_close(margin.reweight(cos, hard, values)[1], expected)
        low, high = margin.bound()
        changed = margin.reweight(cos, hard, values)[0] * margin.scale_of({})
        assert low <= float(changed.min()) <= float(changed.max()) <= high
