import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from trainer.data.curate.duplicates import (
    _MIXED,
    HASH_BYTES,
    MAX_DISTANCE,
    digest,
    equal_pairs,
    near_pairs,
    perceptual_hash,
)


def hashes(generator: np.random.Generator, count: int) -> np.ndarray:
    return generator.integers(0, 256, (count, HASH_BYTES), dtype=np.uint8)


def flipped(one: np.ndarray, bits: np.ndarray) -> np.ndarray:
    unpacked = np.unpackbits(one)
    unpacked[bits] ^= 1
    return np.packbits(unpacked)


def different(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint64)


def test_every_near_pair_is_found_wherever_its_bits_differ() -> None:
    generator = np.random.default_rng(0)
    some = hashes(generator, 2000)
    for number in range(500):
        bits = generator.choice(256, number % (MAX_DISTANCE + 1), replace=False)
        some[1000 + number] = flipped(some[number], bits)
    found = near_pairs(different(2000), some)
    assert found.first.tolist() == list(range(500))
    assert found.second.tolist() == list(range(1000, 1500))
    assert found.distance.tolist() == [number % (MAX_DISTANCE + 1) for number in range(500)]
    assert len(near_pairs(different(2000), some, 5)) == sum(number % 13 <= 5 for number in range(500))


@pytest.mark.parametrize("spared", range(len(_MIXED)))
def test_one_band_that_agrees_is_enough(spared: int) -> None:
    one = hashes(np.random.default_rng(spared), 1)[0]
    two = flipped(one, np.delete(_MIXED, spared, axis=0)[:, spared])
    assert near_pairs(different(2), np.stack([one, two])).distance.tolist() == [MAX_DISTANCE]


def test_the_pairs_are_those_of_the_plain_loop() -> None:
    generator = np.random.default_rng(1)
    few = hashes(generator, 12)
    some = np.stack([flipped(few[n % 12], generator.choice(256, n % 9, replace=False)) for n in range(120)])
    some = np.unique(some, axis=0)  # of equal hashes the first stands for all
    generator.shuffle(some)
    bits = np.unpackbits(some, axis=1).astype(int)
    apart = np.abs(bits[:, np.newaxis] - bits).sum(axis=2)
    wanted = [(i, j, apart[i, j]) for i in range(len(some)) for j in range(i + 1, len(some)) if apart[i, j] <= 12]
    found = near_pairs(different(len(some)), some)
    assert list(zip(found.first.tolist(), found.second.tolist(), found.distance.tolist(), strict=True)) == wanted
    assert len(wanted) > 100


def test_a_crowd_of_one_hash_gives_as_many_pairs_as_it_has_images() -> None:
    some = np.zeros((5000, HASH_BYTES), np.uint8)
    found = near_pairs(different(5000), some)
    assert found.first.tolist() == [0] * 4999
    assert found.second.tolist() == list(range(1, 5000))


def test_equal_files_are_paired_with_the_first_and_are_no_near_duplicates() -> None:
    digests = np.array([7, 8, 7, 9, 7], np.uint64)
    found = equal_pairs(digests)
    assert (found.first.tolist(), found.second.tolist()) == ([0, 0], [2, 4])
    same = np.zeros((5, HASH_BYTES), np.uint8)
    near = near_pairs(digests, same)
    assert (near.first.tolist(), near.second.tolist()) == ([0, 0], [1, 3])


@pytest.mark.parametrize("count", [0, 1])
def test_none_and_one_image_have_no_pair(count: int) -> None:
    assert len(near_pairs(different(count), np.zeros((count, HASH_BYTES), np.uint8))) == 0
    assert len(equal_pairs(different(count))) == 0


def photographs() -> list[Image.Image]:
    """Parts of two photographs; of the sky and other plain parts, which have nothing to go by, none."""
    parts = []
    for pixels in load_sample_images().images:
        for top in range(0, 427 - 112, 104):
            for left in range(0, 640 - 112, 104):
                part = pixels[top : top + 112, left : left + 112]
                if part.std() > 30:
                    parts.append(Image.fromarray(part))
    return parts


def stored(image: Image.Image, **options: object) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return Image.open(file)


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG of quality 75": lambda image: stored(image, quality=75),
    "twice the size": lambda image: image.resize((224, 224), Image.Resampling.LANCZOS),
    "grey": lambda image: image.convert("L"),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_of_photographs_are_near_and_other_photographs_are_not(kind: str) -> None:
    images = photographs()
    rows = [np.frombuffer(perceptual_hash(image), np.uint8) for image in [*images, *map(COPIES[kind], images)]]
    found = near_pairs(different(len(rows)), np.stack(rows))
    assert set(found.second - found.first) == {len(images)}
    assert len(found) >= 0.9 * len(images)


def test_a_digest_is_of_the_bytes() -> None:
    assert digest(b"a") == digest(b"a") != digest(b"b")
    assert 0 <= digest(b"") < 2**64
