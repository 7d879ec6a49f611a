"""Images that occur twice: exactly, by a digest, and nearly, by a perceptual hash, without comparing every pair.

Two 256-bit hashes that differ in at most 12 bits agree in at least one of 13 bands of 19 bits each, whichever bits
they are (Norouzi, Punjani and Fleet, "Fast search in Hamming space with multi-index hashing", CVPR 2012). So only
images that share a band are compared: of 1M unrelated ones about 13 x 1M^2 / 2 / 2^19 = 12M pairs instead of 500,000M.

Axes: N images.
"""

import hashlib
from dataclasses import dataclass

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

HASH_SIDE = 16
HASH_BYTES = HASH_SIDE**2 // 8
MAX_DISTANCE = 12  # bits; up to here the search misses nothing
_BANDS = MAX_DISTANCE + 1
_BAND_BITS = HASH_SIDE**2 // _BANDS
# Bits in the order of the hash are neighbours in frequency, and those of low frequencies vary little among pictures
# of one kind (aligned faces): bands of bits from everywhere are shared by fewer unrelated images.
_MIXED = np.random.default_rng(0).permutation(HASH_SIDE**2)[: _BANDS * _BAND_BITS].reshape(_BANDS, _BAND_BITS)
_CROWD = 1000  # images compared with each one in a band, so that a crowd of almost equal ones costs no N^2
_CHUNK = 2**16


@dataclass(frozen=True, slots=True)
class Pairs:
    """Images that are alike, as positions: `first` < `second`, sorted; `distance` in bits, 0 for equal files."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    distance: NDArray[np.int64]

    @classmethod
    def none(cls) -> "Pairs":
        """No pair."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.first)

    def where(self, chosen: NDArray[np.bool_]) -> "Pairs":
        """The pairs of a mask."""
        return Pairs(self.first[chosen], self.second[chosen], self.distance[chosen])


def digest(payload: bytes) -> int:
    """64 bits of SHA-256: of 100M different files two agree with a chance of 0.03 %."""
    return int.from_bytes(hashlib.sha256(payload).digest()[:8], "little")


def perceptual_hash(image: Image.Image) -> bytes:
    """The signs of the image's low frequencies about their median, 256 bits (pHash, by the library ImageHash).

    Of photographs of 112 x 112 pixels, a copy stored as JPEG of quality 75 or at half the size differs in 2 bits in
    the median and in 6 at the 95th percentile; two photographs in 128, and fewer than one pair in 10,000 in 60. A
    crop by 2 pixels on each side (32 bits) is not found.
    """
    return np.packbits(imagehash.phash(image, HASH_SIDE, 2).hash).tobytes()


def equal_pairs(digests_N: NDArray[np.uint64]) -> Pairs:
    """Each later image of one digest, paired with the first of it."""
    firsts_N = _first_of_its_kind(digests_N)
    later = np.flatnonzero(firsts_N != np.arange(len(firsts_N)))
    return Pairs(firsts_N[later], later, np.zeros(len(later), np.int64))


def near_pairs(digests_N: NDArray[np.uint64], hashes_N: NDArray[np.uint8], distance: int = MAX_DISTANCE) -> Pairs:
    """Images that are different files and differ in at most `distance` bits of their hashes.

    Images of one hash are each paired with the first of them, and that one alone with images of other hashes, so that
    the number of pairs stays near the number of images.

    Args:
        digests_N: of the files; of equal ones the first stands for all.
        hashes_N: [N, 32], of `perceptual_hash`.
        distance: 0 to 12.
    """
    distinct = np.unique(_first_of_its_kind(digests_N))
    hashes = np.ascontiguousarray(hashes_N[distinct])
    firsts = _first_of_its_kind(hashes.view(f"V{HASH_BYTES}").ravel())
    same = np.flatnonzero(firsts != np.arange(len(firsts)))
    rows = np.unique(firsts)  # one a hash, in the order of the positions
    left, right, bits = _near_rows(hashes[rows].view(np.uint64), distance)
    first = distinct[np.concatenate([firsts[same], rows[left]])]
    second = distinct[np.concatenate([same, rows[right]])]
    order = np.lexsort((second, first))
    return Pairs(first[order], second[order], np.concatenate([np.zeros(len(same), np.int64), bits])[order])


def _first_of_its_kind(values: NDArray[np.generic]) -> NDArray[np.int64]:
    """For each value the position of the first that equals it."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    found: NDArray[np.int64] = first[inverse]
    return found


def _near_rows(
    hashes: NDArray[np.uint64], distance: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of rows of [U, 4] distinct hashes that differ in at most `distance` bits, and in how many."""
    found = [np.empty(0, np.int64)]
    for band in _bands(hashes).T:
        order = np.argsort(band, kind="stable")
        ordered = band[order]
        places = np.arange(len(order) - 1)
        for step in range(1, _CROWD):  # with the next of its band, then with the one after it
            places = places[places + step < len(order)]
            places = places[ordered[places] == ordered[places + step]]
            if not len(places):
                break
            one, two = order[places], order[places + step]
            near = _bits_apart(hashes, one, two) <= distance
            found.append(np.minimum(one, two)[near] * len(hashes) + np.maximum(one, two)[near])
    left, right = np.divmod(np.unique(np.concatenate(found)), max(1, len(hashes)))
    return left, right, _bits_apart(hashes, left, right)


def _bits_apart(hashes: NDArray[np.uint64], one: NDArray[np.int64], two: NDArray[np.int64]) -> NDArray[np.int64]:
    bits: NDArray[np.int64] = np.bitwise_count(hashes[one] ^ hashes[two]).sum(axis=1, dtype=np.int64)
    return bits


def _bands(hashes: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Each hash as 13 numbers of 19 of its bits."""
    weights = (1 << np.arange(_BAND_BITS)).astype(np.uint32)
    bands = np.empty((len(hashes), _BANDS), np.uint32)
    for start in range(0, len(hashes), _CHUNK):
        bits = np.unpackbits(hashes[start : start + _CHUNK].view(np.uint8), axis=1)
        bands[start : start + _CHUNK] = bits[:, _MIXED] @ weights
    return bands
