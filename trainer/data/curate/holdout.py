"""Part of a split drawn by the seed and held out as a new split: identities, samples, or values of an attribute."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.curate.columns import attribute_codes
from trainer.data.curate.view import Piece, fresh_view, identities_of, labels_of
from trainer.data.manifest import Manifest
from trainer.data.split import SPLIT_NAME, Split
from trainer.errors import UserError

IDENTITY, SAMPLE = "identity", "sample"
_STREAM = 0x5917  # keeps these random numbers apart from those of other draws by the same seed


def hold_out(
    address: str | Path,
    out: Path,
    *,
    by: str = IDENTITY,
    share: float = 0.1,
    values: Sequence[str] = (),
    seed: int = 0,
    split: str = "train",
    into: str = "val",
    overwrite: bool = False,
) -> Manifest:
    """Write a data set at `out` in which part of a split is a new split; no shard is rewritten.

    Args:
        address: of the data set.
        out: new folder.
        by: "identity": whole identities are held out. "sample": samples of each identity, so that both splits have the
            same identities (but for those of one sample, which stay). Else the name of an attribute of the identities
            or of the samples: all that have one value go to one side.
        share: of the identities or samples; of the samples also where values are drawn, which are held out until the
            share is reached.
        values: of the attribute that are held out; where there are none, they are drawn.
        seed: of the draw; the same set, share and seed give the same split.
        split, into: the split that is drawn from, and the name of the new one.

    Raises:
        UserError: no such split or attribute, a share that leaves a split of fewer than two identities, or `into` or
            `out` exists.
    """
    if not 0 < share < 1:
        raise UserError(f"--holdout {share:g} is not allowed; give a share between 0 and 1, for example 0.1")
    if seed < 0:
        raise UserError(f"--seed {seed} is not allowed; give 0 or more")
    manifest = Manifest.read(address)
    whole = manifest.split(split)
    if into in manifest.splits:
        raise UserError(f"the data set has a split '{into}' already; name the new one with --into")
    if not SPLIT_NAME.fullmatch(into):
        raise UserError(f"--into '{into}' is not allowed; use letters, digits, '-' and '_', 32 at most")
    held = _draw(whole, by, share, values, np.random.default_rng([seed, _STREAM]))
    what = f"{', '.join(values)} of {by}" if values else f"{share:g} by {by}, seed {seed}"
    with fresh_view(out, overwrite, manifest, {f"split_{into}": f"{what}, out of {split}"}) as view:
        identities, labels = identities_of(whole), np.arange(len(whole.classes))
        view.add(split, [Piece(whole, ~held, labels)], identities)
        view.add(into, [Piece(whole, held, labels)], identities)
        view.carry(manifest, [name for name in manifest.splits if name != split])
    return Manifest.read(out)


def _draw(split: Split, by: str, share: float, values: Sequence[str], random: np.random.Generator) -> NDArray[np.bool_]:
    """Which positions are held out."""
    if values and by in (IDENTITY, SAMPLE):
        raise UserError(f"--values needs an attribute, and --by is '{by}'; name the attribute with --by")
    if by == IDENTITY:
        return _identities(len(split.classes), share, random)[labels_of(split)]
    if by == SAMPLE:
        return _samples(split, share, random)
    codes, names = attribute_codes(split, by, (IDENTITY, SAMPLE))
    return _chosen(names, values, by)[codes] if values else _values(codes, names, share, random)[codes]


def _identities(identities: int, share: float, random: np.random.Generator) -> NDArray[np.bool_]:
    """Of at least two identities on each side: one alone teaches and measures nothing."""
    if identities < 4:
        raise UserError(f"the split has {identities} identities, and 4 are needed to hold some out; use --by sample")
    held = np.zeros(identities, bool)
    held[random.permutation(identities)[: min(max(2, round(share * identities)), identities - 2)]] = True
    return held


def _samples(split: Split, share: float, random: np.random.Generator) -> NDArray[np.bool_]:
    """Of n samples of an identity `share` x n, rounded up or down by chance so that the mean is right; one stays."""
    counts = split.classes.counts()
    held = np.minimum(np.floor(counts * share + random.random(len(counts))).astype(np.int64), counts - 1)
    labels = labels_of(split)
    shuffled = random.permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]  # by label, and in random order inside it
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = np.zeros(len(labels), bool)
    chosen[order[place < np.repeat(held, counts)]] = True
    return chosen


def _chosen(names: list[str], values: Sequence[str], by: str) -> NDArray[np.bool_]:
    if unknown := [value for value in values if value not in names]:
        some = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise UserError(f"no sample has the value '{unknown[0]}' of '{by}'; the values are {some}")
    return np.isin(names, values)


def _values(codes: NDArray[np.int64], names: list[str], share: float, random: np.random.Generator) -> NDArray[np.bool_]:
    """Values in random order until they have the share of the samples; one at least is left."""
    if len(names) < 2:
        raise UserError(f"all samples have the value '{names[0]}'; choose an attribute of two values or more")
    order = random.permutation(len(names))
    reached = np.cumsum(np.bincount(codes, minlength=len(names))[order])
    needed = int(np.searchsorted(reached, share * len(codes))) + 1
    held = np.zeros(len(names), bool)
    held[order[: min(needed, len(names) - 1)]] = True
    return held
