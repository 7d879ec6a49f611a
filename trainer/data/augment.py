"""Random changes to training images, on whole batches, on the device where the images are.

The random numbers of a step are drawn for the whole global batch from (seed, epoch, step), and each rank takes those of
its rows: results do not depend on the number of ranks, nor on which other changes are switched on. They stay on the
CPU, which therefore knows what to do with which image without waiting for the device.

Legend: B slots of this rank (b some of them), G slots of the global batch, C channels, H height, W width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from trainer.data.arrays import ArrayForm, Form
from trainer.data.deform import CONTROL, bend, widen
from trainer.data.degrade import INTERPOLATIONS, blur, colour_matrices, jpeg, low_resolution
from trainer.data.stream import PADDING, Batch
from trainer.errors import UserError
from trainer.strict import Strict

# One column of uniform numbers in [0, 1) a sample for each of these, in tables with generators of their own: what a
# seed draws for one does not move when another gets longer.
_TABLES = {
    0xA06: (
        "rotate", "scale", "shear", "translate_x", "translate_y", "flip", "turn", "brightness", "contrast",
        "erase", "erase_area", "erase_ratio", "erase_x", "erase_y",
    ),
    0xA07: (
        "saturation", "hue", "greyscale", "blur", "blur_sigma", "low_resolution", "share", "down", "up",
        "jpeg", "jpeg_quality", "crop", "crop_area", "crop_ratio", "crop_x", "crop_y",
    ),
    0xA08: ("mirror", "stroke"),
}  # fmt: skip
_BENDS = 0xA09  # a table of 2 x K x K columns
_ERASED_AREA = (0.02, 0.25)  # share of the image
_ERASED_RATIO = (0.3, 1 / 0.3)  # height : width
_KEPT_AREA = (0.2, 1.0)  # of a crop, as AdaFace has it, and its ratio
_KEPT_RATIO = (3 / 4, 4 / 3)
_LEAST_SIGMA = 0.1  # pixels: no blur at all
_BEST_QUALITY = 95


class AugmentConfig(Strict):
    """Random changes to training images, on whole batches, in torch. 0 turns a change off.

    AdaFace's recipe (Kim et al. 2022) is about: flip, and 0.2 for each of crop and low_resolution, brightness 0.25,
    contrast 0.5, saturation 0.5.
    """

    rotate_degrees: float = Field(0.0, ge=0, le=180, description="uniform in +- this")
    scale: float = Field(0.0, ge=0, lt=1, description="zoom in 1 +- this")
    shear_degrees: float = Field(0.0, ge=0, le=60)
    translate: float = Field(0.0, ge=0, le=0.5, description="share of the image's side")
    elastic: float = Field(
        0.0, ge=0, le=0.5, description="smooth bending: 4 x 4 points are shifted by up to this share of the side"
    )
    stroke: float = Field(
        0.0, ge=0, le=1, description="dark strokes up to this share of a pixel wider or finer on each side"
    )
    flip: bool = Field(False, description="mirror half of the images (faces: true; characters: false)")
    erase: float = Field(0.0, ge=0, le=1, description="probability of erasing a random rectangle")
    crop: float = Field(0.0, ge=0, le=1, description="probability of keeping a random rectangle; the rest turns black")
    brightness: float = Field(0.0, ge=0, lt=1)
    contrast: float = Field(0.0, ge=0, lt=1)
    saturation: float = Field(0.0, ge=0, le=1, description="of colour images: factor in 1 +- this")
    hue: float = Field(0.0, ge=0, le=0.5, description="of colour images: turn in +- this share of the colour circle")
    greyscale: float = Field(0.0, ge=0, le=1, description="of colour images: probability of losing the colour")
    blur: float = Field(0.0, ge=0, le=1, description="probability of a Gaussian blur")
    blur_sigma: float = Field(2.0, ge=_LEAST_SIGMA, le=32, description="pixels; the strongest blur")
    low_resolution: float = Field(0.0, ge=0, le=1, description="probability of shrinking and stretching back")
    low_resolution_share: float = Field(0.2, gt=0, le=1, description="of the image's side; the smallest")
    jpeg: float = Field(0.0, ge=0, le=1, description="probability of the losses of a JPEG")
    jpeg_quality: int = Field(30, ge=1, le=_BEST_QUALITY, description="the lowest; the best is 95")
    quarter_turns: bool = Field(
        False, description="each of the 4 quarter turns of an identity is an identity of its own: 4 x the classes"
    )
    mirrors: bool = Field(
        False, description="the mirror image of an identity is an identity of its own: 2 x the classes"
    )

    @property
    def turns(self) -> int:
        """In how many directions an identity is one of its own."""
        return 4 if self.quarter_turns else 1

    @property
    def variants(self) -> int:
        """Classes that the head has for each identity."""
        return self.turns * (2 if self.mirrors else 1)


def check_augment(config: AugmentConfig, form: Form) -> None:
    """
    Raises:
        UserError: a change to images is switched on, and the samples are none.
    """
    on = [name for name, field in AugmentConfig.model_fields.items() if not field.default and getattr(config, name)]
    if on and isinstance(form, ArrayForm):
        raise UserError(f"augment.{on[0]} changes images, but the data set holds {form.reads}; switch it off")


def to_float(images_BCHW: torch.Tensor) -> torch.Tensor:
    """What the backbone reads, as the exported model makes it: of uint8 pixels x / 127.5 - 1, in -1..1; of vectors and
    spectrograms, which are float32, themselves. All that evaluation needs."""
    if images_BCHW.is_floating_point():
        return images_BCHW
    return images_BCHW.to(torch.float32, copy=True).div_(127.5).sub_(1.0)


@dataclass(frozen=True, slots=True)
class Augment:
    """Changes as `config` says, in this order: turned and mirrored, moved (one resampling), strokes widened, coloured,
    degraded, partly hidden, lightened.

    Areas moved in from outside repeat the border's pixels, so that white paper stays white.

    Attributes:
        seed: of the run.
        classes: of the data set. With `quarter_turns` an image turned by t x 90 degrees has label + t x classes; with
            `mirrors` a mirrored one has that of the other, plus half of all the head's classes.
        together: rows of the global batch that take the same turn and mirroring: K of P x K batches, so that the K
            samples of an identity stay samples of one.
    """

    config: AugmentConfig
    seed: int
    classes: int
    together: int = 1

    def __call__(self, batch: Batch, epoch: int, step: int, global_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Float images [B, C, H, W] in -1..1, on the device of the batch, and labels [B]; padding keeps `PADDING`.

        The batch itself is not changed. Vectors and spectrograms come back as they are.

        Args:
            global_batch: G, all ranks' slots; `batch.rows_B` are positions in it.

        Raises:
            UserError: quarter turns of images that are not square.
        """
        if batch.images_BCHW.is_floating_point():
            return batch.images_BCHW, batch.labels_B
        draws = self._draw(batch, epoch, step, global_batch)
        images_BCHW, labels_B = self._varied(batch, draws)
        images_BCHW = self._move(to_float(images_BCHW), draws)
        if self.config.stroke:
            share_B = _symmetric(draws["stroke"]) * self.config.stroke
            images_BCHW = widen(images_BCHW, share_B.to(images_BCHW.device, non_blocking=True))
        images_BCHW = self._colour(images_BCHW, draws)
        images_BCHW = self._degrade(images_BCHW, draws)
        images_BCHW = self._hide(images_BCHW, draws)
        return self._shade(images_BCHW, draws), labels_B

    def _varied(self, batch: Batch, draws: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images turned and mirrored into identities of their own, and the labels of these."""
        images_BCHW, labels_B, config = batch.images_BCHW, batch.labels_B, self.config
        if config.variants == 1:
            return images_BCHW, labels_B
        variant_B = (draws["turn"] * config.turns).long().clamp_(max=config.turns - 1)
        if config.mirrors:
            variant_B += (draws["mirror"] < 0.5) * config.turns
        varied_BCHW = images_BCHW.clone()
        for variant in range(1, config.variants):
            chosen_b = _places(variant_B == variant, images_BCHW)
            varied_BCHW[chosen_b] = as_variant(images_BCHW[chosen_b], variant, config)
        shift_B = variant_B.to(labels_B.device, non_blocking=True) * self.classes
        return varied_BCHW, torch.where(labels_B == PADDING, labels_B, labels_B + shift_B)

    def _draw(self, batch: Batch, epoch: int, step: int, global_batch: int) -> dict[str, torch.Tensor]:
        """Uniform numbers in [0, 1) by name, on the CPU."""
        draws: dict[str, torch.Tensor] = {}
        rows_B = batch.rows_B.cpu()

        def uniform(key: int, columns: int) -> torch.Tensor:
            random = np.random.default_rng([self.seed, epoch, step, key])
            return torch.from_numpy(random.random((global_batch, columns), dtype=np.float32))

        for key, names in _TABLES.items():
            table_GN = uniform(key, len(names))
            draws |= zip(names, table_GN[rows_B].unbind(1), strict=True)
            for name in {"turn", "mirror"}.intersection(names):
                draws[name] = table_GN[rows_B // self.together * self.together, names.index(name)]
        if self.config.elastic:
            draws["bend"] = uniform(_BENDS, 2 * CONTROL**2)[rows_B]
        return draws

    def _move(self, images_BCHW: torch.Tensor, draws: dict[str, torch.Tensor]) -> torch.Tensor:
        """Rotation, zoom, shear, shift, bending and mirroring in one bilinear resampling."""
        config = self.config
        moves = (config.rotate_degrees, config.scale, config.shear_degrees, config.translate, config.elastic)
        if not any(moves):
            if config.flip:
                mirrored_b = _places(draws["flip"] < 0.5, images_BCHW)
                images_BCHW[mirrored_b] = images_BCHW[mirrored_b].flip(-1)
            return images_BCHW
        height, width = images_BCHW.shape[-2:]
        theta_B23 = self._matrices(draws, width / height).to(images_BCHW.device, non_blocking=True)
        grid_BHW2 = F.affine_grid(theta_B23, list(images_BCHW.shape), align_corners=False)
        if config.elastic:
            shift_BN = 2 * config.elastic * _symmetric(draws["bend"])  # the image is 2 units wide
            grid_BHW2 = grid_BHW2 + bend(shift_BN.to(images_BCHW.device, non_blocking=True), height, width)
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

    def _colour(self, images_BCHW: torch.Tensor, draws: dict[str, torch.Tensor]) -> torch.Tensor:
        """Saturation, hue and loss of colour as one 3 x 3 matrix a sample."""
        config = self.config
        if images_BCHW.shape[1] != 3 or not (config.saturation or config.hue or config.greyscale):
            return images_BCHW
        saturation_B = 1 + _symmetric(draws["saturation"]) * config.saturation
        saturation_B[draws["greyscale"] < config.greyscale] = 0
        matrices_B33 = colour_matrices(saturation_B, _symmetric(draws["hue"]) * config.hue).to(
            images_BCHW.device, non_blocking=True
        )
        return torch.einsum("bcd,bdhw->bchw", matrices_B33, images_BCHW).clamp_(-1.0, 1.0)

    def _degrade(self, images_BCHW: torch.Tensor, draws: dict[str, torch.Tensor]) -> torch.Tensor:
        """Blur, low resolution and JPEG, each on its own share of the images: the way from a lens to a file."""
        config = self.config
        sigma_B = _LEAST_SIGMA + draws["blur_sigma"] * (config.blur_sigma - _LEAST_SIGMA)
        least = config.low_resolution_share
        share_B = least + draws["share"] * (1 - least)
        down_B, up_B = ((draws[way] * len(INTERPOLATIONS)).long() for way in ("down", "up"))
        quality_B = (config.jpeg_quality + draws["jpeg_quality"] * (_BEST_QUALITY + 1 - config.jpeg_quality)).long()
        effects: tuple[tuple[Callable[..., torch.Tensor], float, torch.Tensor, tuple[torch.Tensor, ...]], ...] = (
            (blur, config.blur, draws["blur"], (sigma_B,)),
            (low_resolution, config.low_resolution, draws["low_resolution"], (share_B, down_B, up_B)),
            (jpeg, config.jpeg, draws["jpeg"], (quality_B,)),
        )
        for effect, probability, draw_B, numbers in effects:
            chosen_b = torch.nonzero(draw_B < probability).flatten()
            if len(chosen_b):
                rows_b = chosen_b.to(images_BCHW.device, non_blocking=True)
                images_BCHW[rows_b] = effect(images_BCHW[rows_b], *(number_B[chosen_b] for number_B in numbers))
        return images_BCHW

    def _hide(self, images_BCHW: torch.Tensor, draws: dict[str, torch.Tensor]) -> torch.Tensor:
        """Keep a rectangle alone on black, as AdaFace crops: what is left stays in its place, so that faces stay
        aligned. Then fill one with the image's mean: random erasing (Zhong et al., 2020)."""
        if self.config.crop:
            inside_B1HW = _rectangle(draws, "crop", _KEPT_AREA, _KEPT_RATIO, images_BCHW)
            whole_B111 = (draws["crop"] >= self.config.crop).to(images_BCHW.device, non_blocking=True)[
                :, None, None, None
            ]
            images_BCHW = torch.where(inside_B1HW | whole_B111, images_BCHW, -1.0)
        if self.config.erase:
            inside_B1HW = _rectangle(draws, "erase", _ERASED_AREA, _ERASED_RATIO, images_BCHW)
            chosen_B111 = (draws["erase"] < self.config.erase).to(images_BCHW.device, non_blocking=True)[
                :, None, None, None
            ]
            images_BCHW = torch.where(inside_B1HW & chosen_B111, images_BCHW.mean((2, 3), keepdim=True), images_BCHW)
        return images_BCHW

    def _shade(self, images_BCHW: torch.Tensor, draws: dict[str, torch.Tensor]) -> torch.Tensor:
        """Contrast about the image's mean, then brightness; the result stays in -1..1."""
        if not (self.config.brightness or self.config.contrast):
            return images_BCHW
        factor_B = 1 + _symmetric(draws["contrast"]) * self.config.contrast
        shift_B = 2 * _symmetric(draws["brightness"]) * self.config.brightness
        factor_B111, shift_B111 = (
            x_B.to(images_BCHW.device, non_blocking=True)[:, None, None, None] for x_B in (factor_B, shift_B)
        )
        mean_B111 = images_BCHW.mean((1, 2, 3), keepdim=True)
        return ((images_BCHW - mean_B111) * factor_B111 + mean_B111 + shift_B111).clamp_(-1.0, 1.0)


def _symmetric(uniform_B: torch.Tensor) -> torch.Tensor:
    return 2 * uniform_B - 1


def _places(chosen_B: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Where the mask is true, on the device of the images, which need not be waited for."""
    return torch.nonzero(chosen_B).flatten().to(like.device, non_blocking=True)


def _rectangle(
    draws: dict[str, torch.Tensor], of: str, areas: tuple[float, float], ratios: tuple[float, float], like: torch.Tensor
) -> torch.Tensor:
    """Which pixels lie in a rectangle of random area (share of the image), ratio (height : width) and place."""
    height, width = like.shape[-2:]
    low, high = areas
    area_B = (low + (high - low) * draws[f"{of}_area"]) * height * width
    low, high = math.log(ratios[0]), math.log(ratios[1])
    ratio_B = torch.exp(low + (high - low) * draws[f"{of}_ratio"])
    inside_BH = _interval(torch.sqrt(area_B * ratio_B), draws[f"{of}_y"], height).to(like.device, non_blocking=True)
    inside_BW = _interval(torch.sqrt(area_B / ratio_B), draws[f"{of}_x"], width).to(like.device, non_blocking=True)
    return (inside_BH[:, :, None] & inside_BW[:, None, :]).unsqueeze(1)


def _interval(length_B: torch.Tensor, place_B: torch.Tensor, side: int) -> torch.Tensor:
    """Which of `side` pixels lie in an interval of the given length at a random place, as booleans [B, side]."""
    length_B = length_B.clamp(1, side).round()
    start_B = (place_B * (side - length_B + 1)).floor()
    pixels = torch.arange(side)
    return (pixels >= start_B[:, None]) & (pixels < (start_B + length_B)[:, None])


def as_variant(images_BCHW: torch.Tensor, variant: int, config: AugmentConfig) -> torch.Tensor:
    """What images of an identity become for its head's class `variant`, of `config.variants`: turned, then mirrored.

    Raises:
        UserError: quarter turns of images that are not square.
    """
    height, width = images_BCHW.shape[-2:]
    if config.quarter_turns and height != width:
        raise UserError(
            f"augment.quarter_turns needs square images, but data.height is {height} and data.width {width}; "
            "make them equal, or switch it off"
        )
    turned_BCHW = torch.rot90(images_BCHW, variant % config.turns, (2, 3))
    return turned_BCHW.flip(-1) if variant >= config.turns else turned_BCHW
