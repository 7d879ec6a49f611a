"""pytorch-metric-learning's value of the losses that it has too, where both mean the same after the stated changes."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.objective.cases import CLASSES, DIMENSION, LABELS, problem
from trainer.distributed import Group
from trainer.head import Head
from trainer.head.settings import HeadConfig
from trainer.losses import (
    TPE,
    TSE,
    ArcFace,
    ASoftmax,
    CenterInvariant,
    CoCo,
    Contrastive,
    CosFace,
    LSoftmax,
    Margin,
    NormFace,
    SubCenterArcFace,
    Triplet,
)
from trainer.losses.batch import BatchLoss
from trainer.losses.triplets import PROJECTION
from trainer.objective.sharded import BatchLossModule

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it and its own dependencies warn of when imported is theirs
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed")
    from pytorch_metric_learning import distances, miners, reducers, regularizers

VALID = [i for i, label in enumerate(LABELS) if label >= 0]  # it knows no padding


def batch() -> tuple[Tensor, Tensor]:
    x = problem(11)[0][VALID]
    return x, torch.tensor(LABELS)[VALID]


def ours(spec: BatchLoss, x: Tensor, labels: Tensor, projection: Tensor | None = None) -> Tensor:
    module = BatchLossModule(spec, CLASSES, DIMENSION, group=Group()).double()
    if projection is not None:
        module.started.fill_(True)
        module.values[PROJECTION].data.copy_(projection)
    loss: Tensor = module(x, labels)
    return loss.detach()


SQUARED = distances.LpDistance(normalize_embeddings=True, p=2, power=2)


@pytest.mark.parametrize("average", ["selected", "active"])
@pytest.mark.parametrize("rule", ["all", "semi_hard", "hard", "easy", "batch_hard"])
def test_triplet(rule: str, average: str) -> None:
    x, labels = batch()
    reducer = reducers.MeanReducer() if average == "selected" else reducers.AvgNonZeroReducer()
    theirs = losses.TripletMarginLoss(margin=0.2, distance=SQUARED, reducer=reducer)
    mined = None  # every triplet; their miner's "all" leaves out the easy ones
    if rule == "batch_hard":
        mined = miners.BatchHardMiner(distance=SQUARED)(x, labels)
    elif rule != "all":
        kind = rule.replace("_", "")
        mined = miners.TripletMarginMiner(margin=0.2, type_of_triplets=kind, distance=SQUARED)(x, labels)
    expected = theirs(x, labels, mined)
    torch.testing.assert_close(ours(Triplet(mining=rule, average=average), x, labels), expected)


def test_contrastive_pull() -> None:
    """Theirs has no 1/2, and pushes by max(0, m - d) without the square: the pull alone is the same."""
    x, labels = batch()
    theirs = losses.ContrastiveLoss(pos_margin=0, neg_margin=0, distance=SQUARED, reducer=reducers.MeanReducer())
    expected = theirs(x, labels)
    found = ours(Contrastive(margin=1e-6), x, labels)
    torch.testing.assert_close(found, expected / 2 / 2, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", [TSE(dimension=3, alpha=0.4), TPE(dimension=3)], ids=["tse", "tpe"])
def test_projected_triplets(spec: BatchLoss) -> None:
    """Theirs on T x-hat with the dot product for similarity, given each anchor's and positive's hardest negative."""
    x, labels = batch()
    t = problem(12)[1][:3]
    projected = torch.nn.functional.normalize(x, dim=1) @ t.T
    similarity = projected @ projected.T
    mined = [
        (a, p, max((n for n in range(len(labels)) if labels[n] != labels[a]), key=lambda n: similarity[a, n].item()))
        for a in range(len(labels))
        for p in range(len(labels))
        if a != p and labels[a] == labels[p]
    ]
    theirs = losses.TripletMarginLoss(
        margin=spec.alpha if isinstance(spec, TSE) else 0.0,
        smooth_loss=isinstance(spec, TPE),
        distance=distances.DotProductSimilarity(normalize_embeddings=False),
        reducer=reducers.MeanReducer(),
    )
    expected = theirs(projected, labels, tuple(torch.tensor(mined).T))
    torch.testing.assert_close(ours(spec, x, labels, t), expected)


def test_coco_is_normalized_softmax_with_the_centroids_for_weights() -> None:
    """The value; theirs gives the centroids no gradient."""
    x, labels = batch()
    centroids = torch.stack([x[labels == k].mean(dim=0) for k in range(CLASSES - 1)])
    theirs = losses.NormalizedSoftmaxLoss(CLASSES - 1, DIMENSION, temperature=1 / 6.25)
    theirs.W = torch.nn.Parameter(centroids.T.contiguous())
    torch.testing.assert_close(ours(CoCo(alpha=6.25), x, labels), theirs(x, labels).detach())


def test_center_invariant_term() -> None:
    """Their regularizer is the mean over all classes of (|c|^2 - M)^2 / 4."""
    centres = problem(13)[1]
    squares = centres.square().sum(dim=1)
    spec = CenterInvariant(gamma=1.0)
    expected = regularizers.CenterInvariantRegularizer()(centres)
    torch.testing.assert_close(spec.extra(squares, squares.mean())[0].mean(), expected)


def plain(margin: int) -> dict[str, float]:
    """Of L-Softmax and A-Softmax, psi alone: theirs has no lambda that eases it in."""
    return {"margin": margin, "lambda_start": 0.0, "lambda_min": 0.0}


DEGREES = math.degrees(0.4)
MARGINS: dict[str, tuple[Margin, Any, dict[str, Any]]] = {
    "normface": (NormFace(scale=9.0), losses.NormalizedSoftmaxLoss, {"temperature": 1 / 9}),
    "cosface": (CosFace(scale=9.0, margin=0.2), losses.CosFaceLoss, {"scale": 9.0, "margin": 0.2}),
    "arcface": (ArcFace(scale=9.0, margin=0.4), losses.ArcFaceLoss, {"scale": 9.0, "margin": DEGREES}),
    "sub_center_arcface": (
        SubCenterArcFace(scale=9.0, margin=0.4, centres=3),
        losses.SubCenterArcFaceLoss,
        {"scale": 9.0, "margin": DEGREES, "sub_centers": 3},
    ),
    **{f"l_softmax {m}": (LSoftmax(**plain(m)), losses.LargeMarginSoftmaxLoss, {"margin": m}) for m in (1, 2, 3, 4)},
    **{f"a_softmax {m}": (ASoftmax(**plain(m)), losses.SphereFaceLoss, {"margin": m}) for m in (1, 2, 3, 4)},
}


@pytest.mark.parametrize("name", MARGINS)
def test_margins(name: str) -> None:
    """The head's value and gradients, with the same W, whose rows have other lengths than 1.

    What differs, and is left out here:
    - their ArcFace takes degrees, and where theta + m > pi goes on with cos(theta) - m sin(m), which jumps there, ours
      with -2 - cos(theta + m); no sample of this batch is so far from its centre
    - theirs has a `scale` in L-Softmax and SphereFace, on top of |x| (and |w|), which is 1 here as in the papers; ours
      has lambda, which is 0 here
    - their W is [D, C K], the transpose of ours
    """
    margin, theirs_class, arguments = MARGINS[name]
    x, labels = batch()
    K = margin.centres_per_class()
    first = 23 if isinstance(margin, ArcFace) else 21  # from 21 on, angles reach into the last branch of L-Softmax
    W = torch.cat([problem(first + k)[1] for k in range(K)]) * torch.linspace(0.5, 2, CLASSES * K)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy's, of how theirs computes binomials
        theirs = theirs_class(num_classes=CLASSES, embedding_size=DIMENSION, **arguments)
    theirs.W = torch.nn.Parameter(W.T.contiguous())
    x_theirs = x.clone().requires_grad_()
    expected = theirs(x_theirs, labels)
    expected.backward()

    head = Head(margin, CLASSES, DIMENSION, HeadConfig(rows="free"), group=Group()).double()
    head.weight.data.copy_(W)
    x_ours = x.clone().requires_grad_()
    found = head(x_ours, labels)
    found.backward()
    assert farthest(margin, x, labels, W) < math.pi
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(x_ours.grad, x_theirs.grad)
    torch.testing.assert_close(head.weight.grad, theirs.W.grad.T)


def farthest(margin: Margin, x: Tensor, labels: Tensor, W: Tensor) -> float:
    """The largest theta + m of a sample and the nearest centre of its class; 0 for margins that add no angle."""
    if not isinstance(margin, ArcFace):
        return 0.0
    cosines = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(W).T
    nearest = cosines.view(len(x), CLASSES, -1).amax(dim=2)[torch.arange(len(x)), labels]
    return float(nearest.acos().max()) + margin.margin
