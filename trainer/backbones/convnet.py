"""A small convolutional network for small images: what the demo trains on two CPU cores."""

import torch
from torch import nn

STRIDES = (2, 1, 2, 1, 2)
WIDENING = (1, 1, 2, 2, 2)


class ConvNet(nn.Module):
    """Five 3x3 convolutions, each with batch norm and ReLU, then one linear layer over all positions.

    Strides stand in for pooling: at full resolution a CPU spends its time on moving activations, not on multiplying.

    Args:
        channels, height, width: of the images.
        dimension: D of the embedding.
        first: channels of the first convolution; the later ones have once or twice as many.
        dropout: share of the last features set to 0 in training.
    """

    def __init__(self, channels: int, height: int, width: int, dimension: int, first: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for stride, times in zip(STRIDES, WIDENING, strict=True):
            outputs = first * times
            layers += convolution(inputs, outputs, stride)
            inputs, height, width = outputs, halved(height, stride), halved(width, stride)
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(inputs * height * width, dimension, bias=False)
        self.norm = nn.BatchNorm1d(dimension)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        features_BCHW = self.features(images_BCHW)
        x_BD: torch.Tensor = self.norm(self.project(self.dropout(features_BCHW.flatten(1))))
        return x_BD


def convolution(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    """3x3 convolution, batch norm, ReLU; He initialisation for the ReLU that follows."""
    layer = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def halved(side: int, stride: int) -> int:
    """Side of the output of a 3x3 convolution with padding 1: side / stride, rounded up."""
    return -(-side // stride)
