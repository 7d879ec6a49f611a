"""Views of a sample at test time: moved, mirrored, turned or zoomed versions, from whose unit vectors is made one.

It is their mean; or they are laid one behind the other, for views that are other identities: a d that is mirrored is a
b, and a network that tells them apart sees something else in each.

A view is an affine map about the middle. Values between pixels are bilinear, those beyond an edge are the edge's.
Axes: B samples, C channels, H and W pixels, N = H W of them.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import cos, radians, sin
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator

from trainer.data.arrays import Pixels
from trainer.errors import UserError

MOST_VIEWS = 32  # each takes as long as an embedding
_ALLOWED = (
    "same, flip (left to right), left2 right2 up2 down2 (by pixels), turn5 turn-5 (by degrees, counter-clockwise), "
    "zoom1.1 (larger, 0.5 to 2), and several, as flip+turn90"
)
Join = Literal["mean", "concatenate"]
_NAME = re.compile(r"([a-z]+)(-?\d{1,3}(?:\.\d{1,3})?)", re.ASCII)
_Map = tuple[tuple[float, float, float], tuple[float, float, float]]


class _Kind(NamedTuple):
    """Amounts from `low` to `high` give the map from (x, y, 1) of a view to x and y in the sample."""

    low: float
    high: float
    map: Callable[[float], _Map]


_PLAIN: dict[str, _Map] = {"same": ((1, 0, 0), (0, 1, 0)), "flip": ((-1, 0, 0), (0, 1, 0))}
_KINDS = {
    "left": _Kind(0, 999, lambda pixels: ((1, 0, pixels), (0, 1, 0))),
    "right": _Kind(0, 999, lambda pixels: ((1, 0, -pixels), (0, 1, 0))),
    "up": _Kind(0, 999, lambda pixels: ((1, 0, 0), (0, 1, pixels))),
    "down": _Kind(0, 999, lambda pixels: ((1, 0, 0), (0, 1, -pixels))),
    "turn": _Kind(-180, 180, lambda d: ((cos(radians(d)), -sin(radians(d)), 0), (sin(radians(d)), cos(radians(d)), 0))),
    "zoom": _Kind(0.5, 2, lambda factor: ((1 / factor, 0, 0), (0, 1 / factor, 0))),
}


def _map_of(view: str) -> NDArray[np.float64]:
    """[2, 3]; of `a+b`, that of the view b of the view a."""
    whole_33: NDArray[np.float64] = np.eye(3)
    for part in view.split("+"):
        whole_33 = whole_33 @ np.vstack([_map_of_one(part, view), (0, 0, 1)])
    return whole_33[:2]


def _map_of_one(part: str, view: str) -> _Map:
    if part in _PLAIN:
        return _PLAIN[part]
    found = _NAME.fullmatch(part)
    if found and (kind := _KINDS.get(found[1])) and kind.low <= float(found[2]) <= kind.high:
        return kind.map(float(found[2]))
    raise UserError(f"'{view}' is no view of a sample; allowed: {_ALLOWED}")


def checked(views: Sequence[str]) -> tuple[str, ...]:
    """The views, once they are known to be some.

    Raises:
        UserError: one is unknown or named twice, or there are too many.
    """
    for view in views:
        _map_of(view)
    if len(views) > MOST_VIEWS or len(set(views)) < len(views):
        raise UserError(f"{len(views)} views, {len(set(views))} different ones; name each once, {MOST_VIEWS} at most")
    return tuple(views)


def joined(views: Sequence[str], join: Join) -> int:
    """How many of the model's vectors an embedding holds."""
    return len(views) if views and join == "concatenate" else 1


Views = Annotated[tuple[str, ...], AfterValidator(checked)]


def seen(samples_BCHW: Pixels, view: str) -> Pixels:
    """The samples in a view, of the same shape and type."""
    if view == "same":
        return samples_BCHW
    height, width = samples_BCHW.shape[2:]
    flat_BCN = samples_BCHW.reshape(*samples_BCHW.shape[:2], height * width)
    index_4N, weight_4N = _corners(view, height, width)
    if (weight_4N[0] == 1).all():
        return flat_BCN[:, :, index_4N[0]].reshape(samples_BCHW.shape)
    corners = zip(index_4N, weight_4N, strict=True)
    mixed_BCN = np.sum([weight_N * flat_BCN[:, :, index_N] for index_N, weight_N in corners], axis=0)
    rounded_BCN = np.rint(mixed_BCN) if samples_BCHW.dtype == np.uint8 else np.asarray(mixed_BCN)
    return rounded_BCN.astype(samples_BCHW.dtype).reshape(samples_BCHW.shape)


@lru_cache(4 * MOST_VIEWS)
def _corners(view: str, height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The four pixels that each of a view's lies between, and their weights: [4, N] each."""
    y_N, x_N = (side.ravel() for side in np.indices((height, width)))
    middle_2 = np.array([[(width - 1) / 2], [(height - 1) / 2]])
    from_2N = _map_of(view) @ np.stack([*(np.stack([x_N, y_N]) - middle_2), np.ones_like(x_N)]) + middle_2
    from_2N = np.clip(np.round(from_2N, 9), 0, 2 * middle_2)  # a quarter turn moves pixels onto pixels
    low_2N = np.floor(from_2N).astype(np.int64)
    (right_N, down_N), (x_N, y_N) = from_2N - low_2N, low_2N
    across_N, below_N = np.minimum(x_N + 1, width - 1), np.minimum(y_N + 1, height - 1)
    index_4N = np.stack([y_N * width + x_N, y_N * width + across_N, below_N * width + x_N, below_N * width + across_N])
    weights = [(1 - down_N) * (1 - right_N), (1 - down_N) * right_N, down_N * (1 - right_N), down_N * right_N]
    return index_4N, np.stack(weights).astype(np.float32)
