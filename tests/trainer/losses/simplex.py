"""The arrangement of classes that the bounds are about."""

import math

import numpy as np
from numpy.typing import NDArray


def simplex(classes: int, dimension: int) -> NDArray[np.float64]:
    """The corners of a regular simplex on the unit sphere, [C, D]: every cosine between two is -1 / (C - 1)."""
    centred_CC = np.eye(classes) - 1 / classes
    corners_CC = np.linalg.svd(centred_CC)[0][:, : classes - 1] * math.sqrt(classes / (classes - 1))
    return np.pad(corners_CC, ((0, 0), (0, dimension - classes + 1)))
