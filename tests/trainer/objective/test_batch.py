"""Losses on embeddings against their formulas as loops, on one rank; bad input; what they refuse."""

import math
import re

import pytest
import torch

from tests.trainer.objective import oracle
from tests.trainer.objective.cases import (
    ALL_DIFFERENT,
    CASES,
    CLASSES,
    DIMENSION,
    LABELS,
    ONE_IDENTITY,
    ONLY_PADDING,
    SLOTS,
    check_case,
    expect,
    problem,
    run_case,
)
from trainer.config import from_tree, load
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.losses import TPE, TSE, Center, CoCo, Contrastive, Range, Triplet
from trainer.losses.batch import members
from trainer.losses.triplets import PROJECTION
from trainer.objective.sharded import BatchLossModule, CentreModule

ALONE = Group()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_formula(name: str, seed: int) -> None:
    x, t = problem(seed)
    check_case(name, x, LABELS, t, ALONE, expect(name, x, LABELS, t))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("labels", [ONE_IDENTITY, ALL_DIFFERENT, ONLY_PADDING], ids=["one", "different", "padding"])
def test_batches_that_lack_something(name: str, labels: list[int]) -> None:
    """They give what the formula gives of what is there, which is often 0, and finite gradients."""
    x, t = problem()
    if name.startswith("marginal") and labels is ONLY_PADDING:
        found = run_case(CASES[name][0], x, labels, t, ALONE)  # the paper's 1 / (m^2 - m) has no meaning
        assert found.loss == 0
        assert not found.dx_bD.any()
    else:
        check_case(name, x, labels, t, ALONE, expect(name, x, labels, t))


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("center")])
def test_gradcheck(name: str) -> None:
    spec = CASES[name][0]
    module = BatchLossModule(spec, CLASSES, DIMENSION, group=ALONE).double()
    module.started.fill_(True)
    x = problem(3, slots=9)[0].requires_grad_()
    labels = torch.tensor(LABELS[:9])
    assert torch.autograd.gradcheck(lambda x: module(x, labels), (x,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_single_precision(name: str) -> None:
    """fp32 gives the fp64 loss and gradient to 1e-4; the triplets' sums lose no more."""
    x, t = problem(5)
    spec = CASES[name][0]
    exact, single = (
        run_case(spec, x.to(dtype), LABELS, t.to(dtype), ALONE) for dtype in (torch.float64, torch.float32)
    )
    assert single.loss.dtype == single.dx_bD.dtype == torch.float32
    torch.testing.assert_close(single.loss.double(), exact.loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(single.dx_bD.double(), exact.dx_bD, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "labels", "empty"),
    [
        ("triplet semi_hard selected", LABELS, 0),
        ("triplet semi_hard selected", ONE_IDENTITY, 1),
        ("triplet semi_hard selected", ALL_DIFFERENT, 1),
        ("triplet batch_hard selected", ONE_IDENTITY, 1),
        ("triplet all selected", ONLY_PADDING, 1),
        ("contrastive", LABELS, 0),
        ("contrastive", ONE_IDENTITY, 1),
        ("contrastive", ALL_DIFFERENT, 1),
        ("marginal", ALL_DIFFERENT, 1),
        ("tse", LABELS, 0),
        ("tse", ONE_IDENTITY, 1),
        ("tpe", ALL_DIFFERENT, 1),
        ("coco", ALL_DIFFERENT, 0),
        ("coco", ONE_IDENTITY, 1),
        ("range", LABELS, 0),
        ("range", ONE_IDENTITY, 1),
        ("range", ALL_DIFFERENT, 1),
    ],
)
def test_empty_steps_are_counted(name: str, labels: list[int], empty: int) -> None:
    x, t = problem()
    assert run_case(CASES[name][0], x, labels, t, ALONE).empty_steps == empty


@pytest.mark.parametrize("mining", ["semi-hard", "semi_hard"])
def test_mining_with_the_literatures_hyphen(mining: str) -> None:
    chosen = load(None, ["loss=triplet", f"loss.mining={mining}"]).loss
    assert chosen == Triplet(mining="semi_hard")


@pytest.mark.parametrize("rule", ["all", "easy", "semi_hard", "hard"])
def test_mining_counts_every_triplet_of_its_kind(rule: str) -> None:
    """The number that the mean divides by is the brute-force one, also where distances are equal."""
    x = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [-1, 0], [3, 0], [0, -1], [1, 1]], dtype=torch.float64)
    labels = [0, 0, 0, 1, 1, 1, 2, 2]
    spec = Triplet(mining=rule, alpha=0.5)
    module = BatchLossModule(spec, 3, 2, group=ALONE)
    seen: list[float] = []
    join = module._join
    module._join = lambda terms: (seen.append(float(terms.counts_K[0])), join(terms))[1]  # type: ignore[method-assign]
    loss = module(x, torch.tensor(labels))
    assert seen == [len(oracle.select(oracle.unit(x), labels, rule, 0.5))]
    torch.testing.assert_close(loss, oracle.triplet(x, labels, 0.5, rule, "selected"))


def test_all_triplets_of_a_large_batch_in_single_precision() -> None:
    """1.4 million triplets at once, against every one of them in fp64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(160, 32, generator=generator))
    labels = torch.arange(160) // 4 % 20
    found = BatchLossModule(Triplet(mining="all"), 20, 32, group=ALONE)(x, labels)
    d = torch.cdist(x.double(), x.double()) ** 2
    same, other = labels[:, None] == labels, labels[:, None] != labels
    same = same & ~torch.eye(160, dtype=torch.bool)
    every = same[:, :, None] & other[:, None, :]
    hinge = (d[:, :, None] - d[:, None, :] + 0.2).clamp_min(0)
    torch.testing.assert_close(found.double(), hinge[every].mean(), rtol=1e-6, atol=0)


def test_equal_embeddings_have_a_finite_gradient() -> None:
    x = torch.ones(6, 4, dtype=torch.float64)
    for spec in (
        Contrastive(),
        Contrastive(unit=False),
        Triplet(),
        Triplet(mining="hard"),
        Range(),
        CoCo(alpha=5.0),
    ):
        x_bD = x.clone().requires_grad_()
        loss = BatchLossModule(spec, 3, 4, group=ALONE)(x_bD, torch.tensor([0, 0, 1, 1, 2, 2]))
        loss.backward()
        assert x_bD.grad is not None
        assert torch.isfinite(x_bD.grad).all(), spec


def test_null_embedding_gets_no_gradient() -> None:
    for spec in (Contrastive(), Triplet(mining="all"), CoCo(alpha=5.0), TPE(init="orthogonal")):
        x = problem()[0].clone()
        x[0] = 0
        x.requires_grad_()
        BatchLossModule(spec, CLASSES, DIMENSION, group=ALONE).double()(x, torch.tensor(LABELS)).backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
        if not isinstance(spec, CoCo):  # whose centroids are means of embeddings with their lengths
            assert not x.grad[0].any()


def test_half_precision_embeddings_are_computed_in_single() -> None:
    x = problem()[0].to(torch.bfloat16).requires_grad_()
    loss = BatchLossModule(Triplet(mining="all"), CLASSES, DIMENSION, group=ALONE)(x, torch.tensor(LABELS))
    loss.backward()
    assert loss.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dimension", [DIMENSION, 16])  # from about 10 on eigenvectors of NaN are an error of their own
@pytest.mark.parametrize("name", ["triplet semi_hard selected", "coco", "center", "tse", "tpe"])
def test_bad_samples_are_named(name: str, dimension: int) -> None:
    spec = CASES[name][0]
    module = (
        CentreModule(spec, CLASSES, dimension, group=ALONE)
        if isinstance(spec, Center)
        else BatchLossModule(spec, CLASSES, dimension, group=ALONE)
    )
    x, keys = (
        torch.randn(SLOTS, dimension, generator=torch.Generator().manual_seed(0)),
        [f"key{i}" for i in range(SLOTS)],
    )
    labels = torch.tensor(LABELS)
    x[7, 2] = math.nan
    with pytest.raises(UserError, match="sample 'key7' has an embedding that is not finite"):
        module(x, labels, keys)
    x[7, 2] = 1
    labels[4] = CLASSES
    with pytest.raises(UserError, match=f"sample 'key4' has label {CLASSES}, but the loss has the classes 0 to"):
        module(x, labels, keys)
    with pytest.raises(UserError, match=rf"embeddings of shape \(24, 3\); the loss was made for \[b, {dimension}\]"):
        module(x[:, :3], torch.tensor(LABELS), keys)
    assert torch.isfinite(module(x, torch.tensor(LABELS), keys))  # what was refused has left nothing behind


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match=re.escape("tse: dimension 6 is more than the embedding's 5")):
        BatchLossModule(TSE(dimension=6), CLASSES, DIMENSION, group=ALONE)
    with pytest.raises(UserError, match="triplet: 1 identity cannot be told from another"):
        BatchLossModule(Triplet(), 1, DIMENSION, group=ALONE)
    with pytest.raises(UserError, match="2 classes cannot be shared by 3 workers"):
        CentreModule(Center(), 2, DIMENSION, group=Group(0, 3))


@pytest.mark.parametrize(
    "choice",
    [
        *[{"name": "coco", "alpha": 0.0}, {"name": "triplet", "alpha": 0.0}, {"name": "triplet", "mining": "best"}],
        *[{"name": "contrastive", "margin": math.inf}, {"name": "marginal", "theta": 4.5}, {"name": "range", "k": 0}],
        *[{"name": "center", "alpha": 1.5}, {"name": "tse", "alpha": -0.1}, {"name": "center", "weight": 0}],
    ],
    ids=str,
)
def test_constants_outside_their_range_are_refused(choice: dict[str, object]) -> None:
    key = list(choice)[-1]
    with pytest.raises(UserError, match=rf"config: loss\.{choice['name']}\.{key}"):
        from_tree({"loss": choice})


def test_coco_auto_scale_reaches_its_epsilon() -> None:
    for classes, epsilon in ((2, 1e-4), (1000, 1e-4), (10**7, 0.5)):
        alpha = CoCo(epsilon=epsilon).resolve(classes, 8).alpha
        assert alpha == pytest.approx(oracle.least_coco_scale(classes, epsilon))
        assert math.log1p((classes - 1) * math.exp(-2 * float(alpha))) == pytest.approx(epsilon)


def test_projection_starts_at_the_principal_directions() -> None:
    """Of the first batch's unit embeddings, without padding; a later batch changes nothing."""
    x, labels = problem(7)[0], torch.tensor(LABELS)
    module = BatchLossModule(TPE(dimension=2), CLASSES, DIMENSION, group=ALONE)
    module(x, labels)
    unit = torch.nn.functional.normalize(x[labels >= 0], dim=1)
    expected = torch.linalg.svd(unit - unit.mean(dim=0)).Vh[:2]
    overlap = (module.values[PROJECTION].double() @ expected.T).abs()
    torch.testing.assert_close(overlap, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-6)
    before = module.values[PROJECTION].detach().clone()
    module(problem(8)[0], labels)
    assert torch.equal(module.values[PROJECTION], before)


def test_projection_starts_orthogonal_by_the_seed() -> None:
    first, again, other = (
        BatchLossModule(TSE(dimension=3, init="orthogonal"), CLASSES, DIMENSION, seed=seed, group=ALONE)
        for seed in (1, 1, 2)
    )
    first(problem()[0], torch.tensor(LABELS))
    t = first.values[PROJECTION].detach()
    torch.testing.assert_close(t @ t.T, torch.eye(3))
    assert torch.equal(t, again.values[PROJECTION])
    assert not torch.allclose(t, other.values[PROJECTION])


def test_tiles_of_anchors_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = problem()
    spec = TPE(dimension=3, negatives="all")
    whole = run_case(spec, x, LABELS, t, ALONE)
    monkeypatch.setattr("trainer.losses.triplets.TILE", 5 * SLOTS**2)  # tiles of 5, 5, 5, 5 and 4 anchors
    tiled = run_case(spec, x, LABELS, t, ALONE)
    torch.testing.assert_close(tiled.loss, whole.loss)
    torch.testing.assert_close(tiled.dx_bD, whole.dx_bD)


def test_frozen_embeddings_train_the_projection_alone() -> None:
    x = problem()[0].float().requires_grad_()
    module = BatchLossModule(TSE(frozen=True, alpha=1.0), CLASSES, DIMENSION, group=ALONE)
    module(x, torch.tensor(LABELS)).backward()
    assert x.grad is None
    assert module.values[PROJECTION].grad is not None
    assert module.values[PROJECTION].grad.any()


def test_k_largest_ranges_of_an_identity_are_found_wherever_they_lie() -> None:
    """Ten samples of one identity on a line: the two widest pairs are spread over three rows."""
    x = torch.tensor([5.0, 1, 7, 0, 3, 8.5, 2, 4, 6, 1.5, 20, 21], dtype=torch.float64)[:, None] * torch.ones(1, 2) / 2
    x, labels = x.double(), [0] * 10 + [1, 1]
    spec = Range(k=3, unit=False, inter=0.0)
    found = BatchLossModule(spec, 2, 2, group=ALONE)(x, torch.tensor(labels))
    widest = [(8.5**2) / 2, (7.5**2) / 2, (7**2) / 2]  # 0-8.5, 1-8.5, and 0-7 or 1.5-8.5
    assert float(found) == pytest.approx((3 / sum(1 / d for d in widest) + 0.5) / 2)


def test_groups_number_the_identities_of_a_batch() -> None:
    labels = torch.tensor([7, -1, 3, 7, 3, 900])
    assert members(labels)[0].tolist() == [2, 0, 1, 2, 1, 3]
    slots, member = members(labels)
    assert member.sum(dim=1).tolist() == [0, 2, 2, 1, 0, 0]
    assert slots[1] == 0  # padding's slot is empty


def test_centres_are_touched_only_in_the_batch() -> None:
    """and are moved once a step, with the embeddings that the loss saw."""
    module = CentreModule(Center(), CLASSES, DIMENSION, group=ALONE)
    x = problem()[0].float()
    module(x, torch.tensor(LABELS))
    x.zero_().add_(99)
    module.update()
    moved = module.centres.clone()
    assert not moved[8].any()
    assert moved[:8].any(dim=1).all()
    assert moved.abs().max() < 10
    module.update()
    assert torch.equal(module.centres, moved)
