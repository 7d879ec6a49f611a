"""The networks: small ones (convolutional, residual), IResNet, MobileFaceNet, a vision transformer, one for vectors.

All take float images_BCHW and end in a linear layer, in the convolutional ones over all positions, so that the place of
a feature counts. A spectrogram is an image of one channel. Sides of feature maps are rounded up where a stride divides
them. Arguments that they have in common:

    channels, height, width: of the images.
    dimension: D of the embedding.
    dropout: share of features set to 0 in training: of the last ones, in the transformer inside the blocks.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN = 2  # layers of the MLP


class MLP(nn.Sequential):
    """For vectors: two hidden layers of linear, batch norm, ReLU and dropout, then linear and batch norm to D.

    Args:
        inputs: values of a sample, whatever its shape.
        units: of each hidden layer.
    """

    def __init__(self, inputs: int, dimension: int, units: int, dropout: float) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for _ in range(HIDDEN):
            layers += [nn.Linear(inputs, units, bias=False), nn.BatchNorm1d(units), nn.ReLU(), nn.Dropout(dropout)]
            inputs = units
        super().__init__(*layers, nn.Linear(inputs, dimension, bias=False), nn.BatchNorm1d(dimension))


STRIDES = (2, 1, 2, 1, 2)
WIDENING = (1, 1, 1, 1, 2)


class ConvNet(nn.Module):
    """What the demo trains on two CPU cores: five 3x3 convolutions, each with batch norm and ReLU.

    Strides stand in for pooling: at full resolution a CPU spends its time on moving activations, not on multiplying.

    Args:
        first: channels of the first convolution; the later ones have once or twice as many.
    """

    def __init__(self, channels: int, height: int, width: int, *, dimension: int, first: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for stride, times in zip(STRIDES, WIDENING, strict=True):
            outputs = first * times
            layers += [ChannelsLast(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs, height, width = outputs, -(-height // stride), -(-width // stride)
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(inputs * height * width, dimension, bias=False)
        self.norm = nn.BatchNorm1d(dimension)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        features_BCHW = self.features(images_BCHW)
        x_BD: torch.Tensor = self.norm(self.project(self.dropout(features_BCHW.flatten(1))))
        return x_BD


class ChannelsLast(nn.Conv2d):
    """3x3 convolution without bias that computes in channels-last order: about 1.5 times as fast on a CPU.

    Only the order in memory of what it computes with changes; its weight stays contiguous, as checkpoints want it.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, 3, stride, 1, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(memory_format=torch.channels_last)
        return F.conv2d(x_BCHW, weight, None, self.stride, self.padding)


SMALL_UNITS = {"resnet14": 2, "resnet20": 3}


class ResNet(nn.Module):
    """The residual network for small images (He et al. 2016, arXiv 1512.03385, section 4.2), cheaper and wider.

    Three stages of units conv-BN-ReLU-conv-BN, plus a shortcut, then ReLU. Already the first stage halves the
    resolution (28 -> 14 -> 7 -> 4), and the output is dropout-FC-BN over all positions instead of an average. ReLU's
    backward takes a twentieth of the time that PReLU's does on a CPU.

    Args:
        units: residual units of each stage.
        first: channels of the first stage; the later ones have 2 and 4 times as many.
    """

    def __init__(
        self, units: int, channels: int, height: int, width: int, *, dimension: int, first: int, dropout: float
    ) -> None:
        super().__init__()
        inputs = first
        self.stem = nn.Sequential(*convolution(channels, inputs, 3), nn.ReLU(inplace=True))
        stages: list[nn.Module] = []
        for times in (1, 2, 4):
            for unit in range(units):
                stages.append(PlainUnit(inputs, first * times, 1 if unit else 2))
                inputs = first * times
            height, width = -(-height // 2), -(-width // 2)
        self.stages = nn.Sequential(*stages)
        self.output = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(inputs * height * width, dimension, bias=False),
            nn.BatchNorm1d(dimension),
        )
        start(self, "fan_out")

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        x_BD: torch.Tensor = self.output(self.stages(self.stem(images_BCHW)))
        return x_BD


class PlainUnit(nn.Module):
    """y = ReLU(shortcut(x) + BN(conv(ReLU(BN(conv(x)))))); the shortcut is a 1x1 convolution and BN at a new shape."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first, second = convolution(inputs, outputs, 3, stride), convolution(outputs, outputs, 3)
        self.residual = nn.Sequential(*first, nn.ReLU(inplace=True), *second)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(*convolution(inputs, outputs, 1, stride))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return F.relu_(self.shortcut(x_BCHW) + self.residual(x_BCHW))


UNITS = {"iresnet18": (2, 2, 2, 2), "iresnet34": (3, 4, 6, 3), "iresnet50": (3, 4, 14, 3), "iresnet100": (3, 13, 30, 3)}
WIDTHS = (64, 128, 256, 512)


class IResNet(nn.Module):
    """The residual network of ArcFace (Deng et al. 2019, arXiv 1801.07698; its units follow Han et al. 2017).

    It differs from a ResNet for ImageNet in three things. The first convolution keeps the resolution, since face crops
    are small. A unit is BN-conv-BN-PReLU-conv-BN with the stride in its second convolution. The output is
    BN-dropout-FC-BN over all positions instead of an average over them.

    Args:
        units: residual units of each of the four stages, which halve the resolution: 112 -> 56 -> 28 -> 14 -> 7.
    """

    def __init__(
        self, units: tuple[int, ...], channels: int, height: int, width: int, *, dimension: int, dropout: float
    ) -> None:
        super().__init__()
        inputs = WIDTHS[0]
        self.stem = nn.Sequential(*convolution(channels, inputs, 3), nn.PReLU(inputs))
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
        start(self, "fan_out")

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        x_BD: torch.Tensor = self.output(self.stages(self.stem(images_BCHW)))
        return x_BD


class Unit(nn.Module):
    """y = shortcut(x) + BN(conv(PReLU(BN(conv(BN(x)))))); the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.BatchNorm2d(inputs),
            *convolution(inputs, outputs, 3),
            nn.PReLU(outputs),
            *convolution(outputs, outputs, 3, stride),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(*convolution(inputs, outputs, 1, stride))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        y_BCHW: torch.Tensor = self.shortcut(x_BCHW) + self.residual(x_BCHW)
        return y_BCHW


# expansion, channels, repetitions, stride of the first repetition
BOTTLENECKS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
STEM = 64
LAST = 512


class MobileFaceNet(nn.Module):
    """About a million parameters, for phones and CPUs (Chen et al. 2018, arXiv 1804.07573, table 1).

    Inverted residual bottlenecks with PReLU; a depthwise convolution as large as the last feature map replaces the
    global average, so that each position has its own weight.
    """

    def __init__(self, channels: int, height: int, width: int, dimension: int, dropout: float) -> None:
        super().__init__()
        layers = [*convolution(channels, STEM, 3, 2), nn.PReLU(STEM)]
        layers += [*convolution(STEM, STEM, 3, depthwise=True), nn.PReLU(STEM)]
        inputs = STEM
        height, width = -(-height // 2), -(-width // 2)
        for expansion, outputs, repetitions, stride in BOTTLENECKS:
            for index in range(repetitions):
                layers.append(Bottleneck(inputs, outputs, expansion, stride if index == 0 else 1))
                inputs = outputs
            height, width = -(-height // stride), -(-width // stride)
        self.features = nn.Sequential(*layers, *convolution(inputs, LAST, 1), nn.PReLU(LAST))
        self.output = nn.Sequential(
            nn.Conv2d(LAST, LAST, (height, width), groups=LAST, bias=False),
            nn.BatchNorm2d(LAST),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(LAST, dimension, bias=False),
            nn.BatchNorm1d(dimension),
        )
        start(self, "fan_in")  # torch counts the fan-out of a depthwise convolution as if it were dense

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        x_BD: torch.Tensor = self.output(self.features(images_BCHW))
        return x_BD


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


VIT_WIDTH, VIT_DEPTH, VIT_HEADS = 384, 12, 6


class VisionTransformer(nn.Module):
    """A small vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929): pre-norm blocks over square patches.

    Axes: T patches, E = 384 features. Patches are 8 pixels wide, 4 on images smaller than 64, so that the sequence
    neither explodes nor vanishes; images are padded on the right and below to whole patches. The embedding is read from
    the mean of the patches; there is no class token.
    """

    def __init__(self, channels: int, height: int, width: int, dimension: int, dropout: float) -> None:
        super().__init__()
        patch = 8 if min(height, width) >= 64 else 4
        self.padding = (0, -width % patch, 0, -height % patch)
        tokens = -(-height // patch) * -(-width // patch)
        self.patches = nn.Conv2d(channels, VIT_WIDTH, patch, patch)
        self.positions_TE = nn.Parameter(torch.empty(tokens, VIT_WIDTH))
        nn.init.trunc_normal_(self.positions_TE, std=0.02)
        self.blocks = nn.Sequential(*(Block(dropout) for _ in range(VIT_DEPTH)))
        self.norm = nn.LayerNorm(VIT_WIDTH)
        self.output = nn.Sequential(nn.Linear(VIT_WIDTH, dimension, bias=False), nn.BatchNorm1d(dimension))

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        x_BTE = self.patches(F.pad(images_BCHW, self.padding)).flatten(2).transpose(1, 2) + self.positions_TE
        x_BD: torch.Tensor = self.output(self.norm(self.blocks(x_BTE)).mean(dim=1))
        return x_BD


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(VIT_WIDTH)
        self.query_key_value = nn.Linear(VIT_WIDTH, 3 * VIT_WIDTH)
        self.attention_output = nn.Linear(VIT_WIDTH, VIT_WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(VIT_WIDTH),
            nn.Linear(VIT_WIDTH, 4 * VIT_WIDTH),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * VIT_WIDTH, VIT_WIDTH),
        )

    def forward(self, x_BTE: torch.Tensor) -> torch.Tensor:
        qkv_BT3E = self.query_key_value(self.attention_norm(x_BTE))
        q_BHTK, k_BHTK, v_BHTK = (
            part_BTE.unflatten(2, (VIT_HEADS, -1)).transpose(1, 2) for part_BTE in qkv_BT3E.chunk(3, dim=2)
        )
        mixed_BTE = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK).transpose(1, 2).flatten(2)
        x_BTE = x_BTE + self.attention_output(mixed_BTE)
        y_BTE: torch.Tensor = x_BTE + self.mlp(x_BTE)
        return y_BTE


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, depthwise: bool = False) -> list[nn.Module]:
    """A convolution and its batch norm, without activation; keeps the resolution at stride 1."""
    groups = inputs if depthwise else 1
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs)]


def start(network: nn.Module, mode: Literal["fan_in", "fan_out"]) -> None:
    """Fresh weights of its convolutions (He et al. 2015)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
