"""The elementary losses that the others grew from: torch's own where torch has them, one line where it has not.

Legend: N samples, C classes, D dimensions; t in {-1, +1} or {0, 1} the target, z a real-valued prediction, p a
probability. All are means over the samples unless `reduction` says otherwise, and differentiable by torch's autograd.

Binary targets differ by loss, as in the literature: cross entropy and focal take {0, 1}, the margin losses {-1, +1}.
`hypersphere losses` lists them after the losses that a config can name.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import binary_cross_entropy, cross_entropy, huber_loss, l1_loss, mse_loss, soft_margin_loss


def hinge_loss(z_N: Tensor, t_N: Tensor) -> Tensor:
    """What torch's `hinge_embedding_loss` makes of negative pairs at the distance t z."""
    return functional.hinge_embedding_loss(t_N * z_N, -torch.ones_like(z_N))


def exponential_loss(z_N: Tensor, t_N: Tensor) -> Tensor:
    return (-t_N * z_N).exp().mean()


def focal_loss(z_N: Tensor, t_N: Tensor, gamma: float = 2.0, balance: float = 0.25) -> Tensor:
    """On logits: p_t = sigmoid(z) and a_t = balance for t = 1, else 1 - sigmoid(z) and 1 - balance.

    Computed from log p_t, so that neither end loses digits.
    """
    signed_N = z_N * (2 * t_N - 1)
    weight_N = balance * t_N + (1 - balance) * (1 - t_N)
    fade_N = (gamma * functional.logsigmoid(-signed_N)).exp()
    return (-weight_N * fade_N * functional.logsigmoid(signed_N)).mean()


def l2_regularized_softmax(x_ND: Tensor, w_CD: Tensor, bias_C: Tensor, labels_N: Tensor, decay: float) -> Tensor:
    """Softmax regression: cross entropy of x W^T + bias, plus decay / 2 |W|^2 (the bias is not held down)."""
    return cross_entropy(functional.linear(x_ND, w_CD, bias_C), labels_N) + decay / 2 * w_CD.square().sum()


class Elementary(NamedTuple):
    """A row of the table of elementary losses.

    Attributes:
        formula: of one sample; the loss is its mean.
        gradient: its derivative by z (by p for binary cross entropy, by the logits W x + b for softmax).
        function: what computes it.
    """

    name: str
    formula: str
    gradient: str
    source: str
    function: Callable[..., Tensor]


ELEMENTARY = (
    Elementary("l1", "|z - t|", "sign(z - t)", "Laplace 1774; torch.nn.functional.l1_loss", l1_loss),
    Elementary("l2", "(z - t)^2", "2 (z - t)", "Legendre 1805; torch.nn.functional.mse_loss", mse_loss),
    Elementary(
        "huber",
        "(z - t)^2 / 2 where |z - t| < delta, else delta (|z - t| - delta / 2)",
        "z - t, held within [-delta, delta]",
        "Huber 1964, Robust estimation of a location parameter; torch.nn.functional.huber_loss",
        huber_loss,
    ),
    Elementary(
        "binary_cross_entropy",
        "-t log p - (1 - t) log(1 - p), t in {0, 1}",
        "(p - t) / (p (1 - p))",
        "Cox 1958, The regression analysis of binary sequences; torch.nn.functional.binary_cross_entropy",
        binary_cross_entropy,
    ),
    Elementary(
        "logistic",
        "log(1 + exp(-t z)), t in {-1, +1}",
        "-t / (1 + exp(t z))",
        "Friedman et al. 2000, Additive logistic regression; torch.nn.functional.soft_margin_loss",
        soft_margin_loss,
    ),
    Elementary(
        "hinge",
        "max(0, 1 - t z), t in {-1, +1}",
        "-t where t z < 1, else 0",
        "Cortes and Vapnik 1995, Support-vector networks",
        hinge_loss,
    ),
    Elementary(
        "exponential",
        "exp(-t z), t in {-1, +1}",
        "-t exp(-t z)",
        "Freund and Schapire 1997, A decision-theoretic generalization of on-line learning",
        exponential_loss,
    ),
    Elementary(
        "softmax_l2",
        "-log softmax(W x + b)_t, once plus decay / 2 |W|^2",
        "p - onehot(t); dL/dW has decay W besides",
        "Bishop 2006, Pattern recognition and machine learning, 4.3.4",
        l2_regularized_softmax,
    ),
    Elementary(
        "binary_focal",
        "-a_t (1 - p_t)^gamma log p_t, t in {0, 1}",
        "(2 t - 1) a_t (1 - p_t)^gamma (gamma p_t log p_t + p_t - 1)",
        "Lin et al. 2017, Focal loss for dense object detection, eq. 5",
        focal_loss,
    ),
)
