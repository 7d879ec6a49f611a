"""The moving average: the formula as a loop, its state, and that it is put in place for a while only."""

import torch
from torch import nn

from trainer.backbones.average import Average
from trainer.distributed import Group


def moved(network: nn.Module, steps: int, average: Average) -> list[torch.Tensor]:
    """The first weight after each step."""
    found = []
    for step in range(steps):
        with torch.no_grad():
            network[0].weight.add_(0.1 * (step + 1))
            network[1].running_mean.add_(1.0)
        average.update()
        found.append(network[0].weight.detach().clone())
    return found


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_it_is_the_formula() -> None:
    network = small()
    expected, average = network[0].weight.detach().double().clone(), Average(network, 0.5)
    for step, weight in enumerate(moved(network, 20, average)):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.double()
    torch.testing.assert_close(average.state(Group())["0.weight"].double(), expected, rtol=1e-6, atol=1e-6)


def test_it_goes_on_from_its_state_and_begins_with_the_network_where_there_is_none() -> None:
    network = small()
    average = Average(network, 0.9)
    moved(network, 5, average)
    state = {name: value.clone() for name, value in average.state(Group()).items()}
    again = Average(network, 0.9)
    again.load(state)
    moved(network, 3, again)
    other = Average(network, 0.9)
    other.load({})
    assert again.count == 8
    assert other.count == 0
    assert torch.equal(other.state(Group())["0.weight"], network[0].weight)
    assert not torch.equal(again.state(Group())["0.weight"], network[0].weight)


def test_the_network_has_it_while_a_block_runs() -> None:
    network = small()
    average = Average(network, 0.9)
    moved(network, 3, average)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with average.in_place(Group()):
        assert torch.equal(network[0].weight, average.state(Group())["0.weight"])
        assert torch.equal(network[1].running_mean, average.state(Group())["1.running_mean"])
        assert not torch.equal(network[0].weight, before["0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
