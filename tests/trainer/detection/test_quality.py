import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter

from tests.detectors import MARKS, placed, template
from trainer.detection.align import Template, footprint
from trainer.detection.quality import Bounds, Quality, judge, pose
from trainer.errors import UserError

SIDE = 112
CROP = Template.model_validate(template(SIDE))
seeds = st.integers(0, 2**32)


def picture(seed: int) -> Image.Image:
    """Grey with the spectrum of photographs: the amplitude falls with the frequency."""
    generator = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None]
    spectrum = np.fft.rfft2(generator.normal(size=(SIDE, SIDE))) / np.maximum(np.hypot(rows, columns), 1 / SIDE)
    wave = np.fft.irfft2(spectrum, (SIDE, SIDE))
    wave = (wave - wave.mean()) / wave.std() * 35 + generator.uniform(100, 150)
    return Image.fromarray(wave.clip(0, 255).astype(np.uint8))


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_sharpness_falls_with_blur(seed: int) -> None:
    blurred = [picture(seed).filter(ImageFilter.GaussianBlur(radius)) for radius in (0, 0.5, 1, 2, 3)]
    found = [judge(one, SIDE).sharpness for one in blurred]
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0] / 5


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_sharpness_does_not_change_with_the_light(seed: int) -> None:
    plain = picture(seed)
    dim = plain.point(lambda value: 40 + value * 0.6)
    assert judge(dim, SIDE).sharpness == pytest.approx(judge(plain, SIDE).sharpness, rel=0.1)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_brightness_and_contrast_follow_the_light(seed: int) -> None:
    plain = picture(seed)
    lit = [judge(ImageEnhance.Brightness(plain).enhance(factor), SIDE).brightness for factor in (0.3, 0.6, 0.9, 1.2)]
    assert lit == sorted(lit)
    flat = [judge(ImageEnhance.Contrast(plain).enhance(factor), SIDE).contrast for factor in (1, 0.7, 0.4, 0.1, 0)]
    assert flat == sorted(flat, reverse=True)
    assert flat[-1] == 0


def test_what_has_no_structure_is_not_sharp() -> None:
    found = judge(Image.new("L", (SIDE, SIDE), 90), SIDE)
    assert (found.sharpness, found.contrast, found.score) == (0, 0, 0)


def test_size_is_what_the_face_has_in_the_photograph() -> None:
    sides = (30, 60, 112, 250)
    found = [footprint(placed([(1, 320, 240, side, 25)])[1][0], CROP) for side in sides]
    assert found == pytest.approx(sides)
    scores = [judge(picture(1), size).score for size in found]
    assert scores == sorted(scores)
    assert scores[0] < scores[-1]


def seen(yaw: float, pitch: float, roll: float, scale: float = 3.0) -> np.ndarray:
    """The mean head, turned by rotation matrices written out, in parallel projection."""
    head = np.column_stack([CROP.points_52, np.zeros(5)])
    eyes = head[1, 0] - head[0, 0]
    head[2, 2], head[3:, 2] = -0.5 * eyes, -0.1 * eyes
    y, p, r = np.deg2rad([yaw, pitch, roll])
    about_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(p), -np.sin(p)], [0, np.sin(p), np.cos(p)]])
    about_z = np.array([[np.cos(r), -np.sin(r), 0], [np.sin(r), np.cos(r), 0], [0, 0, 1]])
    return (scale * head @ (about_z @ about_y @ about_x).T)[:, :2] + (200, 100)


@given(st.floats(-80, 80), st.floats(-60, 60), st.floats(-179, 179))
def test_pose_is_that_of_the_head(yaw: float, pitch: float, roll: float) -> None:
    assert pose(seen(yaw, pitch, roll), CROP) == pytest.approx((yaw, pitch, roll), abs=0.01)


def test_angles_have_the_sides_that_the_words_say() -> None:
    nose = seen(30, 0, 0)[2] - seen(0, 0, 0)[2]
    assert nose[0] < 0  # to the picture's left
    lowered = seen(0, 20, 0)
    assert lowered[2, 1] - lowered[:2, 1].mean() > seen(0, 0, 0)[2, 1] - seen(0, 0, 0)[:2, 1].mean()
    leaning = seen(0, 0, 20)
    assert leaning[1, 1] > leaning[0, 1]  # the right eye is lower: the head leans to the right


@settings(max_examples=30)
@given(st.floats(1, 6), seeds)
def test_the_score_falls_as_a_head_turns(step: float, seed: int) -> None:
    crop = picture(seed)
    scores = [judge(crop, 1e6, seen(step * turn, 0, 0), CROP).score for turn in range(15)]
    assert scores == sorted(scores, reverse=True)


def test_marks_of_the_test_are_the_template() -> None:
    assert pose(np.array(MARKS) * 300, CROP) == pytest.approx((0, 0, 0), abs=1e-6)


GOOD = Quality(sharpness=0.1, size=80, brightness=0.5, contrast=0.3, yaw=-10, pitch=5, roll=40, score=0.5)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("sharpness=0.2", "too blurred (sharpness 0.1; at least 0.2 is asked for)"),
        ("size=81", "too small (size 80; at least 81 is asked for)"),
        ("brightness=0.6..0.9", "too dark (brightness 0.5; 0.6 to 0.9 is asked for)"),
        ("brightness=0.1..0.4", "too bright (brightness 0.5; 0.1 to 0.4 is asked for)"),
        ("contrast=0.4", "too flat (contrast 0.3; at least 0.4 is asked for)"),
        ("yaw=9", "turned too far aside (yaw -10; at most 9 is asked for)"),
        ("pitch=4", "tilted too far up or down (pitch 5; at most 4 is asked for)"),
        ("roll=39", "leaning too far (roll 40; at most 39 is asked for)"),
        ("norm=12", None),  # not known of this one
        ("sharpness=0.1,size=80,brightness=0.5..0.6,contrast=0.3,yaw=10,pitch=5,roll=40", None),
        ("", None),
    ],
)
def test_each_measure_can_be_asked_for(asked: str, told: str | None) -> None:
    assert Bounds.read(asked).faults(GOOD) == ([] if told is None else [told])


def test_all_faults_are_named() -> None:
    assert len(Bounds.read("size=90,yaw=1,norm=10").faults(GOOD.model_copy(update={"norm": 3.0}))) == 3


def test_the_manifest_can_be_asked_for_and_changed() -> None:
    told = Bounds(size=60, yaw=30)
    assert Bounds.read("manifest", told) == told
    assert Bounds.read("manifest,size=90", told) == Bounds(size=90, yaw=30)
    assert Bounds.read("size=90", told) == Bounds(size=90)
    assert Bounds.read("manifest") == Bounds()


@pytest.mark.parametrize("asked", ["size", "size=", "size=big", "size=-1", "size=nan", "brightness=0.4", "beauty=1",
                                   "brightness=0.9..0.1", "brightness=a..b", "yaw=91", "=", "manifest=1"])  # fmt: skip
def test_what_cannot_be_asked_for_is_one_sentence(asked: str) -> None:
    with pytest.raises(UserError, match="quality") as caught:
        Bounds.read(asked)
    assert "\n" not in str(caught.value)
