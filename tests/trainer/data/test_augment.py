import math

import numpy as np
import pytest
import torch

from trainer.data.augment import Augment, AugmentConfig, to_float
from trainer.data.stream import PADDING, Batch
from trainer.errors import UserError

ALL = AugmentConfig(
    rotate_degrees=20, scale=0.2, shear_degrees=10, translate=0.1, flip=True, erase=0.5, brightness=0.2, contrast=0.3,
    quarter_turns=True, mirrors=True, elastic=0.05, stroke=0.5,
)  # fmt: skip


def batch_of(size: int = 12, channels: int = 1, height: int = 16, width: int = 16, value: int | None = None) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (size, channels, height, width)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    if value is not None:
        images = torch.full(shape, value, dtype=torch.uint8)
    return Batch(images, torch.arange(size) % 5, tuple(map(str, range(size))), torch.arange(size))


def part(batch: Batch, rows: slice) -> Batch:
    return Batch(batch.images_BCHW[rows], batch.labels_B[rows], batch.keys[rows], batch.rows_B[rows])


def test_to_float_is_the_scaling_of_the_exported_model():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(to_float(pixels), torch.tensor([-1.0, -0.6, 1.0]))
    assert pixels.tolist() == [0, 51, 255]


def test_without_changes_it_is_to_float():
    batch = batch_of()
    images, labels = Augment(AugmentConfig(), 0, 5)(batch, 1, 2, 12)
    assert torch.equal(images, to_float(batch.images_BCHW))
    assert torch.equal(labels, batch.labels_B)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_see_what_one_rank_sees(ranks: int):
    batch, augment = batch_of(), Augment(ALL, 7, 5)
    images, labels = augment(batch, 3, 4, 12)
    share = 12 // ranks
    parts = [augment(part(batch, slice(r * share, (r + 1) * share)), 3, 4, 12) for r in range(ranks)]
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), images, rtol=0, atol=1e-6)
    assert torch.equal(torch.cat([p[1] for p in parts]), labels)


def test_seed_epoch_and_step_decide():
    batch = batch_of()
    reference = Augment(ALL, 7, 5)(batch, 3, 4, 12)[0]
    assert torch.equal(Augment(ALL, 7, 5)(batch, 3, 4, 12)[0], reference)
    for seed, epoch, step in ((8, 3, 4), (7, 4, 4), (7, 3, 5), (7, 4, 3)):
        assert not torch.equal(Augment(ALL, seed, 5)(batch, epoch, step, 12)[0], reference)


def test_samples_of_a_batch_are_changed_differently():
    batch = batch_of(size=64)
    same = Batch(batch.images_BCHW[:1].expand(64, -1, -1, -1), batch.labels_B, batch.keys, batch.rows_B)
    images, _ = Augment(AugmentConfig(rotate_degrees=20), 0, 5)(same, 0, 0, 64)
    assert len({image.numpy().tobytes() for image in images}) == 64


def test_result_is_float_in_range_and_the_batch_is_untouched():
    batch = batch_of(channels=3)
    before = batch.images_BCHW.clone(), batch.labels_B.clone()
    images, _ = Augment(ALL, 0, 5)(batch, 0, 0, 12)
    assert images.dtype == torch.float32
    assert images.shape == (12, 3, 16, 16)
    assert images.abs().max() <= 1
    assert torch.equal(batch.images_BCHW, before[0])
    assert torch.equal(batch.labels_B, before[1])


def test_white_paper_stays_white():
    geometry = AugmentConfig(rotate_degrees=45, scale=0.5, shear_degrees=30, translate=0.5, flip=True)
    images, _ = Augment(geometry, 0, 5)(batch_of(size=64, value=255), 0, 0, 64)
    torch.testing.assert_close(images, torch.ones_like(images))


def test_one_switch_does_not_move_the_others():
    batch = batch_of()
    alone, _ = Augment(AugmentConfig(flip=True), 0, 5)(batch, 0, 0, 12)
    with_erase, _ = Augment(AugmentConfig(flip=True, erase=0.5), 0, 5)(batch, 0, 0, 12)
    unerased = (alone == with_erase).flatten(1).all(1)
    assert 0 < unerased.sum() < 12
    assert ((alone == with_erase).float().mean((1, 2, 3)) > 0.7).all()


def test_flip_mirrors_about_half():
    batch = batch_of(size=400, height=8, width=8)
    images, _ = Augment(AugmentConfig(flip=True), 1, 5)(batch, 0, 0, 400)
    kept = (images == to_float(batch.images_BCHW)).flatten(1).all(1)
    mirrored = (images == to_float(batch.images_BCHW).flip(-1)).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    assert 150 < int(mirrored.sum()) < 250


@pytest.mark.parametrize("shape", [(16, 16), (16, 24)])
def test_geometry_against_a_plain_loop(shape: tuple[int, int]):
    """For each output pixel: where it comes from, in pixels, and the four neighbours there, borders repeated."""
    height, width = shape
    config = AugmentConfig(rotate_degrees=30, scale=0.3, shear_degrees=15, translate=0.2, flip=True)
    batch, augment = batch_of(size=6, height=height, width=width), Augment(config, 3, 5)
    images, _ = augment(batch, 1, 1, 6)
    draws = {name: column.double() for name, column in augment._draw(batch, 1, 1, 6).items()}
    source = to_float(batch.images_BCHW).double()
    for i in range(6):
        angle, shear = (
            math.radians(degrees) * (2 * float(draws[name][i]) - 1) for name, degrees in (("rotate", 30), ("shear", 15))
        )
        zoom = 1 + 0.3 * (2 * float(draws["scale"][i]) - 1)
        mirror = -1 if draws["flip"][i] < 0.5 else 1
        shift_x = 0.2 * width * (2 * float(draws["translate_x"][i]) - 1)
        shift_y = 0.2 * height * (2 * float(draws["translate_y"][i]) - 1)
        for row in range(0, height, 3):
            for column in range(0, width, 3):
                x, y = mirror * (column + 0.5 - width / 2), row + 0.5 - height / 2
                x, y = (x + math.tan(shear) * y) / zoom, y / zoom
                x, y = math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y
                x = min(max(x + shift_x + width / 2 - 0.5, 0), width - 1)
                y = min(max(y + shift_y + height / 2 - 0.5, 0), height - 1)
                left, top = int(x), int(y)
                value = sum(
                    float(source[i, 0, min(top + b, height - 1), min(left + a, width - 1)])
                    * (x - left if a else 1 - x + left)
                    * (y - top if b else 1 - y + top)
                    for a in (0, 1)
                    for b in (0, 1)
                )
                assert float(images[i, 0, row, column]) == pytest.approx(value, abs=1e-4)


def test_erase_fills_one_rectangle_with_the_mean():
    batch = batch_of(size=200, channels=3)
    images, _ = Augment(AugmentConfig(erase=0.5), 0, 5)(batch, 0, 0, 200)
    original = to_float(batch.images_BCHW)
    changed = 0
    for image, before in zip(images, original, strict=True):
        mean = before.mean((1, 2), keepdim=True)
        filled = torch.isclose(image, mean.expand_as(image), atol=1e-6).all(0) & (image != before).any(0)
        assert torch.equal(image[:, ~filled], before[:, ~filled])
        if filled.any():
            rows, columns = np.nonzero(filled.numpy())
            box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            assert 0.01 < box / 256 < 0.4
            assert filled.sum() >= box - 2  # a pixel may have had the mean before
            changed += 1
    assert 70 < changed < 130


def test_brightness_and_contrast_are_linear_in_the_pixels():
    batch = batch_of(size=50)
    batch = Batch(batch.images_BCHW // 2 + 64, batch.labels_B, batch.keys, batch.rows_B)  # nothing reaches the ends
    images, _ = Augment(AugmentConfig(brightness=0.1, contrast=0.2), 0, 5)(batch, 0, 0, 50)
    before = to_float(batch.images_BCHW)
    shift = images.mean((1, 2, 3)) - before.mean((1, 2, 3))
    factor = images.std((1, 2, 3)) / before.std((1, 2, 3))
    assert 0.1 < shift.abs().max() <= 0.2 + 1e-6
    assert 0.8 - 1e-5 <= factor.min() < 0.9 < 1.1 < factor.max() <= 1.2 + 1e-5
    brighter_only, _ = Augment(AugmentConfig(brightness=0.1), 0, 5)(batch, 0, 0, 50)
    torch.testing.assert_close(brighter_only, before + shift[:, None, None, None], rtol=0, atol=1e-5)


def test_quarter_turns_turn_image_and_label():
    batch = batch_of(size=80)
    batch.labels_B[7] = PADDING
    images, labels = Augment(AugmentConfig(quarter_turns=True), 0, 5)(batch, 0, 0, 80)
    turns = []
    for i in range(80):
        matching = [t for t in range(4) if torch.equal(images[i], to_float(batch.images_BCHW[i]).rot90(t, (1, 2)))]
        assert len(matching) == 1
        turns += matching
        assert labels[i] == (PADDING if i == 7 else batch.labels_B[i] + 5 * matching[0])
    assert set(turns) == {0, 1, 2, 3}


def test_quarter_turns_need_square_images():
    with pytest.raises(UserError, match=r"data\.height is 16 and data\.width 24"):
        Augment(AugmentConfig(quarter_turns=True), 0, 5)(batch_of(width=24), 0, 0, 12)


def test_the_samples_of_an_identity_turn_together() -> None:
    """P x K = 6 x 4: a quarter turn makes another identity, so it must be the same for the K samples of one."""
    labels = torch.arange(6).repeat_interleave(4)
    batch = Batch(
        torch.zeros(24, 1, 8, 8, dtype=torch.uint8), labels, tuple("abcdefghijklmnopqrstuvwx"), torch.arange(24)
    )
    variants = []
    config = AugmentConfig(quarter_turns=True, mirrors=True)
    for step in range(20):
        _, turned = Augment(config, 0, 6, together=4)(batch, 0, step, 24)
        by_identity = (turned // 6).view(6, 4)
        assert bool((by_identity == by_identity[:, :1]).all())
        assert torch.equal(turned % 6, labels)
        variants += by_identity[:, 0].tolist()
    assert set(variants) == set(range(8))
    _, alone = Augment(AugmentConfig(quarter_turns=True), 0, 6)(batch, 0, 0, 24)
    assert not bool(((alone // 6).view(6, 4) == (alone // 6).view(6, 4)[:, :1]).all())
