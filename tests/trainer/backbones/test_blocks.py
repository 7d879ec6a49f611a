"""Blocks: what is computed again, and whose learning rate is whose."""

import pytest
import torch

from tests.trainer.backbones.test_backbones import small
from trainer.backbones import networks
from trainer.backbones.blocks import blocks, rate_factors, recompute
from trainer.errors import UserError


def test_blocks_are_the_units_of_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "VIT_DEPTH", 2)
    assert [name for name, _ in blocks(small("vit"))] == [
        "patches", "blocks.0", "blocks.1", "norm", "output.0", "output.1"
    ]  # fmt: skip
    assert sum(name.startswith("stages.") for name, _ in blocks(small("iresnet18"))) == 8


def test_a_layer_learns_at_a_fixed_share_of_the_next_ones_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "VIT_DEPTH", 2)
    factors = rate_factors(small("vit"), 0.5, {"blocks.1.mlp.*": 0.1, "blocks.*": 3.0, "positions*": 0.0})
    layers = {"patches.weight": 1 / 8, "output.0.weight": 1.0, "output.1.bias": 1.0, "norm.weight": 1 / 2}
    patterns = {"blocks.0.mlp.1.weight": 3 / 4, "blocks.1.mlp.1.bias": 0.05, "positions_TE": 0.0}
    assert {name: factors[name] for name in layers | patterns} == pytest.approx(layers | patterns)
    assert set(rate_factors(small("convnet"), 1.0, {}).values()) == {1.0}


def test_a_pattern_that_fits_nothing_is_named() -> None:
    with pytest.raises(UserError, match=r"no parameter of the backbone fits 'stem\.\*'; .* features, norm, project"):
        rate_factors(small("convnet"), 1.0, {"stem.*": 0.1})


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet", "vit"])
def test_what_is_computed_again_gives_the_same_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "VIT_DEPTH", 2)
    plain, again = small(name), small(name)
    recompute(again)
    images_BCHW = torch.rand(4, 1, 28, 28)
    for network in (plain, again):
        network(images_BCHW).square().sum().backward()
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_a_network_without_blocks_of_several_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"recompute=true: ConvNet has no blocks of several layers"):
        recompute(small("convnet"))
