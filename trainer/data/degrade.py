"""What cameras and networks do to images: blur, low resolution, JPEG. In torch, so that it runs where the images are.

All functions take float images in -1..1 and one number a sample, and return new ones. The numbers lie on the CPU, so
that nothing waits for the device.

Legend: B images, C channels, H height, W width, N blocks of 8 x 8 pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# AdaFace draws among five of OpenCV's; torch has these four of them, by the same rules, and no Lanczos filter.
INTERPOLATIONS = ("nearest", "area", "bilinear", "bicubic")
_LUMA = (0.299, 0.587, 0.114)
# Quantisation tables of quality 50, ITU-T T.81, annex K.
_LUMA_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
_CHROMA_TABLE = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99), (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99), *(((99,) * 8,) * 4),
)  # fmt: skip


def colour_matrices(saturation_B: Tensor, turn_B: Tensor) -> Tensor:
    """[B, 3, 3], by which RGB is multiplied: chroma times `saturation` (0: grey) and turned by `turn` (1: full circle).

    Luma (ITU-R BT.601) and grey stay as they are: the turn is one of the plane of Cb and Cr, scaled to equal axes.
    """
    angle_B = 2 * math.pi * turn_B
    cos_B, sin_B = saturation_B * torch.cos(angle_B), saturation_B * torch.sin(angle_B)
    turn_B22 = torch.stack([torch.stack([cos_B, -sin_B], 1), torch.stack([sin_B, cos_B], 1)], 1)
    to_33 = _ycc()
    inner_B33 = torch.eye(3).repeat(len(turn_B), 1, 1)
    inner_B33[:, 1:, 1:] = turn_B22
    matrices_B33: Tensor = torch.linalg.inv(to_33) @ inner_B33 @ to_33
    return matrices_B33


def blur(images_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """Gaussian blur with a deviation of `sigma` pixels; beyond the border there is nothing, and weights sum to 1."""
    height, width = images_BCHW.shape[-2:]
    rows_BHH, columns_BWW = (
        _gaussian(sigma_B, side).to(images_BCHW.device, non_blocking=True) for side in (height, width)
    )
    return rows_BHH[:, None] @ images_BCHW @ columns_BWW[:, None].mT


def low_resolution(images_BCHW: Tensor, share_B: Tensor, down_B: Tensor, up_B: Tensor) -> Tensor:
    """Sides shrunk to a share and stretched back: how AdaFace imitates faces far away (Kim et al. 2022, section 4.1).

    Args:
        share_B: of the side, in 0..1.
        down_B, up_B: positions in `INTERPOLATIONS`, for the two ways; without antialiasing, except "area".
    """
    height, width = images_BCHW.shape[-2:]
    found = []
    for image_CHW, share, down, up in zip(images_BCHW, share_B.tolist(), down_B.tolist(), up_B.tolist(), strict=True):
        small = max(1, int(share * height)), max(1, int(share * width))
        small_1Chw = F.interpolate(image_CHW[None], small, mode=INTERPOLATIONS[down])
        found.append(F.interpolate(small_1Chw, (height, width), mode=INTERPOLATIONS[up]))
    return torch.cat(found).clamp_(-1.0, 1.0)  # bicubic overshoots


def jpeg(images_BCHW: Tensor, quality_B: Tensor) -> Tensor:
    """The losses of a JPEG of this quality (1..100) in libjpeg's scale, colour with chroma at half the resolution.

    Coding the numbers that are left loses nothing and is left out. Gradients are zero: the values are rounded.
    """
    height, width = images_BCHW.shape[-2:]
    colour = images_BCHW.shape[1] == 3
    step = 16 if colour else 8
    grey_B = (images_BCHW + 1).mul_(127.5).round_()
    padded_BCHW = F.pad(grey_B, (0, -width % step, 0, -height % step), mode="replicate")
    luma_B188, chroma_B188 = (_quantisers(quality_B, table, grey_B.device) for table in (_LUMA_TABLE, _CHROMA_TABLE))
    if colour:
        ycc_33 = _ycc().to(grey_B.device, non_blocking=True)
        ycc_BCHW = torch.einsum("cd,bdhw->bchw", ycc_33, padded_BCHW)
        luma_B1HW = _quantised(ycc_BCHW[:, :1].round() - 128, luma_B188) + 128
        half_B2hw = F.avg_pool2d(ycc_BCHW[:, 1:], 2).round_()
        # libjpeg's "fancy upsampling" weighs neighbours 3 : 1, as bilinear interpolation does
        chroma_B2HW = F.interpolate(_quantised(half_B2hw, chroma_B188), scale_factor=2, mode="bilinear")
        ycc_BCHW = torch.cat([luma_B1HW, chroma_B2HW], 1)
        found_BCHW = torch.einsum(
            "cd,bdhw->bchw", torch.linalg.inv(_ycc()).to(grey_B.device, non_blocking=True), ycc_BCHW
        )
    else:
        found_BCHW = _quantised(padded_BCHW - 128, luma_B188) + 128
    return found_BCHW[..., :height, :width].round().clamp_(0, 255).div_(127.5).sub_(1.0)


def _ycc() -> Tensor:
    """RGB to luma, Cb and Cr (these about 0), as JFIF has them; each of its rows for Cb and Cr sums to 0."""
    luma_3 = torch.tensor(_LUMA)
    red_3, blue_3 = torch.eye(3)[0], torch.eye(3)[2]
    return torch.stack([luma_3, (blue_3 - luma_3) / (2 - 2 * _LUMA[2]), (red_3 - luma_3) / (2 - 2 * _LUMA[0])])


def _gaussian(sigma_B: Tensor, side: int) -> Tensor:
    """[B, side, side]: each row weighs the pixels of a line by their distance from one of them."""
    pixels = torch.arange(side, dtype=torch.float32)
    squares = (pixels[:, None] - pixels) ** 2
    return torch.softmax(-squares / (2 * sigma_B[:, None, None] ** 2), dim=-1)


def _quantisers(quality_B: Tensor, table: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """[B, 1, 8, 8]: the steps in which coefficients are kept, libjpeg's `jpeg_quality_scaling` of the table."""
    quality_B = quality_B.float().clamp(1, 100)
    percent_B = torch.where(quality_B < 50, (5000 / quality_B).floor(), 200 - 2 * quality_B)
    scaled_B88 = ((torch.tensor(table) * percent_B[:, None, None] + 50) / 100).floor_()
    return scaled_B88.clamp_(1, 255)[:, None].to(device, non_blocking=True)


def _quantised(planes_BCHW: Tensor, quantisers_B188: Tensor) -> Tensor:
    """Each 8 x 8 block in steps of its coefficients of the cosine transform."""
    frequency = torch.arange(8, dtype=torch.float32)
    dct_88 = torch.cos(math.pi / 8 * (frequency + 0.5) * frequency[:, None]) / 2
    dct_88[0] /= math.sqrt(2)
    dct_88 = dct_88.to(planes_BCHW.device, non_blocking=True)
    blocks_BCHW88 = planes_BCHW.unfold(2, 8, 8).unfold(3, 8, 8)
    steps_B11188 = quantisers_B188[:, :, None, None]
    kept_BCHW88 = (dct_88 @ blocks_BCHW88 @ dct_88.T / steps_B11188).round_() * steps_B11188
    return (dct_88.T @ kept_BCHW88 @ dct_88).round_().clamp_(-128, 127).transpose(3, 4).reshape(planes_BCHW.shape)
