"""IResNet: the residual network of ArcFace (Deng et al. 2019, arXiv 1801.07698; its units follow Han et al. 2017).

It differs from a ResNet for ImageNet in three things. The first convolution keeps the resolution, since face crops are
small. A unit is BN-conv-BN-PReLU-conv-BN with the stride in its second convolution. The output is BN-dropout-FC-BN
over all positions instead of an average over them, so that the place of a feature counts.
"""

import torch
from torch import nn

UNITS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
}
WIDTHS = (64, 128, 256, 512)


class Unit(nn.Module):
    """y = shortcut(x) + BN(conv(PReLU(BN(conv(BN(x)))))); the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        y_BCHW: torch.Tensor = self.shortcut(x_BCHW) + self.residual(x_BCHW)
        return y_BCHW


class IResNet(nn.Module):
    """Four stages of units, each halving the resolution (rounded up): 112 -> 56 -> 28 -> 14 -> 7.

    Args:
        units: residual units of each stage.
        channels, height, width: of the images.
        dimension: D of the embedding.
        dropout: share of the last features set to 0 in training.
    """

    def __init__(
        self, units: tuple[int, ...], channels: int, height: int, width: int, dimension: int, dropout: float
    ) -> None:
        super().__init__()
        inputs = WIDTHS[0]
        self.stem = nn.Sequential(
            nn.Conv2d(channels, inputs, 3, 1, 1, bias=False), nn.BatchNorm2d(inputs), nn.PReLU(inputs)
        )
        stages: list[nn.Module] = []
        for count, outputs in zip(units, WIDTHS, strict=True):
            stages += [Unit(inputs, outputs, 2), *(Unit(outputs, outputs, 1) for _ in range(count - 1))]
            inputs, height, width = outputs, -(-height // 2), -(-width // 2)
        self.stages = nn.Sequential(*stages)
        self.output = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(inputs * height * width, dimension),
            nn.BatchNorm1d(dimension, affine=False),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        x_BD: torch.Tensor = self.output(self.stages(self.stem(images_BCHW)))
        return x_BD
