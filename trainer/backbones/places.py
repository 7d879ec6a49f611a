"""Layers that do with a sample what its place in the global batch says, not the rank that holds it.

Two kinds of layers look beyond their sample: batch norm, at the samples beside it, and dropout, at random numbers.
`place` exchanges a network's own, so that the losses are those of one rank on any number of ranks, up to the order of
floating-point sums:

    batch norm   over fixed groups of neighbouring places ("ghost batches", Hoffer et al. 2017, arXiv 1705.08741). A
                 group that one rank holds costs nothing. Where a border between ranks goes through a group, every layer
                 sends one all-reduce of [groups, 2 C] in fp64 forward, and one backward.
    dropout      a hash of seed, step, layer, place and feature: no generator, no state, no draws for other ranks.

The running statistics take the mean over the groups of the global batch. A rank adds up its own, times the number of
ranks, so that the mean over the ranks (`average_buffers`) is that of all groups: the update is linear. A slot that only
fills the batch up repeats an image and counts like one.

Legend: m samples of this forward, B slots of the global batch, C channels, P parts: what this forward holds of a group.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.backbones import norms
from trainer.distributed import Group, RowRange

_M1, _M2, _M3 = 0x7FEB352D, 0x2C1B3C6D, 0x297A2D39  # odd; of "lowbias32" and its kin (Ellis 2018)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a forward lies to the groups of batch norm.

    Attributes:
        sizes: samples of each group of the global batch.
        parts: group and number of samples of what the forward holds, in order.
        held: these numbers alone.
        across: whether any forward of this many samples holds a part of a group only; every rank finds the same.
    """

    sizes: tuple[int, ...]
    parts: tuple[tuple[int, int], ...]
    held: tuple[int, ...]
    across: bool

    @classmethod
    @lru_cache
    def of(cls, first: int, samples: int, size: int, norm_group: int) -> "Layout":
        count = max(1, size // norm_group) if norm_group else 1
        groups = [RowRange.of(size, index, count) for index in range(count)]
        held = [min(rows.stop, first + samples) - max(rows.start, first) for rows in groups]
        parts = tuple((index, inside) for index, inside in enumerate(held) if inside > 0)
        return cls(
            sizes=tuple(len(rows) for rows in groups),
            parts=parts,
            held=tuple(inside for _, inside in parts),
            across=not {rows.stop for rows in groups}.issuperset(range(samples, size, samples)),
        )


@dataclass
class Places:
    """Where the samples of a forward are in the global batch; told before each forward in training by `at`.

    Attributes:
        group: the ranks.
        norm_group: samples that a batch norm takes together, about: B is cut into max(1, B // norm_group) groups of one
            size, or of two that differ by 1. 0: all of them.
        key: int64 [], of seed and step; its lower 32 bits count.
        first: int64 [], the forward's first place. Both are tensors, so that a compiled network takes other values
            without being compiled again.
        observes: whether this forward counts in running statistics: one that repeats another does not.
        begins: whether it is the first one of its step.
    """

    group: Group
    norm_group: int
    key: Tensor
    first: Tensor
    layout: Layout | None = None
    observes: bool = True
    begins: bool = True

    def at(self, first: int, samples: int, size: int) -> None:
        """The next forward holds the places `first` to `first + samples - 1` of `size`."""
        self.first.fill_(first)
        self.layout = Layout.of(first, samples, size, self.norm_group)


def place(network: nn.Module, places: Places) -> None:
    """Exchange the batch norms and dropouts of a network, in place; parameters, buffers and their names stay."""
    found = [(parent, name, child) for parent in network.modules() for name, child in parent.named_children()]
    for layer, (parent, name, child) in enumerate(found):
        if isinstance(child, _BatchNorm):
            setattr(parent, name, PlacedNorm(child, places))
        elif type(child) is nn.Dropout and child.p > 0:
            setattr(parent, name, PlacedDropout(child.p, layer, places).train(child.training))


class PlacedDropout(nn.Module):
    """`nn.Dropout(p)` whose mask is a function of seed, step, layer, place and feature."""

    def __init__(self, p: float, layer: int, places: Places) -> None:
        super().__init__()
        self.p, self.layer, self.places = p, layer, places

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = kept(self.p, self.layer, self.places, len(x), x.shape[1:].numel())
        return torch.where(keep.view(x.shape), x * (1 / (1 - self.p)), 0)


def kept(p: float, layer: int, places: Places, samples: int, features: int) -> Tensor:
    """Which features dropout keeps, bool [m, features].

    A word of 32 mixed bits for each sample and one for each feature; their XOR is mixed again, which takes five passes
    over m x features words and no generator.
    """
    device = places.key.device
    place_m1 = torch.arange(samples, device=device)[:, None] + places.first
    sample_m1 = _word(_word(places.key + layer * _M3).long() + place_m1)
    word = (sample_m1 ^ _word(torch.arange(features, device=device) + _M2)).mul_(_M1)
    word ^= (word >> 15) & 0x1FFFF
    return word.mul_(_M2) >= int(p * 2**32) - 2**31


def _word(number: Tensor) -> Tensor:
    """32 well-mixed bits of an int64, as int32."""
    number = number & 0xFFFFFFFF
    number = ((number ^ (number >> 16)) * _M1) & 0xFFFFFFFF
    number = ((number ^ (number >> 15)) * _M3) & 0xFFFFFFFF
    number = number ^ (number >> 16)
    return (number - 2**31).int()


class PlacedNorm(_BatchNorm):
    """A batch norm over groups of places; in eval mode, and for all names, the one that it is made from.

    A norm of timm that goes on with dropout and an activation keeps them.
    """

    def __init__(self, norm: _BatchNorm, places: Places) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            setattr(self, name, buffer)
        self.after = [name for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
        for name in self.after:
            self.add_module(name, getattr(norm, name))
        self.places = places
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.running_mean is None:
            x = self._by_group(x)
        else:
            x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        for name in self.after:
            x = self.get_submodule(name)(x)
        return x

    def _by_group(self, x: Tensor) -> Tensor:
        places, own = self.places, (self.weight, self.bias, self.eps)
        told = places.layout if self.training else None
        layout = told or Layout.of(0, len(x), len(x), 0)  # a batch of its own
        y: Tensor
        if layout.across:
            y, means, variances = norms.across(x, *own, layout.parts, layout.sizes, places.group)
            share = 1
        else:
            y, means, variances = norms.within(x, *own, list(layout.held))
            share = places.group.size
        if self.running_mean is not None and places.observes:
            self._observe(means, variances, share / len(layout.sizes))
        return y

    @torch.no_grad()
    def _observe(self, mean_PC: Tensor, var_PC: Tensor, weight: float) -> None:
        """Move the running statistics towards `weight` times the sum of these parts'; once a step."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += self.places.begins
        momentum: Any = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked
        for running, values_PC in ((self.running_mean, mean_PC), (self.running_var, var_PC)):
            if self.places.begins:
                running.mul_(1 - momentum)
            running.add_(values_PC.sum(dim=0).to(running) * (momentum * weight))
