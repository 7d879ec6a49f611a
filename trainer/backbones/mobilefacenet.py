"""MobileFaceNet (Chen et al. 2018, arXiv 1804.07573, table 1): about a million parameters, for phones and CPUs.

Inverted residual bottlenecks with PReLU; a depthwise convolution as large as the last feature map replaces the global
average, so that each position has its own weight.
"""

import torch
from torch import nn

# expansion, channels, repetitions, stride of the first repetition
BOTTLENECKS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
STEM = 64
LAST = 512


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, depthwise: bool = False) -> list[nn.Module]:
    """A convolution and its batch norm, without activation; keeps the resolution at stride 1."""
    groups = inputs if depthwise else 1
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class Bottleneck(nn.Module):
    """Expand with 1x1, filter each channel with 3x3, project linearly with 1x1; plus x where the shape stays."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.keeps_shape = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            *convolution(inputs, inner, 1),
            nn.PReLU(inner),
            *convolution(inner, inner, 3, stride, depthwise=True),
            nn.PReLU(inner),
            *convolution(inner, outputs, 1),
        )

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        y_BCHW: torch.Tensor = self.layers(x_BCHW)
        return x_BCHW + y_BCHW if self.keeps_shape else y_BCHW


class MobileFaceNet(nn.Module):
    """Args: channels, height, width of the images; dimension D of the embedding; dropout before the last layer."""

    def __init__(self, channels: int, height: int, width: int, dimension: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            *convolution(channels, STEM, 3, 2),
            nn.PReLU(STEM),
            *convolution(STEM, STEM, 3, depthwise=True),
            nn.PReLU(STEM),
        ]
        inputs = STEM
        height, width = -(-height // 2), -(-width // 2)
        for expansion, outputs, repetitions, stride in BOTTLENECKS:
            for index in range(repetitions):
                layers.append(Bottleneck(inputs, outputs, expansion, stride if index == 0 else 1))
                inputs = outputs
            height, width = -(-height // stride), -(-width // stride)
        layers += [*convolution(inputs, LAST, 1), nn.PReLU(LAST)]
        self.features = nn.Sequential(*layers)
        self.output = nn.Sequential(
            nn.Conv2d(LAST, LAST, (height, width), groups=LAST, bias=False),
            nn.BatchNorm2d(LAST),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(LAST, dimension, bias=False),
            nn.BatchNorm1d(dimension),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # fan_in: torch counts the fan-out of a depthwise convolution as if it were dense
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        x_BD: torch.Tensor = self.output(self.features(images_BCHW))
        return x_BD
