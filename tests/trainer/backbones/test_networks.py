"""The demo's network: what makes it fast must not change what it computes."""

import pytest
import torch
import torch.nn.functional as F

from trainer.backbones.networks import ChannelsLast


@pytest.mark.parametrize("inputs", [1, 3, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_gives_torchs_values_in_channels_last_order(inputs: int, stride: int) -> None:
    layer = ChannelsLast(inputs, 16, stride)
    x_BCHW = torch.randn(4, inputs, 9, 12)
    y_BCHW = layer(x_BCHW)
    torch.testing.assert_close(y_BCHW, F.conv2d(x_BCHW, layer.weight, stride=stride, padding=1))
    assert y_BCHW.is_contiguous(memory_format=torch.channels_last)


def test_the_weight_and_its_gradient_stay_in_the_order_of_checkpoints() -> None:
    layer = ChannelsLast(8, 16, 1)
    layer(torch.randn(4, 8, 9, 12)).square().sum().backward()
    assert layer.weight.is_contiguous()
    assert layer.weight.grad is not None
    assert layer.weight.grad.is_contiguous()
