"""Elastic deformation and stroke width, each against a plain loop or what it must leave alone."""

import pytest
import torch
from PIL import Image, ImageFilter

from tests.trainer.data.test_augment import batch_of
from trainer.data.augment import Augment, AugmentConfig, to_float
from trainer.data.deform import CONTROL, bend, widen

TURNED = AugmentConfig(quarter_turns=True, mirrors=True)


def test_a_bent_field_takes_the_control_points_at_the_corners_and_is_smooth() -> None:
    shift_BN = torch.rand(3, 2 * CONTROL**2) * 2 - 1
    field_BHW2 = bend(shift_BN, 28, 20)
    assert field_BHW2.shape == (3, 28, 20, 2)
    points_B2KK = shift_BN.view(3, 2, CONTROL, CONTROL)
    torch.testing.assert_close(field_BHW2[:, 0, 0], points_B2KK[:, :, 0, 0])
    torch.testing.assert_close(field_BHW2[:, -1, -1], points_B2KK[:, :, -1, -1])
    assert field_BHW2.diff(dim=1).abs().max() < 4 * CONTROL / 28  # of neighbours: no tear between control points


def test_equal_shifts_of_all_points_move_the_whole_image() -> None:
    field_BHW2 = bend(torch.full((1, 2 * CONTROL**2), 0.25), 16, 16)
    torch.testing.assert_close(field_BHW2, torch.full((1, 16, 16, 2), 0.25))


@pytest.mark.parametrize(("share", "filter_"), [(1.0, ImageFilter.MinFilter(3)), (-1.0, ImageFilter.MaxFilter(3))])
def test_a_whole_pixel_more_or_less_is_pillows_filter(share: float, filter_: ImageFilter.Filter) -> None:
    pixels = batch_of(size=1).images_BCHW
    found = widen(to_float(pixels), torch.tensor([share]))
    expected = Image.fromarray(pixels[0, 0].numpy()).filter(filter_)
    inner = (slice(1, -1), slice(1, -1))  # Pillow leaves the border as it is
    expected_HW = to_float(torch.frombuffer(bytearray(expected.tobytes()), dtype=torch.uint8).view(16, 16))
    torch.testing.assert_close(found[0, 0][inner], expected_HW[inner])


def test_strokes_change_by_their_share_each_image_its_own() -> None:
    images = torch.ones(3, 1, 9, 9)
    images[:, :, 4] = -1.0
    found = widen(images, torch.tensor([0.5, 0.0, -0.5]))
    assert torch.equal(found[1], images[1])
    torch.testing.assert_close(found[0, 0, :, 0], torch.tensor([1.0, 1, 1, 0, -1, 0, 1, 1, 1]))
    torch.testing.assert_close(found[2, 0, :, 0], torch.tensor([1.0, 1, 1, 1, 0, 1, 1, 1, 1]))


@pytest.mark.parametrize("change", [{"elastic": 0.1}, {"stroke": 0.8}, {"mirrors": True}])
def test_each_leaves_white_paper_white_and_changes_a_drawing(change: dict[str, float]) -> None:
    augment = Augment(AugmentConfig.model_validate(change), 0, 5)
    white, _ = augment(batch_of(size=8, value=255), 0, 0, 8)
    torch.testing.assert_close(white, torch.ones_like(white))
    drawn = batch_of(size=8)
    assert not torch.equal(augment(drawn, 0, 0, 8)[0], to_float(drawn.images_BCHW))


@pytest.mark.parametrize("config", [AugmentConfig(mirrors=True), TURNED])
def test_every_variant_of_an_identity_is_a_class_of_its_own(config: AugmentConfig) -> None:
    batch = batch_of(size=160)
    images, labels = Augment(config, 0, 5)(batch, 0, 0, 160)
    assert int(labels.max()) < 5 * config.variants
    for image, label, before, old in zip(images, labels, to_float(batch.images_BCHW), batch.labels_B, strict=True):
        mirrored, turns = divmod(int(label) // 5, 4 if config.quarter_turns else 1)
        turned = before.rot90(turns, (1, 2))
        assert torch.equal(image, turned.flip(-1) if mirrored else turned)
        assert label % 5 == old
    assert len(set((labels // 5).tolist())) == config.variants


def test_mirrors_do_not_move_the_turns_or_what_comes_after() -> None:
    batch = batch_of(size=60)
    alone_images, alone = Augment(AugmentConfig(quarter_turns=True, brightness=0.2), 3, 5)(batch, 1, 2, 60)
    images, both = Augment(TURNED.model_copy(update={"brightness": 0.2}), 3, 5)(batch, 1, 2, 60)
    assert torch.equal(both % 20, alone)
    same = both == alone
    assert 0 < int(same.sum()) < 60
    assert torch.equal(images[same], alone_images[same])
