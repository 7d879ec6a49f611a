"""The blocks of any network, in order: what is computed again in the backward, and what has a learning rate of its own.

A block is what a Sequential, a ModuleList, the network itself or one of its direct children holds: a residual unit, a
transformer block, or a bare layer.
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.errors import UserError


def blocks(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks by name, in the order in which the network names them."""
    for name, child in network.named_children():
        yield from _within(name, child, 1)


def _within(name: str, module: nn.Module, depth: int) -> Iterator[tuple[str, nn.Module]]:
    children = list(module.named_children())
    if children and (depth == 1 or isinstance(module, nn.Sequential | nn.ModuleList)):
        for below, child in children:
            yield from _within(f"{name}.{below}", child, depth + 1)
    else:
        yield name, module


def recompute(network: nn.Module) -> None:
    """Keep no activations inside the blocks: the backward computes them again (Chen et al. 2016, arXiv 1604.06174).

    Raises:
        UserError: no block of the network holds more than one layer.
    """
    found = [block for _, block in blocks(network) if len(list(block.modules())) > 2]
    if not found:
        raise UserError(
            f"backbone.recompute=true: {type(network).__name__} has no blocks of several layers to compute again; set "
            "it to false, or take an IResNet, MobileFaceNet or ViT"
        )
    for block in found:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def rate_factors(network: nn.Module, layer_decay: float, rates: Mapping[str, float]) -> dict[str, float]:
    """What each parameter's learning rate is multiplied by: layer_decay^(L - l) (Clark et al. 2020, arXiv 2003.10555),
    times the factor of the first pattern of `rates` that its name fits.

    Each block with a matrix begins the next of the layers 0 to L; one without, such as a norm, belongs to the layer
    before it. A parameter of no block is of layer 0.

    Raises:
        UserError: a pattern fits no parameter.
    """
    layer, last, names = dict[str, int](), -1, [name for name, _ in network.named_parameters()]
    for name, block in blocks(network):
        own = dict(block.named_parameters(prefix=name))
        last += any(parameter.ndim > 1 for parameter in own.values())
        layer |= dict.fromkeys(own, max(last, 0))
    for pattern in rates:
        if not any(fnmatchcase(name, pattern) for name in names):
            beginnings = sorted({name.partition(".")[0] for name in names})
            raise UserError(
                f"optimizer.rates: no parameter of the backbone fits '{pattern}'; their names begin with "
                f"{', '.join(beginnings)}, and * stands for any text"
            )
    return {
        name: layer_decay ** (max(last, 0) - layer.get(name, 0))
        * next((factor for pattern, factor in rates.items() if fnmatchcase(name, pattern)), 1.0)
        for name in names
    }
