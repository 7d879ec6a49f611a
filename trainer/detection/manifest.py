"""`manifest.json` of a detector: how `detector.onnx` wants its pixels, and what its outputs mean."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.detection.align import Template
from trainer.detection.quality import Bounds
from trainer.strict import Strict

Colour = tuple[Annotated[float, Field(allow_inf_nan=False)], ...]


class Level(Strict):
    """Three outputs that belong together, by their names: scores of N places, boxes [N, 4], landmarks [N, 10].

    A first axis of length 1 may stand before them. Without a `stride` a box is left, top, right and bottom, in pixels
    of the input, and the landmarks are x and y in turn. With one, the N places are the cells of a grid, row by row, as
    many to a cell as divide N; a box is its distances from the cell to left, top, right and bottom, and landmarks are
    offsets from it, all in strides (as SCRFD has it: Guo et al. 2021, "Sample and Computation Redistribution for
    Efficient Face Detection").
    """

    scores: str
    boxes: str
    landmarks: str
    stride: int | None = Field(None, ge=1, le=256)


class DetectorManifest(Strict):
    """The ONNX takes float32 (value - mean) / std of one picture, scaled to fit its upper left corner."""

    format: Literal[1] = 1
    height: int = Field(ge=8, le=4096, description="of the input, in pixels")
    width: int = Field(ge=8, le=4096)
    mode: Literal["L", "RGB", "BGR"] = "RGB"
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    mean: Colour = Field((127.5,), description="of values from 0 to 255: one number, or one a channel")
    std: Colour = (128.0,)
    outputs: tuple[Level, ...] = Field(min_length=1, max_length=16)
    score_threshold: float = Field(0.5, ge=0, le=1, description="places with less are no faces")
    nms_iou: float = Field(0.4, gt=0, le=1, description="of two boxes that overlap by more, the better one stays")
    template: Template
    quality: Bounds = Field(Bounds(), description="what `--min-quality manifest` asks of a face")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        channels = 1 if self.mode == "L" else 3
        if len(self.mean) not in (1, channels) or len(self.std) not in (1, channels):
            raise ValueError(f"mean and std have one number, or {channels} in mode {self.mode}")
        if min(self.std) <= 0:
            raise ValueError("std must be above 0")
        return self
