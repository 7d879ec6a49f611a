"""What hands do to characters: elastic deformation, and strokes that are wider or finer. In torch, as `degrade` is.

Legend: B images, C channels, H height, W width, K control points along a side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CONTROL = 4  # K: a character bends in a few places, it does not tremble


def bend(shift_BN: Tensor, height: int, width: int) -> Tensor:
    """A smooth field [B, H, W, 2] of shifts in x and y, by bicubic interpolation between K x K control points.

    Simard et al. 2003 smooth a field of random shifts at every pixel; control points need fewer random numbers.

    Args:
        shift_BN: of the control points, N = 2 K K; the result is in the same unit.
    """
    field_B2KK = shift_BN.view(-1, 2, CONTROL, CONTROL)
    return F.interpolate(field_B2KK, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


def widen(images_BCHW: Tensor, share_B: Tensor) -> Tensor:
    """Dark strokes widened by up to a pixel on each side (share 1), or made finer by as much (share -1).

    The image is mixed with its erosion or its dilation by 3 x 3 pixels, by this share.
    """
    share_B111 = share_B[:, None, None, None]
    darker_BCHW = -F.max_pool2d(-images_BCHW, 3, 1, 1)
    lighter_BCHW = F.max_pool2d(images_BCHW, 3, 1, 1)
    return torch.lerp(images_BCHW, torch.where(share_B111 > 0, darker_BCHW, lighter_BCHW), share_B111.abs())
