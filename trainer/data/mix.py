"""Several data sets trained on as one, by weights. Runs without torch.

The order stays a pure function of (seed, epoch, step). Slots of the global batches are numbered through the whole run;
of n slots the first set gets floor(n x share), evenly spread, and so on with the rest. Each set goes through its own
epochs, shuffled as if it were alone, and on through those of the run: whatever the weights, no sample of a set comes
twice before all of them have come once.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trainer.data.decode import DecoderPool
from trainer.data.manifest import Manifest
from trainer.data.reader import Reader, Samples
from trainer.data.samplers import PKSampler, ShuffledSampler
from trainer.data.split import Split
from trainer.data.store import Address, CacheConfig
from trainer.data.tables import Classes
from trainer.errors import UserError
from trainer.strict import Strict

_FINEST = 10**6  # denominators of shares: times the number of a slot they stay below 2^63


class Part(Strict):
    """One data set of a mix."""

    path: Address
    weight: float | None = Field(
        None, gt=0, description="null: its number of samples, so that each comes once an epoch"
    )


class Mixed:
    """The splits of several data sets, their samples one after the other, as one.

    Args:
        parts: the splits.
        weights: of the sets; what counts is their ratio.
        shared: one name in two sets is one identity; else each set has identities of its own.
    """

    def __init__(self, parts: Sequence[Split], weights: Sequence[float], *, shared: bool) -> None:
        self.parts = list(parts)
        self.samples = sum(part.samples for part in parts)
        self.starts = np.cumsum([0, *(part.samples for part in parts)])  # where the positions of each set begin
        self._weights = list(weights)
        names = [part.classes.names() for part in parts]
        if not shared:
            names = [[f"{number}: {name}" for name in part] for number, part in enumerate(names)]
        label_of = {name: label for label, name in enumerate(dict.fromkeys(name for part in names for name in part))}
        # The label in the mix of each label of a set.
        self.labels = [np.array([label_of[name] for name in part], np.int64) for part in names]
        counts = np.zeros(len(label_of), np.int64)
        for part, labels in zip(parts, self.labels, strict=True):
            np.add.at(counts, labels, part.classes.counts())
        self.identities = len(label_of)
        self.classes = Classes.of(list(label_of), counts.tolist())

    @cached_property
    def class_digest(self) -> str:
        """Of the names in order: which label is whom."""
        return self.classes.digest()

    def sampler(
        self, batch_size: int, window: int, identities: int | None, seed: int
    ) -> "MixedSampler | MixedPKSampler":
        """The order of the samples, plainly shuffled, or (`identities`) in P x K batches."""
        if identities is not None:
            return MixedPKSampler(self, self._weights, identities, batch_size, seed)
        samplers = [
            ShuffledSampler([entry.samples for entry in part.shards], batch_size, window, seed) for part in self.parts
        ]
        return MixedSampler(self, samplers, self._weights, batch_size)


def open_mix(parts: Sequence[Part], split: str, *, shared: bool, cache: CacheConfig | None = None) -> Mixed:
    """Open the sets of a mix; `split` is what each of them gives.

    Raises:
        UserError: a set is not there or has no such split.
    """
    splits = [Manifest.read(part.path, cache).split(split) for part in parts]
    weights = [
        float(found.samples) if part.weight is None else part.weight for part, found in zip(parts, splits, strict=True)
    ]
    return Mixed(splits, weights, shared=shared)


class MixedSampler:
    """Plainly shuffled batches of a mix; all of them are full."""

    def __init__(
        self, mixed: Mixed, samplers: Sequence[ShuffledSampler], weights: Sequence[float], batch_size: int
    ) -> None:
        self._mixed, self._samplers, self._batch_size = mixed, samplers, batch_size
        exact = [Fraction(weight) for weight in weights]
        # Of what the sets before it leave over.
        self._shares = [(exact[i] / sum(exact[i:], Fraction())).limit_denominator(_FINEST) for i in range(len(exact))]
        self.steps_per_epoch = -(-mixed.samples // batch_size)

    def size(self, step: int) -> int:
        """Samples of the global batch."""
        return self._batch_size

    def part(self, epoch: int, step: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of these rows of the global batch."""
        return self.positions(epoch, step)[rows]

    def positions(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Positions in the mix of the samples of one global batch."""
        rows = np.arange(self._batch_size)
        slots = (epoch * self.steps_per_epoch + step) * self._batch_size + rows
        positions = np.empty(self._batch_size, np.int64)
        for part, share in enumerate(self._shares):
            before = slots * share.numerator // share.denominator  # slots of this set among those before each
            own = (slots + 1) * share.numerator // share.denominator > before
            positions[rows[own]] = self._mixed.starts[part] + self._places(part, before[own])
            slots, rows = (slots - before)[~own], rows[~own]
        return positions

    def _places(self, part: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions in a set of the samples that come at these places of its epochs laid end to end."""
        passes, inside = np.divmod(places, self._mixed.parts[part].samples)
        positions = np.empty(len(places), np.int64)
        for number in np.unique(passes).tolist():
            chosen = passes == number
            positions[chosen] = self._samplers[part].at(number, inside[chosen])
        return positions


class MixedPKSampler:
    """P x K batches of a mix: of the P identities each set gives the same number in every batch, by its weight.

    An identity that is shared by two sets may come from both of them in one batch.

    Raises:
        UserError: a weight so small that its set would give none, or a set that cannot give P x K batches.
    """

    def __init__(self, mixed: Mixed, weights: Sequence[float], identities: int, batch_size: int, seed: int) -> None:
        self._starts = mixed.starts
        exact = np.array(weights) / sum(weights) * identities
        quotas = np.floor(exact).astype(int)
        quotas[np.argsort(quotas - exact, kind="stable")[: identities - quotas.sum()]] += 1
        if not quotas.all():
            few = mixed.parts[int(np.argmin(quotas))].store.address
            raise UserError(
                f"of {identities} identities a batch the set '{few}' of data.mix would give none; raise its weight or "
                "data.identities_per_batch"
            )
        k = batch_size // identities
        self._ends = np.cumsum([0, *(quotas * k)])  # where the rows of each set begin in a batch, and the last end
        self._samplers = [
            PKSampler(part.classes, part.by_class, quota, quota * k, seed)
            for part, quota in zip(mixed.parts, quotas.tolist(), strict=True)
        ]
        groups = sum(s.steps_per_epoch * quota for s, quota in zip(self._samplers, quotas.tolist(), strict=True))
        self.steps_per_epoch = -(-groups // identities)

    def size(self, step: int) -> int:
        """Samples of the global batch."""
        return int(self._ends[-1])

    def positions(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Positions in the mix of the samples of one global batch."""
        return self.part(epoch, step, np.arange(self.size(step)))

    def part(self, epoch: int, step: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of these rows of the global batch; only their own identities are looked up."""
        number = epoch * self.steps_per_epoch + step
        owners = np.searchsorted(self._ends, rows, side="right") - 1
        positions = np.empty(len(rows), np.int64)
        for part in np.unique(owners).tolist():
            own, sampler = owners == part, self._samplers[part]
            at = divmod(number, sampler.steps_per_epoch)
            positions[own] = self._starts[part] + sampler.part(*at, rows[own] - self._ends[part])
        return positions


class MixedReader:
    """The samples of a mix by position: each set has a Reader."""

    def __init__(self, mixed: Mixed, readers: Sequence[Reader]) -> None:
        self._mixed, self._readers = mixed, readers

    @property
    def bad(self) -> list[int]:
        """Positions of samples that could not be read so far."""
        starts = self._mixed.starts.tolist()
        return [
            start + position
            for start, reader in zip(starts, self._readers, strict=False)
            for position in list(reader.bad)  # in one go: threads that decode add to it
        ]

    def pool(self, processes: bool = False) -> DecoderPool:
        """As of a Reader; all sets are decoded alike."""
        return self._readers[0].pool(processes)

    def want(self, positions: NDArray[np.int64]) -> None:
        """As of a Reader."""
        owners = np.searchsorted(self._mixed.starts, positions, side="right") - 1
        for part in np.unique(owners).tolist():
            self._readers[part].want(positions[owners == part] - self._mixed.starts[part])

    def try_read(self, positions: NDArray[np.int64], pool: DecoderPool) -> Samples:
        """As of a Reader, with labels of the mix."""
        owners = np.searchsorted(self._mixed.starts, positions, side="right") - 1
        order = np.argsort(owners, kind="stable")
        found: list[Samples] = []
        for part in np.unique(owners).tolist():
            samples = self._readers[part].try_read(positions[owners == part] - self._mixed.starts[part], pool)
            found.append(samples._replace(labels_B=self._mixed.labels[part][samples.labels_B]))
        back = np.argsort(order)
        keys = [key for samples in found for key in samples.keys]
        sizes = np.cumsum([0, *(len(samples.keys) for samples in found)]).tolist()
        faults = {
            int(order[start + i]): fault
            for start, samples in zip(sizes, found, strict=False)
            for i, fault in samples.faults.items()
        }
        images_BCHW, labels_B = (np.concatenate(parts)[back] for parts in list(zip(*found, strict=True))[:2])
        return Samples(images_BCHW, labels_B, [keys[i] for i in back], faults)
