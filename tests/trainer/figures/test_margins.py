"""The margins' curves and boundaries as drawn: against closed forms and finite differences."""

import math

import numpy as np
import pytest
import torch

from trainer.figures.margins import RAW_LENGTH, boundary_rows, curve_groups, negative_curves, panels
from trainer.losses import Margin, by_name

HALF = 45.0  # of a right angle


def test_every_margin_is_drawn_and_has_a_row() -> None:
    margins = {name for name, spec in by_name().items() if issubclass(spec, Margin)}
    assert {curve.name for group in curve_groups(angles=9) for curve in group.curves} == margins
    assert {row.name for row in boundary_rows()} == margins


def test_slopes_are_those_of_the_curves() -> None:
    """Central differences of psi and of the loss, away from the angles where a branch of psi begins."""
    step = 1e-6
    for _, _, members in panels():
        for variant in members:
            theta_T = torch.linspace(math.radians(3.1), math.radians(176.7), 97, dtype=torch.float64)
            cos_T = theta_T.cos().requires_grad_()
            (slope_T,) = torch.autograd.grad(variant.target(cos_T).sum(), cos_T)
            (loss_slope_T,) = torch.autograd.grad(variant.loss(cos_T, 1000).sum(), cos_T)
            with torch.no_grad():
                up_T, down_T = cos_T + step, cos_T - step
                expected_T = (variant.target(up_T) - variant.target(down_T)) / (2 * step)
                expected_loss_T = (variant.loss(up_T, 1000) - variant.loss(down_T, 1000)) / (2 * step)
            size = max(1.0, float(expected_T.abs().max()))
            # Where the target alone decides whether negatives are hard, the loss has a step that is no slope.
            torch.testing.assert_close(slope_T, expected_T, atol=1e-4 * size, rtol=1e-4)
            torch.testing.assert_close(loss_slope_T, expected_loss_T, atol=1e-4 * size, rtol=1e-4)


def test_curves_hold_psi_target_and_gradient() -> None:
    """ArcFace by its formula: psi = cos(theta + m), and dL/dcos = -(1 - p) s sin(theta + m) / sin(theta)."""
    (arc,) = (c for group in curve_groups(100) for c in group.curves if c.name == "arcface")
    theta_T = np.radians(arc.theta_T)
    below = theta_T + 0.5 < math.pi
    np.testing.assert_allclose(arc.psi_T[below], np.cos(theta_T + 0.5)[below], atol=1e-12)
    np.testing.assert_allclose(arc.target_T, 64 * arc.psi_T)
    np.testing.assert_allclose(arc.slope_T[below], (np.sin(theta_T + 0.5) / np.sin(theta_T))[below], rtol=1e-9)
    away = 1 / (1 + np.exp(64 * arc.psi_T) / 99)  # 1 - p, where the 99 other logits are 0
    np.testing.assert_allclose(arc.gradient_T, -away * 64 * arc.slope_T, rtol=1e-8)


def test_l_softmax_falls_to_one_minus_two_m() -> None:
    curves = {c.label: c for group in curve_groups() for c in group.curves if c.name == "l_softmax"}
    for m in (1, 2, 3, 4):
        curve = curves[rf"L-Softmax, $m = {m}$"]
        assert curve.length == RAW_LENGTH
        assert bool((np.diff(curve.psi_T) <= 1e-12).all())
        assert curve.psi_T[-1] == pytest.approx(1 - 2 * m, abs=1e-2)
        assert curve.slope_T[0] == pytest.approx(m * m, rel=1e-2)


def test_negatives_are_reweighted_as_in_the_papers() -> None:
    group = negative_curves()
    cosine_T = np.cos(np.radians(group.curves[0].theta_T))
    np.testing.assert_allclose(group.curves[0].psi_T, cosine_T**2, atol=1e-12)
    np.testing.assert_allclose(group.curves[1].psi_T, cosine_T * (0.5 + cosine_T), atol=1e-12)
    np.testing.assert_allclose(group.curves[3].psi_T, 1.12 * cosine_T + 0.12, atol=1e-12)


def closed_form(name: str, setting: str) -> float | None:
    """Where the boundary of class 1 lies between centres at right angles, in degrees, worked out by hand."""
    m = {"m=0.5": 0.5, "m=0.45": 0.45, "m=0.8": 0.8, "m_i=0.5": 0.5, "m_c=0.5": 0.5, "m=0.4": 0.4}
    added = next((value for text, value in m.items() if f"${text}$" in setting), None)
    root = 2 * math.sin(math.pi / 4)
    if name in ("softmax", "weighted_softmax", "focal", "modified_softmax", "l2_softmax", "normface"):
        return HALF
    if name in ("l_softmax", "a_softmax"):  # cos(m theta) = cos(90 - theta)
        return 90 / (1 + int(setting[setting.index("m=") + 2]))
    if name in ("cosface", "mv_softmax"):  # cos(theta) - cos(90 - theta) = 2 sin(45) sin(45 - theta) = m
        return HALF - math.degrees(math.asin(0.35 / root))
    if name == "combined":  # 2 sin((90 + m2) / 2) sin((90 - m2) / 2 - theta) = m3
        return (90 - math.degrees(0.3)) / 2 - math.degrees(math.asin(0.2 / (2 * math.sin((math.pi / 2 + 0.3) / 2))))
    if name == "adaface" and "z=1" in setting:  # cos(theta - m) = 2 m + sin(theta); no closed form worth writing
        return None
    assert added is not None, name
    return HALF - math.degrees(added) / 2  # cos(theta + m) = cos(90 - theta)


def test_boundaries_agree_with_closed_forms() -> None:
    rows = boundary_rows()
    for row in rows:
        assert row.boundary_degrees is not None
        assert row.gap_degrees == pytest.approx(90 - 2 * row.boundary_degrees)
        expected = closed_form(row.name, row.setting)
        if expected is not None:
            assert row.boundary_degrees == pytest.approx(expected, abs=1e-6), row.label
    (ada,) = (row for row in rows if row.name == "adaface" and "z=1" in row.setting)
    theta = math.radians(ada.boundary_degrees or 0)
    # The target of a sample nearer than m z to its centre counts as s (1 - 2 m), see AdaFace.
    assert math.sin(theta) == pytest.approx(math.cos(max(theta - 0.4, 0)) - 0.8, abs=1e-9)


def test_a_margin_that_leaves_nothing_has_no_boundary() -> None:
    """Centres 20 degrees apart: ArcFace's 0.5 radians are more."""
    rows = {(row.name, row.setting): row for row in boundary_rows(math.radians(20))}
    assert rows["arcface", "$m=0.5$"].boundary_degrees is None
    assert rows["arcface", "$m=0.5$"].gap_degrees is None
    assert rows["normface", ""].boundary_degrees == pytest.approx(10)


def test_regions_are_bounded_where_the_logits_are_equal() -> None:
    for row in boundary_rows():
        theta_1, least_2 = np.array(row.region_degrees).T
        if row.name == "arcface":
            np.testing.assert_allclose(least_2, theta_1 + math.degrees(0.5), atol=1e-6)
        if row.name == "cosface":
            np.testing.assert_allclose(np.cos(np.radians(least_2)), np.cos(np.radians(theta_1)) - 0.35, atol=1e-9)
        assert bool((np.diff(least_2) >= -1e-9).all())


def test_a_case_has_the_margin_of_its_own_kind() -> None:
    """MV-softmax of the kind arc is ArcFace but for the negatives, which no target shows."""
    curves = {curve.label: curve for group in curve_groups(angles=99) for curve in group.curves}
    np.testing.assert_array_equal(curves["MV-Arc, $m = 0.5$"].psi_T, curves["ArcFace, $m = 0.5$"].psi_T)
