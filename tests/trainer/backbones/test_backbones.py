"""Every backbone: shapes, sizes known from the papers, gradients, and what a wrong name says."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from trainer.backbones import build, networks
from trainer.config import BackboneConfig
from trainer.errors import UserError

SMALL = ("convnet", "resnet14", "iresnet18", "mobilefacenet", "vit", "mlp")


def small(name: str, channels: int = 1, height: int = 28, width: int = 28, dimension: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return build(BackboneConfig(name=name, dimension=dimension, width=16), channels, height, width)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 16, 16), (1, 28, 28), (3, 33, 50), (3, 64, 20)])
def test_any_size_from_16_and_1_or_3_channels(name: str, channels: int, height: int, width: int) -> None:
    backbone = small(name, channels, height, width)
    x_BD = backbone(torch.rand(4, channels, height, width) * 2 - 1)
    assert x_BD.shape == (4, 32)
    assert x_BD.dtype == torch.float32
    assert torch.isfinite(x_BD).all()


@pytest.mark.parametrize(
    ("name", "dimension", "millions"),
    [
        ("iresnet18", 512, 24.0),  # insightface's model zoo: r18 24.0M, r34 34.1M, r50 43.6M, r100 65.2M
        ("iresnet34", 512, 34.1),
        ("iresnet50", 512, 43.6),
        ("iresnet100", 512, 65.2),
        ("mobilefacenet", 128, 1.0),  # its paper, table 1: 0.99M
        ("mobilefacenet", 512, 1.2),
        ("vit", 512, 21.6),  # ViT-S/16 without its classifier has 21.7M
    ],
)
def test_parameter_count_at_112_pixels_is_the_published_one(name: str, dimension: int, millions: float) -> None:
    with torch.device("meta"):
        backbone = build(BackboneConfig(name=name, dimension=dimension), 3, 112, 112)
    count = sum(parameter.numel() for parameter in backbone.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(("name", "count"), [("resnet14", 170_640), ("resnet20", 267_408)])
def test_the_small_residual_networks_have_the_convolutions_of_their_paper(name: str, count: int) -> None:
    """He et al. 2016, table 6, by hand: 16, 32 and 64 channels, n units a stage. We add a shortcut."""
    backbone = small(name)
    convolutions = [module.weight for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    assert sum(weight.numel() for weight in convolutions if weight.shape[-1] == 3) == count
    assert sum(weight.numel() for weight in convolutions if weight.shape[-1] == 1) == 16 * 16 + 16 * 32 + 32 * 64


@pytest.mark.parametrize("name", ["iresnet34", "iresnet50", "iresnet100"])
def test_iresnet_ends_at_7_by_7_for_112_pixels(name: str) -> None:
    with torch.device("meta"):
        backbone = build(BackboneConfig(name=name), 3, 112, 112)
        x_BD = backbone(torch.empty(2, 3, 112, 112))
    assert x_BD.shape == (2, 512)
    linear = next(module for module in backbone.modules() if isinstance(module, nn.Linear))
    assert linear.in_features == 512 * 7 * 7


@pytest.mark.parametrize("name", SMALL)
def test_a_gradient_reaches_every_parameter(name: str) -> None:
    backbone = small(name)
    x_BD = backbone(torch.rand(8, 1, 28, 28) * 2 - 1)
    (x_BD * torch.randn(x_BD.shape)).sum().backward()
    for key, parameter in backbone.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", SMALL)
def test_in_eval_an_embedding_does_not_depend_on_its_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "VIT_DEPTH", 2)  # ten more blocks of the same kind would only take longer
    backbone = build(BackboneConfig(name=name, dimension=32, width=16, dropout=0.5), 1, 28, 28)
    images_BCHW = torch.rand(6, 1, 28, 28) * 2 - 1
    with torch.no_grad():
        for _ in range(20):
            backbone(images_BCHW)  # the running statistics leave their start values
        backbone.eval()
        together_BD = backbone(images_BCHW)
        alone_BD = torch.cat([backbone(image_CHW[None]) for image_CHW in images_BCHW])
        assert torch.equal(together_BD, backbone(images_BCHW))
    torch.testing.assert_close(together_BD, alone_BD, rtol=1e-4, atol=1e-4)
    assert together_BD.std(dim=0).max() > 1e-3  # and it does depend on the image


@pytest.mark.parametrize("name", SMALL)
def test_the_same_seed_gives_the_same_weights(name: str) -> None:
    for one, other in zip(small(name).parameters(), small(name).parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", SMALL)
def test_bf16_weights_give_finite_embeddings_and_gradients(name: str) -> None:
    backbone = small(name).bfloat16()
    x_BD = backbone((torch.rand(8, 1, 28, 28) * 2 - 1).bfloat16())
    assert x_BD.dtype == torch.bfloat16
    x_BD.float().square().mean().backward()
    assert all(
        torch.isfinite(parameter.grad).all() for parameter in backbone.parameters() if parameter.grad is not None
    )


def test_an_unknown_name_lists_the_allowed_ones_and_the_closest() -> None:
    with pytest.raises(
        UserError, match=r"'iresnet51' is not known; did you mean 'iresnet50'\? allowed: convnet, .*vit"
    ):
        build(BackboneConfig(name="iresnet51"), 3, 112, 112)


def test_samples_below_16_are_refused() -> None:
    with pytest.raises(UserError, match=r"samples of 15 x 28 are too small for backbone\.name=convnet"):
        build(BackboneConfig(name="convnet"), 1, 15, 28)


def test_without_timm_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # makes the import fail, installed or not
    with pytest.raises(UserError, match=r"hypersphere\[timm\]"):
        build(BackboneConfig(name="timm:resnet18"), 3, 112, 112)


class FakeTimm(ModuleType):
    """What this project uses of timm, so that the call can be tested where timm is not installed."""

    __version__ = "1.0"

    def __init__(self, fixed: bool) -> None:
        super().__init__("timm")
        self.fixed = fixed
        self.options: dict[str, object] = {}

    def is_model(self, name: str) -> bool:
        return name in self.list_models()

    def list_models(self) -> list[str]:
        return ["resnet18", "resnet34"]

    def get_pretrained_cfg(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(fixed_input_size=self.fixed)

    def create_model(self, name: str, **options: object) -> nn.Module:
        self.options = options
        network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        network.num_features = 12
        return network


@pytest.mark.parametrize("fixed", [False, True])
def test_a_timm_network_gets_our_output(monkeypatch: pytest.MonkeyPatch, fixed: bool) -> None:
    fake = FakeTimm(fixed)
    monkeypatch.setitem(sys.modules, "timm", fake)
    backbone = build(BackboneConfig(name="timm:resnet18", dimension=8, dropout=0.25), 3, 32, 48)
    assert backbone(torch.rand(4, 3, 32, 48)).shape == (4, 8)
    assert fake.options["pretrained"] is False
    assert fake.options["drop_rate"] == 0.25
    assert fake.options.get("img_size") == ((32, 48) if fixed else None)


def test_an_unknown_timm_model_names_close_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", FakeTimm(fixed=False))
    with pytest.raises(UserError, match=r"'timm:resnet1' is not a model .* did you mean resnet18"):
        build(BackboneConfig(name="timm:resnet1"), 3, 32, 32)
