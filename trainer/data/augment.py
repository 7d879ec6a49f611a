"""Random changes to training images, on whole batches.

The random numbers of a step are drawn for the whole global batch from (seed, epoch, step), and each rank takes those of
its rows: results do not depend on the number of ranks, nor on which other changes are switched on.

Legend: B slots of this rank, G slots of the global batch, C channels, H height, W width.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from trainer.data.stream import PADDING, Batch
from trainer.errors import UserError
from trainer.strict import Strict

# One column of uniform numbers in [0, 1) a sample for each of these.
_COLUMNS = (
    "rotate", "scale", "shear", "translate_x", "translate_y", "flip", "turn", "brightness", "contrast",
    "erase", "erase_area", "erase_ratio", "erase_x", "erase_y",
)  # fmt: skip
_ERASED_AREA = (0.02, 0.25)  # share of the image
_ERASED_RATIO = (0.3, 1 / 0.3)  # height : width


class AugmentConfig(Strict):
    """Random changes to training images, on whole batches, in torch. 0 turns a change off."""

    rotate_degrees: float = Field(0.0, ge=0, le=180, description="uniform in +- this")
    scale: float = Field(0.0, ge=0, lt=1, description="zoom in 1 +- this")
    shear_degrees: float = Field(0.0, ge=0, le=60)
    translate: float = Field(0.0, ge=0, le=0.5, description="share of the image's side")
    flip: bool = Field(False, description="mirror half of the images (faces: true; characters: false)")
    erase: float = Field(0.0, ge=0, le=1, description="probability of erasing a random rectangle")
    brightness: float = Field(0.0, ge=0, lt=1)
    contrast: float = Field(0.0, ge=0, lt=1)
    quarter_turns: bool = Field(
        False, description="each of the 4 quarter turns of an identity is an identity of its own: 4 x the classes"
    )


def to_float(images_BCHW: torch.Tensor) -> torch.Tensor:
    """uint8 pixels to float32 in -1..1, as the exported model does it: x / 127.5 - 1. All that evaluation needs."""
    return images_BCHW.to(torch.float32, copy=True).div_(127.5).sub_(1.0)


@dataclass(frozen=True, slots=True)
class Augment:
    """Changes as `config` says: turned, zoomed, sheared, shifted (one resampling), mirrored, partly erased, lightened.

    Areas moved in from outside repeat the border's pixels, so that white paper stays white.

    Attributes:
        seed: of the run.
        classes: of the data set. With `quarter_turns` an image turned by t x 90 degrees has label + t x classes: the
            head then has 4 x classes.
        together: rows of the global batch that take the same quarter turn: K of P x K batches, so that the K samples
            of an identity stay samples of one.
    """

    config: AugmentConfig
    seed: int
    classes: int
    together: int = 1

    def __call__(self, batch: Batch, epoch: int, step: int, global_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Float images [B, C, H, W] in -1..1, on the device of the batch, and labels [B]; padding keeps `PADDING`.

        The batch itself is not changed.

        Args:
            global_batch: G, all ranks' slots; `batch.rows_B` are positions in it.

        Raises:
            UserError: quarter turns of images that are not square.
        """
        draws = self._draw(batch, epoch, step, global_batch)
        images_BCHW, labels_B = batch.images_BCHW, batch.labels_B
        if self.config.quarter_turns:
            turns_B = (draws["turn"] * 4).long().clamp_(max=3)
            images_BCHW = _quarter_turned(images_BCHW, turns_B)
            labels_B = torch.where(labels_B == PADDING, labels_B, labels_B + turns_B * self.classes)
        images_BCHW = self._move(to_float(images_BCHW), draws)
        images_BCHW = self._erase(images_BCHW, draws)
        return self._shade(images_BCHW, draws), labels_B

    def _draw(self, batch: Batch, epoch: int, step: int, global_batch: int) -> dict[str, torch.Tensor]:
        random = np.random.default_rng([self.seed, epoch, step, 0xA06])
        table_GN = torch.from_numpy(random.random((global_batch, len(_COLUMNS)), dtype=np.float32))
        turn = _COLUMNS.index("turn")
        table_GN[:, turn] = table_GN[torch.arange(global_batch) // self.together * self.together, turn]
        table_BN = table_GN[batch.rows_B.cpu()].to(batch.images_BCHW.device)
        return dict(zip(_COLUMNS, table_BN.unbind(1), strict=True))

    def _move(self, images_BCHW: torch.Tensor, draws: dict[str, torch.Tensor]) -> torch.Tensor:
        """Rotation, zoom, shear, shift and mirroring in one bilinear resampling."""
        config = self.config
        moves = (config.rotate_degrees, config.scale, config.shear_degrees, config.translate)
        if not any(moves):
            if config.flip:
                mirrored_B = draws["flip"] < 0.5
                images_BCHW[mirrored_B] = images_BCHW[mirrored_B].flip(-1)
            return images_BCHW
        height, width = images_BCHW.shape[-2:]
        theta_B23 = self._matrices(draws, width / height)
        grid_BHW2 = F.affine_grid(theta_B23, list(images_BCHW.shape), align_corners=False)
        return F.grid_sample(images_BCHW, grid_BHW2, mode="bilinear", padding_mode="border", align_corners=False)

    def _matrices(self, draws: dict[str, torch.Tensor], aspect: float) -> torch.Tensor:
        """Where each output pixel comes from, in coordinates -1..1 from edge to edge.

        Written for square pixels as A = rotation . shear / zoom; on an image that is not square x and y have different
        units, hence the factors `aspect` = width / height off the diagonal.
        """
        config = self.config
        angle_B = _symmetric(draws["rotate"]) * math.radians(config.rotate_degrees)
        zoom_B = 1 + _symmetric(draws["scale"]) * config.scale
        slope_B = torch.tan(_symmetric(draws["shear"]) * math.radians(config.shear_degrees))
        mirror_B = torch.where(draws["flip"] < 0.5, -1.0, 1.0) if config.flip else torch.ones_like(angle_B)
        cos_B, sin_B = torch.cos(angle_B) / zoom_B, torch.sin(angle_B) / zoom_B
        # the image is 2 units wide: a shift by its whole side would be 2
        shift_x_B, shift_y_B = (2 * config.translate * _symmetric(draws[f"translate_{axis}"]) for axis in "xy")
        row_x = [cos_B * mirror_B, (cos_B * slope_B - sin_B) / aspect, shift_x_B]
        row_y = [sin_B * mirror_B * aspect, sin_B * slope_B + cos_B, shift_y_B]
        return torch.stack([torch.stack(row_x, 1), torch.stack(row_y, 1)], 1)

    def _erase(self, images_BCHW: torch.Tensor, draws: dict[str, torch.Tensor]) -> torch.Tensor:
        """Fill a rectangle with the image's mean: random erasing (Zhong et al., 2020)."""
        if not self.config.erase:
            return images_BCHW
        height, width = images_BCHW.shape[-2:]
        low, high = _ERASED_AREA
        area_B = (low + (high - low) * draws["erase_area"]) * height * width
        low, high = math.log(_ERASED_RATIO[0]), math.log(_ERASED_RATIO[1])
        ratio_B = torch.exp(low + (high - low) * draws["erase_ratio"])
        inside_BH = _interval(torch.sqrt(area_B * ratio_B), draws["erase_y"], height)
        inside_BW = _interval(torch.sqrt(area_B / ratio_B), draws["erase_x"], width)
        chosen_B = draws["erase"] < self.config.erase
        erased_B1HW = (inside_BH[:, :, None] & inside_BW[:, None, :] & chosen_B[:, None, None]).unsqueeze(1)
        return torch.where(erased_B1HW, images_BCHW.mean((2, 3), keepdim=True), images_BCHW)

    def _shade(self, images_BCHW: torch.Tensor, draws: dict[str, torch.Tensor]) -> torch.Tensor:
        """Contrast about the image's mean, then brightness; the result stays in -1..1."""
        if not (self.config.brightness or self.config.contrast):
            return images_BCHW
        factor_B111 = (1 + _symmetric(draws["contrast"]) * self.config.contrast)[:, None, None, None]
        shift_B111 = (2 * _symmetric(draws["brightness"]) * self.config.brightness)[:, None, None, None]
        mean_B111 = images_BCHW.mean((1, 2, 3), keepdim=True)
        return ((images_BCHW - mean_B111) * factor_B111 + mean_B111 + shift_B111).clamp_(-1.0, 1.0)


def _symmetric(uniform_B: torch.Tensor) -> torch.Tensor:
    return 2 * uniform_B - 1


def _interval(length_B: torch.Tensor, place_B: torch.Tensor, side: int) -> torch.Tensor:
    """Which of `side` pixels lie in an interval of the given length at a random place, as booleans [B, side]."""
    length_B = length_B.clamp(1, side).round()
    start_B = (place_B * (side - length_B + 1)).floor()
    pixels = torch.arange(side, device=length_B.device)
    return (pixels >= start_B[:, None]) & (pixels < (start_B + length_B)[:, None])


def _quarter_turned(images_BCHW: torch.Tensor, turns_B: torch.Tensor) -> torch.Tensor:
    height, width = images_BCHW.shape[-2:]
    if height != width:
        raise UserError(
            f"augment.quarter_turns needs square images, but data.height is {height} and data.width {width}; "
            "make them equal, or switch it off"
        )
    turned_BCHW = images_BCHW.clone()
    for turns in (1, 2, 3):
        chosen_B = turns_B == turns
        turned_BCHW[chosen_B] = torch.rot90(images_BCHW[chosen_B], turns, (2, 3))
    return turned_BCHW
