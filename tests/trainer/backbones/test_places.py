"""What a layer does with a sample depends on its place alone: exact in fp64, however the batch is cut into shares."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.ranks import run_on_ranks
from trainer.backbones import build, networks
from trainer.backbones.norms import across, within
from trainer.backbones.places import Layout, PlacedDropout, PlacedNorm, Places, kept, place
from trainer.config import BackboneConfig
from trainer.distributed import Group

SIZE = 12
NETWORKS = ("convnet", "resnet14", "iresnet18", "mobilefacenet", "vit", "mlp")


def places(norm_group: int, group: Group | None = None) -> Places:
    key, first = (torch.zeros((), dtype=torch.int64) for _ in range(2))
    return Places(group or Group(), norm_group, key, first)


def network(name: str, told: Places) -> nn.Module:
    networks.VIT_DEPTH, networks.VIT_WIDTH = 2, 48
    networks.WIDTHS, networks.STEM, networks.LAST = (8, 16, 24, 32), 16, 64
    torch.manual_seed(0)
    made = build(BackboneConfig(name=name, dimension=16, width=8, dropout=0.3), 1, 20, 20).double()
    place(made, told)
    return made


def step(made: nn.Module, told: Places, first: int, samples: int) -> torch.Tensor:
    """Forward and backward of a share; its embeddings, detached."""
    generator = torch.Generator().manual_seed(1)
    images_BCHW = torch.rand(SIZE, 1, 20, 20, generator=generator, dtype=torch.float64) * 2 - 1
    slope_BD = torch.randn(SIZE, 16, generator=generator, dtype=torch.float64)
    told.key.fill_(7)
    told.at(first, samples, SIZE)
    own = slice(first, first + samples)
    x_BD: torch.Tensor = made(images_BCHW[own])
    (F.normalize(x_BD) * slope_BD[own]).sum().backward()
    return x_BD.detach()


def gradients(made: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])


def statistics(made: nn.Module) -> torch.Tensor:
    return torch.cat([buffer.flatten() for buffer in made.buffers()]).double()


@pytest.fixture(autouse=True)
def _sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VIT_DEPTH", "VIT_WIDTH", "WIDTHS", "STEM", "LAST"):
        monkeypatch.setattr(networks, name, getattr(networks, name))  # put back what `network` sets


@pytest.mark.parametrize("name", NETWORKS)
def test_shares_add_up_to_the_whole_batch(name: str) -> None:
    one, other = places(4), places(4)
    whole, cut = network(name, one), network(name, other)
    x_BD = step(whole, one, 0, SIZE)
    parts = []
    for first in range(0, SIZE, 4):
        other.begins = first == 0
        parts.append(step(cut, other, first, 4))
    torch.testing.assert_close(torch.cat(parts), x_BD, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(cut), gradients(whole), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(statistics(cut), statistics(whole), rtol=1e-6, atol=1e-7)


def over_borders(rank: int) -> None:
    group = Group.current()
    for name in NETWORKS:
        for norm_group in (0, 5):  # all 12; 6 and 6, of which the second rank has 2 and 2
            told, alone = places(norm_group, group), places(norm_group)
            made, whole = network(name, told), network(name, alone)
            x_BD = step(whole, alone, 0, SIZE)
            share = step(made, told, rank * 4, 4)
            torch.testing.assert_close(share, x_BD[rank * 4 : rank * 4 + 4], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(group.all_reduce(gradients(made)), gradients(whole), rtol=1e-7, atol=1e-7)
            torch.testing.assert_close(statistics(made), statistics(whole), rtol=1e-6, atol=1e-7)


def test_groups_over_borders_between_ranks_are_those_of_one_rank() -> None:
    run_on_ranks(3, over_borders)


@pytest.mark.parametrize("shape", [(12, 5, 4, 3), (12, 7), (12, 5, 6)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["within", "across"])
def test_each_group_is_normalised_as_by_torch(shape: tuple[int, ...], affine: bool, kind: str) -> None:
    torch.manual_seed(0)
    x, slope = torch.randn(shape) * 3 + 5, torch.randn(shape)
    found = []
    for ours in (True, False):
        leaf = x.clone().requires_grad_()
        own = [(torch.arange(shape[1]) * 0.1 + 1).requires_grad_() for _ in range(2)] if affine else [None, None]
        variances = [torch.zeros(shape[1]) for _ in range(2)]
        if ours and kind == "within":
            y, _, var_PC = within(leaf, *own, 1e-5, [7, 5])
        elif ours:
            y, _, var_PC = across(leaf, *own, 1e-5, ((0, 7), (1, 5)), (7, 5), Group())
        else:
            means = torch.zeros(shape[1])
            pairs = zip(leaf.split([7, 5]), variances, strict=True)
            y = torch.cat([F.batch_norm(part, means, var_C, *own, True, 1.0) for part, var_C in pairs])
            var_PC = torch.stack(variances)
        (y * slope).sum().backward()
        found.append([y.detach(), var_PC, leaf.grad, *(p.grad for p in own if p is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_groups_are_of_one_size_or_differ_by_one() -> None:
    assert Layout.of(0, 128, 256, 32).held == (32, 32, 32, 32)
    assert not Layout.of(0, 128, 256, 32).across
    assert Layout.of(0, 16, 128, 32).across
    assert Layout.of(16, 16, 48, 32) == Layout((48,), ((0, 16),), (16,), True)
    assert Layout.of(0, 100, 100, 32).sizes == (34, 33, 33)
    assert Layout.of(0, 8, 8, 32).held == (8,)
    assert Layout.of(4, 4, 12, 0).sizes == (12,)


def test_dropout_keeps_its_share_and_every_step_layer_and_place_has_its_own() -> None:
    told = places(0)
    masks = []
    for key in (1, 2, 77):
        for layer in (3, 4):
            told.key.fill_(key)
            mask = kept(0.3, layer, told, 64, 5000).double()
            assert float(mask.mean()) == pytest.approx(0.7, abs=5 * (0.21 / mask.numel()) ** 0.5)
            masks.append(mask)
    rows = torch.cat(masks)
    seldom = (torch.corrcoef(rows) - torch.eye(len(rows))).abs().max()
    assert float(seldom) < 6 / 5000**0.5  # the largest of 73,536 chance correlations is near 4.5 deviations
    columns = torch.corrcoef(masks[0].T[:300]) - torch.eye(300)
    assert float(columns.abs().max()) < 7 / 64**0.5
    told.first.fill_(16)
    assert torch.equal(kept(0.3, 4, told, 8, 5000).double(), masks[-1][16:24])


def test_dropout_scales_what_it_keeps_and_does_nothing_in_eval() -> None:
    told = places(0)
    layer = PlacedDropout(0.25, 0, told)
    x = torch.ones(4, 3, 8)
    assert layer(x).unique().tolist() == pytest.approx([0, 4 / 3])
    assert layer.eval()(x) is x


def test_a_network_keeps_its_names_and_in_eval_its_values() -> None:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Dropout(0.0), nn.Linear(6, 2))
    before, x = dict(made.state_dict()), torch.randn(5, 4)
    wanted = made.eval()(x)
    place(made, places(2))
    assert dict(made.state_dict()).keys() == before.keys()
    assert isinstance(made[1], PlacedNorm)
    assert isinstance(made[2], PlacedDropout)
    assert torch.equal(made(x), wanted)


def test_a_norm_that_goes_on_with_an_activation_keeps_it() -> None:
    norm = nn.BatchNorm2d(3)
    norm.drop, norm.act = nn.Identity(), nn.ReLU()  # as timm's does in its forward
    placed = PlacedNorm(norm, places(0))
    assert float(placed(torch.randn(4, 3, 2, 2)).min().detach()) == 0
    assert set(placed.state_dict()) == set(norm.state_dict())
