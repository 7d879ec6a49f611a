"""What an importer hands over: a list of samples, and how to read one."""

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
    """Choose `share` of the identities, rounded, by the seed; at least two unless the share is 0.

    Raises:
        UserError: the share is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise UserError(f"--holdout-share {share} is not a share; give a number from 0 to 1")
    count = min(len(identities), max(2, round(share * len(identities)))) if share else 0
    return frozenset(choose(identities, count, seed))


def choose(names: list[str], count: int, seed: int) -> list[str]:
    """`count` of the names, by the seed; independent of the order in which the names come."""
    ordered = sorted(names)
    picked = np.random.default_rng([seed, 0x401D]).permutation(len(ordered))[:count]
    return sorted(ordered[i] for i in picked)
