"""Samples left out of the backward: some are, and the error is never above the tolerance, in any configuration."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ranks import run_on_ranks
from tests.trainer.head.cases import DIMENSION, MARGINS, make_head
from trainer.distributed import Group
from trainer.head import Head, HeadConfig, tiles
from trainer.head.skipping import Errors, Kept, essential, spectral_bound
from trainer.losses import ArcFace, Margin

CLASSES, BATCH = 2 * DIMENSION, 48
UNIT = [name for name, margin in MARGINS.items() if margin.unit_rows]
NEVER_SURE = ("normface auto", "cosface auto", "arcface beyond pi", "adaface beyond pi")  # the scale is 5 and less


@dataclass
class Gradients:
    """Of one step: the denominator's part of dE, dW and of the bias, and the learnable numbers; how many samples
    product 3 took, and the mass of those that product 2 left out."""

    embeddings_BD: Tensor
    rows_RD: Tensor
    bias_C: Tensor | None
    scalars: dict[str, Tensor]
    kept: list[int] = field(default_factory=list)
    missing: float = 0.0


def apart(head: Head) -> Head:
    """The head with its classes far from each other, each near one end of an axis."""
    generator = torch.Generator().manual_seed(0)
    ends_CD = torch.cat([torch.eye(DIMENSION), -torch.eye(DIMENSION)]).double()
    rows_RD = ends_CD.repeat_interleave(head.centres, 0)
    rows_RD = rows_RD + 0.05 * torch.randn(rows_RD.shape, generator=generator, dtype=torch.float64)
    rows_RD = torch.nn.functional.normalize(rows_RD)[head.rows.start * head.centres : head.rows.stop * head.centres]
    with torch.no_grad():
        head.weight.copy_(rows_RD * head.weight.norm(dim=1, keepdim=True))
    return head


def learned(head: Head, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Samples from right at their class's centre to far from it, one of them padding."""
    generator = torch.Generator().manual_seed(seed)
    labels_B = torch.randint(0, CLASSES, (batch,), generator=generator)
    centres_CD = head.weight.detach()[:: head.centres]
    away_B1 = torch.rand(batch, 1, generator=generator, dtype=torch.float64) ** 3
    x_BD = centres_CD[labels_B] + away_B1 * torch.randn(batch, DIMENSION, generator=generator, dtype=torch.float64)
    labels_B[1] = -1
    return x_BD * (2 if head.margin.unit_embedding else 20), labels_B


def gradients(
    margin: Margin, config: HeadConfig, seed: int, group: Group | None, monkeypatch: pytest.MonkeyPatch
) -> Gradients:
    group = group or Group()
    counts = [1 + c % 7 for c in range(CLASSES)]
    whole = apart(make_head(margin, config, counts, Group()))
    x_BD, labels_B = learned(whole, BATCH * group.size, seed)
    head, seen, kept = apart(make_head(margin, config, counts, group)), [], []
    missing = 0.0
    backward = tiles.Tiles.backward

    def watched(self: tiles.Tiles, *arguments: Tensor) -> tuple[Tensor, None, Tensor | None]:
        result = backward(self, *arguments)
        seen.append(result[0].clone())
        return result

    def counted(errors: Errors, least: Tensor, tolerance: float, of: Callable[[Tensor], Tensor]) -> Kept | None:
        found = essential(errors, least, tolerance, of)
        nonlocal missing
        kept.append(BATCH * group.size if found is None else len(found.samples_n))
        missing = 0.0 if found is None else float(errors.mass_B[(found.de_BD == 0).all(dim=1)].sum())
        return found

    with monkeypatch.context() as patch:
        patch.setattr(tiles.Tiles, "backward", watched)
        patch.setattr(tiles, "essential", counted)
        mine = slice(group.rank * BATCH, (group.rank + 1) * BATCH)
        head(x_BD[mine].requires_grad_(), labels_B[mine]).backward()
    rows_RD = head.weight.grad
    assert rows_RD is not None
    rows_RD = rows_RD.to_dense()
    if head.unit_rows:
        rows_RD = rows_RD - head.weight.detach() * (rows_RD * head.weight.detach()).sum(1, keepdim=True)
    bias_C = None if head.bias is None or head.bias.grad is None else head.bias.grad.to_dense()
    scalars = {key: value.grad.clone() for key, value in head.scalars.items() if value.grad is not None}
    return Gradients(seen[0], rows_RD, bias_C, scalars, kept, missing)


def check(name: str, tolerance: float, seed: int, group: Group | None = None, **choice: object) -> int:
    """The errors against an exact backward; how many samples were left out."""
    found = []
    for skip in (0.0, tolerance):
        config = HeadConfig(algorithm="store", tile=7, skip_tolerance=skip, **choice)  # type: ignore[arg-type]
        found.append(gradients(MARGINS[name], config, seed, group, pytest.MonkeyPatch()))
    exact, near = found
    for what in ("embeddings_BD", "rows_RD"):
        whole, error = getattr(exact, what), getattr(near, what) - getattr(exact, what)
        assert error.norm() <= tolerance * whole.norm() * (1 + 1e-9) + 1e-14, (name, what, choice)
    if exact.bias_C is not None:
        torch.testing.assert_close(near.bias_C, exact.bias_C, rtol=1e-12, atol=1e-14)
    for key, value in exact.scalars.items():
        assert abs(near.scalars[key] - value) <= near.missing * (1 + 1e-9) + 1e-14, (name, key, choice)
    return len(exact.embeddings_BD) - near.kept[0]


@pytest.mark.parametrize("name", MARGINS)
def test_the_errors_stay_within_the_tolerance(name: str) -> None:
    left_out = [check(name, tolerance, seed) for seed in range(2) for tolerance in (1e-3, 0.1, 0.9)]
    assert max(left_out) > 0 or name in NEVER_SURE


@pytest.mark.parametrize("name", UNIT)
def test_also_of_rows_that_are_divided_by_their_length(name: str) -> None:
    left_out = [check(name, tolerance, 0, rows="free") for tolerance in (1e-3, 0.1, 0.9)]
    assert max(left_out) > 0 or name in NEVER_SURE


@pytest.mark.parametrize("name", ["arcface", "softmax", "sub_center_arcface", "curricularface"])
@pytest.mark.parametrize("corrected", [False, True])
def test_also_with_sampled_classes(name: str, corrected: bool) -> None:
    assert max(check(name, t, 0, sample_rate=0.02, sample_correction=corrected) for t in (1e-3, 0.9)) > 0


@pytest.mark.parametrize("size", [2, 3])
def test_also_on_ranks(size: int) -> None:
    run_on_ranks(size, on_a_rank)


def on_a_rank(rank: int) -> None:
    group = Group.current()
    for name in ("arcface", "softmax", "sub_center_arcface", "curricularface", "arcface unbounded"):
        for tolerance in (1e-3, 0.1):
            check(name, tolerance, 0, group)


def test_the_fused_optimizer_gets_the_same_gradient() -> None:
    from trainer.head.optimizer import HeadOptimizer

    weights = []
    for fused in (False, True):
        config = HeadConfig(algorithm="store", tile=7, skip_tolerance=0.1, fused=fused)
        head = apart(make_head(ArcFace(), config, [1] * CLASSES))
        optimizer = HeadOptimizer(head)
        x_BD, labels_B = learned(head, BATCH, 0)
        optimizer.prepare(0.1)
        head(x_BD.requires_grad_(), labels_B).backward()
        optimizer.step(0.1)
        weights.append(head.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-7)


@given(
    powers=st.lists(st.floats(-12, 0), min_size=2, max_size=100),
    cancelling=st.floats(0.001, 1.0),
    tolerance=st.floats(1e-6, 0.5),
)
@settings(deadline=None)
def test_more_are_kept_where_the_gradients_cancel(powers: list[float], cancelling: float, tolerance: float) -> None:
    """Whatever share of its mass a sample's gradient is: what is left out is within the tolerance of what is there."""
    mass_B = 10.0 ** torch.tensor(powers, dtype=torch.float64)
    exact_BD = mass_B[:, None] * cancelling * torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    norm = mass_B.max()
    kept = essential(
        Errors(mass_B, torch.ones_like(mass_B), torch.tensor(9.0)),
        norm,
        tolerance,
        lambda samples_n: exact_BD[samples_n],
    )
    if kept is None:
        return
    assert (kept.de_BD - exact_BD).norm() <= tolerance * exact_BD.norm()
    lost_B = torch.ones_like(mass_B).index_fill(0, kept.samples_n, 0) * mass_B
    assert lost_B.sum() <= tolerance * norm * (1 + 1e-12)


@pytest.mark.parametrize("alike", [0.0, 1.0, 100.0])
def test_the_spectral_norm_is_bounded_closely(alike: float) -> None:
    generator = torch.Generator().manual_seed(0)
    e_BD = 64 * torch.randn(128, 32, generator=generator) + alike * 64
    exact, bound = torch.linalg.matrix_norm(e_BD.double(), 2), spectral_bound(e_BD)
    assert exact * (1 - 1e-9) <= bound <= exact * 128 ** (1 / 32)


def test_where_all_samples_weigh_the_same_none_is_left_out_and_none_is_computed_twice() -> None:
    def never(samples_n: Tensor) -> Tensor:
        raise AssertionError(samples_n)

    equal_B, one = torch.ones(64), torch.ones(())
    assert essential(Errors(equal_B, equal_B, one), one, 1e-3, never) is None
    unknown_B = torch.full((64,), torch.nan)
    assert essential(Errors(unknown_B, equal_B, one), one, 1e-3, never) is None
    nothing_known = torch.zeros(())
    assert essential(Errors(0.5 ** torch.arange(64.0), equal_B, one), nothing_known, 1e-3, never) is None
