import colorsys
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.data.augment import Augment, AugmentConfig, to_float
from trainer.data.degrade import INTERPOLATIONS, blur, colour_matrices, jpeg, low_resolution
from trainer.data.stream import Batch

ALL = AugmentConfig(
    saturation=0.5, hue=0.1, greyscale=0.2, blur=0.5, low_resolution=0.5, jpeg=0.5, crop=0.4, erase=0.3, contrast=0.3
)  # fmt: skip


def picture(height: int = 64, width: int = 64, channels: int = 3) -> torch.Tensor:
    """Smooth shapes, edges and a little noise, as photographs have them: uint8 [C, H, W]."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    random = np.random.default_rng(0)
    planes = [
        128 + 60 * np.sin(x / (5 + c) + c) + 50 * np.cos(y / (7 + 2 * c)) * ((x - 30) ** 2 + (y - 25) ** 2 < 300)
        for c in range(channels)
    ]
    noisy = np.stack(planes) + random.normal(0, 4, (channels, height, width))
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8))


def grey(images: torch.Tensor) -> torch.Tensor:
    return (images + 1) * 127.5


@pytest.mark.parametrize("quality", [1, 10, 30, 50, 75, 95, 100])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(64, 64), (57, 43)])
def test_jpeg_loses_what_pillow_loses(quality: int, channels: int, size: tuple[int, int]):
    pixels = picture(*size, channels)
    file = BytesIO()
    image = Image.fromarray(pixels[0].numpy() if channels == 1 else pixels.permute(1, 2, 0).numpy())
    image.save(file, "JPEG", quality=quality, subsampling="4:2:0")
    theirs = np.asarray(Image.open(file)).reshape(*size, channels).transpose(2, 0, 1).astype(float)
    ours = grey(jpeg(to_float(pixels[None]), torch.tensor([quality])))[0].numpy()
    difference = np.abs(ours - theirs)
    lost = np.abs(theirs - pixels.numpy()).mean()
    assert difference.mean() < 0.7 + 0.1 * lost  # libjpeg computes in integers: some coefficients fall the other way
    if quality <= 50:
        assert lost > 3 * difference.mean()  # it is that loss, not just some picture near the original


def test_jpeg_of_two_qualities_at_once():
    images = to_float(torch.stack([picture(), picture()]))
    both = jpeg(images, torch.tensor([5, 90]))
    for row, quality in enumerate((5, 90)):
        torch.testing.assert_close(both[row : row + 1], jpeg(images[row : row + 1], torch.tensor([quality])))
    worse, better = (both - images).abs().mean((1, 2, 3)).tolist()
    assert worse > 3 * better


@pytest.mark.parametrize("down", range(len(INTERPOLATIONS)))
def test_low_resolution_leaves_few_different_pixels(down: int):
    images = to_float(torch.stack([picture(50, 40), picture(50, 40)]))
    nearest = INTERPOLATIONS.index("nearest")
    shrunk = low_resolution(images, torch.tensor([0.25, 1.0]), torch.tensor([down] * 2), torch.tensor([nearest] * 2))
    blocks = shrunk[0].unfold(1, 5, 5).unfold(2, 4, 4)  # 50 x 40 were 12 x 10: blocks of 4 in width
    assert len(torch.unique(shrunk[0, 0])) <= 12 * 10 < len(torch.unique(images[0, 0]))
    assert torch.equal(blocks.amax(-1), blocks.amin(-1))
    torch.testing.assert_close(shrunk[1], images[1])
    assert low_resolution(images, torch.tensor([0.01] * 2), torch.tensor([down] * 2), torch.tensor([3] * 2)).shape


def test_bicubic_stays_in_range():
    checker = ((torch.arange(32)[:, None] + torch.arange(32)) // 4 % 2 * 2.0 - 1).expand(1, 3, 32, 32)
    bicubic = torch.tensor([INTERPOLATIONS.index("bicubic")])
    assert low_resolution(checker, torch.tensor([0.6]), bicubic, bicubic).abs().max() <= 1


def test_blur_against_a_plain_convolution():
    images = to_float(torch.stack([picture(40, 30), picture(40, 30)]))
    blurred = blur(images, torch.tensor([1.5, 0.1]))
    torch.testing.assert_close(blurred[1], images[1], rtol=0, atol=1e-6)
    offsets = np.arange(-8, 9)
    weights = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    plane = images[0, 1].numpy().astype(float)
    for row, column in ((20, 15), (10, 12), (31, 20)):
        expected = weights @ plane[row - 8 : row + 9, column - 8 : column + 9] @ weights
        assert float(blurred[0, 1, row, column]) == pytest.approx(expected, abs=1e-5)
    white = torch.ones(1, 3, 9, 9)
    torch.testing.assert_close(blur(white, torch.tensor([5.0])), white)


def test_colour_turns_keep_grey_and_luma():
    turns = torch.tensor([0.0, 0.1, -0.3, 0.5])
    matrices = colour_matrices(torch.tensor([1.0, 1.5, 0.5, 0.0]), turns)
    torch.testing.assert_close(matrices[0], torch.eye(3), rtol=0, atol=1e-5)
    luma = torch.tensor([0.299, 0.587, 0.114])
    torch.testing.assert_close(luma @ matrices, luma.expand(4, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(matrices.sum(2), torch.ones(4, 3), rtol=0, atol=1e-5)  # grey to the same grey
    torch.testing.assert_close(matrices[3], luma.expand(3, 3), rtol=0, atol=1e-5)  # without saturation: luma


def test_a_third_of_the_circle_turns_red_to_another_hue():
    red = colour_matrices(torch.ones(1), torch.tensor([1 / 3]))[0] @ torch.tensor([0.6, 0.4, 0.4])
    hue = colorsys.rgb_to_hsv(*red.clamp(0, 1).tolist())[0]
    assert 0.2 < min(hue, 1 - hue) < 0.5


@pytest.mark.parametrize("name", ["saturation", "hue", "greyscale", "blur", "low_resolution", "jpeg", "crop"])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_switch_changes_its_share_of_the_images(name: str, channels: int):
    batch = Batch(picture(32, 32, channels).expand(300, -1, -1, -1), torch.arange(300), ("",) * 300, torch.arange(300))
    images, _ = Augment(AugmentConfig(**{name: 0.4}), 0, 300)(batch, 0, 0, 300)
    assert images.shape == batch.images_BCHW.shape
    assert images.abs().max() <= 1
    changed = int(((images - to_float(batch.images_BCHW)).abs() > 1e-4).flatten(1).any(1).sum())
    if name in ("saturation", "hue", "greyscale") and channels == 1:
        assert changed == 0
    elif name in ("saturation", "hue"):
        assert changed > 290  # a factor or an angle for every image
    else:
        assert 90 < changed < 150


def test_crop_keeps_a_rectangle_in_its_place():
    batch = Batch(
        torch.full((200, 3, 24, 32), 200, dtype=torch.uint8), torch.arange(200), ("",) * 200, torch.arange(200)
    )
    images, _ = Augment(AugmentConfig(crop=1), 0, 200)(batch, 0, 0, 200)
    kept = images > -1
    assert torch.equal(images[kept], to_float(torch.full((int(kept.sum()),), 200, dtype=torch.uint8)))
    for image in kept[:, 0]:
        rows, columns = image.any(1), image.any(0)
        assert torch.equal(image, rows[:, None] & columns)  # a rectangle
        assert 0.15 <= float(image.float().mean()) <= 1


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_degrade_as_one_rank_does(ranks: int):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=generator)
    whole, _ = Augment(ALL, 7, 5)(Batch(images, torch.arange(24), ("",) * 24, torch.arange(24)), 3, 4, 24)
    parts = []
    for rows in torch.arange(24).chunk(ranks):
        batch = Batch(images[rows], rows, ("",) * len(rows), rows)
        parts.append(Augment(ALL, 7, 5)(batch, 3, 4, 24)[0])
    # rounding before quantisation may fall the other way in a few coefficients
    assert float((torch.cat(parts) - whole).abs().gt(1e-4).float().mean()) < 0.01
    assert torch.equal(whole, Augment(ALL, 7, 5)(Batch(images, torch.arange(24), (), torch.arange(24)), 3, 4, 24)[0])


def test_more_switches_do_not_move_the_draws_of_others():
    batch = Batch(picture(16, 16).expand(40, -1, -1, -1), torch.arange(40), ("",) * 40, torch.arange(40))
    alone, _ = Augment(AugmentConfig(flip=True), 0, 40)(batch, 0, 0, 40)
    both, _ = Augment(AugmentConfig(flip=True, jpeg=0.3), 0, 40)(batch, 0, 0, 40)
    same = (alone == both).flatten(1).all(1)
    assert 15 < int(same.sum()) < 40


@pytest.mark.parametrize("more", [{}, {"rotate_degrees": 20, "shear_degrees": 10, "translate": 0.1}])
def test_pixels_stay_on_their_device(more: dict[str, float]):
    """Torch refuses to mix devices, and "meta" is another one than that of the random numbers."""
    config = AugmentConfig.model_validate(ALL.model_dump() | {"flip": True, "quarter_turns": True} | more)
    batch = Batch(torch.zeros(16, 3, 24, 24, dtype=torch.uint8), torch.arange(16), ("",) * 16, torch.arange(16))
    images, labels = Augment(config, 0, 16)(batch.to(torch.device("meta")), 0, 0, 16)
    assert (images.device.type, labels.device.type) == ("meta", "meta")
    assert images.shape == (16, 3, 24, 24)
