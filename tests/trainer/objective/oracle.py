"""Each loss on embeddings as its paper writes it: loops over pairs, triplets and identities, one number at a time.

Everything takes x [B, D] in float64 and a list of labels (-1: padding) and returns a scalar, so that torch's autograd
through the loops gives the gradients to compare with.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor


def valid(labels: list[int]) -> list[int]:
    return [i for i, label in enumerate(labels) if label >= 0]


def unit(x: Tensor) -> Tensor:
    return torch.stack([row / torch.sqrt((row * row).sum()) for row in x])


def squared(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b) ** 2).sum()


def mean(values: list[Tensor], like: Tensor) -> Tensor:
    return sum(values, start=like.sum() * 0) / max(1, len(values))


def contrastive(x: Tensor, labels: list[int], margin: float, normalise: bool, balanced: bool) -> Tensor:
    x = unit(x) if normalise else x
    same, other = [], []
    for i, j in itertools.combinations(valid(labels), 2):
        d = torch.sqrt(squared(x[i], x[j]))
        if labels[i] == labels[j]:
            same.append(d**2 / 2)
        else:
            other.append((margin - d) ** 2 / 2 if d < margin else d * 0)
    if balanced:
        return mean(same, x) / 2 + mean(other, x) / 2
    return mean(same + other, x)


def marginal(x: Tensor, labels: list[int], theta: float, xi: float) -> Tensor:
    x, m = unit(x), len(valid(labels))
    total = x.sum() * 0
    for i, j in itertools.permutations(valid(labels), 2):
        y = 1 if labels[i] == labels[j] else -1
        total = total + torch.relu(xi - y * (theta - squared(x[i], x[j])))
    return total / (m * m - m)


def triplets(labels: list[int]) -> Iterator[tuple[int, int, int]]:
    for a, p, n in itertools.permutations(valid(labels), 3):
        if labels[a] == labels[p] != labels[n]:
            yield a, p, n


def select(x: Tensor, labels: list[int], rule: str, alpha: float) -> list[tuple[int, int, int]]:
    """Every triplet of the batch that the rule takes; x are unit vectors."""
    every = list(triplets(labels))
    if rule == "batch_hard":
        chosen = []
        for anchor in sorted({a for a, _, _ in every}):
            own = [
                (squared(x[a], x[p]).item(), -squared(x[a], x[n]).item(), a, p, n) for a, p, n in every if a == anchor
            ]
            furthest, nearest = max(t[0] for t in own), max(t[1] for t in own)
            chosen.append(next(t[2:] for t in own if t[0] == furthest and t[1] == nearest))
        return chosen
    taken = []
    for a, p, n in every:
        d_ap, d_an = squared(x[a], x[p]), squared(x[a], x[n])
        kind = "hard" if d_an <= d_ap else "semi_hard" if d_an < d_ap + alpha else "easy"
        if rule in ("all", kind):
            taken.append((a, p, n))
    return taken


def triplet(x: Tensor, labels: list[int], alpha: float, rule: str, average: str) -> Tensor:
    x = unit(x)
    losses = [squared(x[a], x[p]) - squared(x[a], x[n]) + alpha for a, p, n in select(x, labels, rule, alpha)]
    losses = [torch.relu(loss) for loss in losses]
    if average == "active":
        losses = [loss for loss in losses if loss > 0]
    return mean(losses, x)


def projected(x: Tensor, labels: list[int], t: Tensor, alpha: float | None, every: bool = False) -> Tensor:
    """TSE with a margin, TPE without: every anchor and positive, with the most similar negative or every one."""
    x = unit(x)
    losses = []
    for a, p in itertools.permutations(valid(labels), 2):
        negatives = [(t @ x[a]) @ (t @ x[n]) for n in valid(labels) if labels[n] != labels[a]]
        if labels[a] != labels[p] or not negatives:
            continue
        s_p = (t @ x[a]) @ (t @ x[p])
        for s_n in negatives if every else [max(negatives, key=lambda s: s.item())]:
            if alpha is None:
                losses.append(-torch.log(torch.exp(s_p) / (torch.exp(s_p) + torch.exp(s_n))))
            else:
                losses.append(torch.relu(alpha + s_n - s_p))
    return mean(losses, x)


def coco(x: Tensor, labels: list[int], alpha: float, unit_centroids: bool = False) -> Tensor:
    identities = sorted({labels[i] for i in valid(labels)})
    of = unit(x) if unit_centroids else x
    centroids = {k: sum(of[i] for i in valid(labels) if labels[i] == k) / labels.count(k) for k in identities}
    losses = []
    for i in valid(labels):
        cos = {k: (x[i] @ c) / torch.sqrt((x[i] @ x[i]) * (c @ c)) for k, c in centroids.items()}
        losses.append(-torch.log(torch.exp(alpha * cos[labels[i]]) / sum(torch.exp(alpha * z) for z in cos.values())))
    return mean(losses, x)


def harmonic(values: list[Tensor]) -> Tensor:
    return len(values) / sum(1 / value for value in values)


def range_loss(x: Tensor, labels: list[int], k: int, margin: float, a: float, b: float, normalise: bool) -> Tensor:
    x = unit(x) if normalise else x
    identities = sorted({labels[i] for i in valid(labels)})
    intra, centres = [], []
    for identity in identities:
        own = [x[i] for i in valid(labels) if labels[i] == identity]
        centres.append(sum(own) / len(own))
        distances = sorted((squared(u, v) for u, v in itertools.combinations(own, 2)), key=lambda d: -d.item())
        if distances:
            intra.append(harmonic(distances[:k]))
    shortest = [squared(u, v) for u, v in itertools.combinations(centres, 2)]
    inter = torch.relu(margin - min(shortest, key=lambda d: d.item())) if shortest else x.sum() * 0
    return a * mean(intra, x) + b * inter


def center(x: Tensor, labels: list[int], centres: Tensor, gamma: float, normalise: bool) -> Tensor:
    x = unit(x) if normalise else x
    average = sum((c * c).sum() for c in centres) / len(centres)
    losses = []
    for i in valid(labels):
        c = centres[labels[i]]
        losses.append(squared(x[i], c) / 2 + gamma / 4 * ((c * c).sum() - average) ** 2)
    return mean(losses, x)


def moved_centres(x: Tensor, labels: list[int], centres: Tensor, alpha: float, gamma: float, normalise: bool) -> Tensor:
    """The paper's rule, with the gradient of gamma/4 (|c|^2 - M)^2, M a constant, among what a centre follows."""
    x = unit(x) if normalise else x
    average = sum((c * c).sum() for c in centres) / len(centres)
    moved = centres.clone()
    for j, c in enumerate(centres):
        own = [x[i] for i in valid(labels) if labels[i] == j]
        delta = sum((c - row + gamma * ((c * c).sum() - average) * c for row in own), start=c * 0) / (1 + len(own))
        moved[j] = c - alpha * delta
    return moved


def least_coco_scale(classes: int, loss: float) -> float:
    """By bisection on the loss of the best case: cosine 1 to the own centroid, -1 to all others."""
    low, high = 0.0, 1000.0
    for _ in range(200):
        middle = (low + high) / 2
        best = math.log1p((classes - 1) * math.exp(-2 * middle))
        low, high = (low, middle) if best <= loss else (middle, high)
    return high
