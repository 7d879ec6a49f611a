"""Importers: each hands over a Source, a list of samples and how to read one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from trainer.errors import UserError


@dataclass(frozen=True, slots=True)
class Sample:
    """`identity` is the class, `name` tells a person where the image came from; a pair occurs once."""

    identity: str
    name: str


@dataclass(frozen=True, slots=True)
class Source:
    """Images to be imported.

    Attributes:
        kind: the importer's name.
        samples: in an order that depends on the input alone.
        read: the file of `samples[i]`, in any format that `trainer.data.image` reads; called from several threads.
        held_out: identities of the validation split.
        provenance: for the manifest; nothing that changes from one run to the next.
        drop_duplicates: leave out files that are byte for byte an earlier one of the same identity.
    """

    kind: str
    samples: Sequence[Sample]
    read: Callable[[int], bytes]
    held_out: frozenset[str]
    provenance: dict[str, str] = field(default_factory=dict)
    drop_duplicates: bool = False


def hold_out_share(identities: list[str], share: float, seed: int) -> frozenset[str]:
    """Choose `share` of the identities, rounded, by the seed, so that neither split has just one identity.

    A split of one identity teaches and measures nothing: so at least two are held out and two are left, and of fewer
    than four none is held out. A share of 0 holds out none, one of 1 all.

    Raises:
        UserError: the share is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise UserError(f"--holdout-share {share} is not a share; give a number from 0 to 1")
    total = len(identities)
    count = round(share * total)
    if 0 < share < 1:
        count = min(max(2, count), total - 2) if total >= 4 else 0
    return frozenset(choose(identities, count, seed))


def choose(names: list[str], count: int, seed: int) -> list[str]:
    """`count` of the names, by the seed; independent of the order in which the names come."""
    ordered = sorted(names)
    picked = np.random.default_rng([seed, 0x401D]).permutation(len(ordered))[:count]
    return sorted(ordered[i] for i in picked)
