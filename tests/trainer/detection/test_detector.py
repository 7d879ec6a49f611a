import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from tests.detectors import painted, placed, write_detector
from trainer.detection.align import align
from trainer.detection.detector import Detector, suppress
from trainer.errors import UserError

SIDE = 64
THREE = [(1, 120, 120, 140, 0), (2, 480, 150, 160, 33), (3, 300, 350, 120, -70)]


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    return Detector.open(write_detector(tmp_path_factory.mktemp("detector") / "marks", SIDE))


def upright(identity: int) -> np.ndarray:
    return np.asarray(painted(identity).resize((SIDE, SIDE), Image.Resampling.BICUBIC), float)


def test_a_photograph_without_a_face_has_none(detector: Detector) -> None:
    assert detector.find(Image.new("RGB", (300, 200), "white")) == []
    assert detector.find(placed([])[0].convert("L")) == []


@pytest.mark.parametrize("faces", [THREE[:1], THREE], ids=["one", "three"])
def test_every_face_is_found_where_it_is(
    detector: Detector, faces: list[tuple[int, float, float, float, float]]
) -> None:
    photo, marks = placed(faces)
    found = detector.find(photo)
    assert len(found) == len(faces)
    assert [face.area for face in found] == sorted((face.area for face in found), reverse=True)
    for wanted in marks:
        nearest = min(found, key=lambda face: np.abs(face.landmarks_52 - wanted).max())
        assert np.abs(nearest.landmarks_52 - wanted).max() < 2.5  # half a pixel of the input
        left, top, right, bottom = nearest.box
        inside = (wanted > (left, top)) & (wanted < (right, bottom))
        assert inside.all()


@pytest.mark.parametrize("degrees", [0, 20, -45, 90, 180])
@pytest.mark.parametrize("side", [110, 150, 300])
def test_a_face_turned_and_scaled_becomes_the_upright_crop(detector: Detector, degrees: float, side: float) -> None:
    photo, _ = placed([(7, 300, 220, side, degrees)], size=(600, 440))
    (face,) = detector.find(photo if side < 200 else photo.resize((1200, 880), Image.Resampling.BICUBIC))
    source = photo if side < 200 else photo.resize((1200, 880), Image.Resampling.BICUBIC)
    crop = np.asarray(align(source, face.landmarks_52, detector.manifest.template), float)
    wanted = upright(7)
    away = np.asarray(align(source, face.landmarks_52 + np.array([6, 0]), detector.manifest.template), float)
    difference = np.abs(crop - wanted)[4:-4, 4:-4].mean()
    assert difference < 6
    assert difference < np.abs(away - wanted)[4:-4, 4:-4].mean() / 2  # the measure sees a crop that is a little aside


def test_grey_and_bgr_and_channels_last_are_read_alike(tmp_path: Path, detector: Detector) -> None:
    """A model with its channels turned round sees the same through a manifest that says so."""
    made = onnx.load_model_from_string((write_detector(tmp_path / "a", SIDE) / "detector.onnx").read_bytes())
    made.graph.input[0].CopyFrom(helper.make_tensor_value_info("hwc", TensorProto.FLOAT, [1, 128, 128, 3]))
    (colours,) = [one for one in made.graph.initializer if one.name == "colours"]
    colours.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(colours)[:, ::-1].copy(), "colours"))
    made.graph.node.insert(0, helper.make_node("Transpose", ["hwc"], ["picture"], perm=[0, 3, 1, 2]))
    other = write_detector(tmp_path / "b", SIDE, mode="BGR", layout="NHWC")
    (other / "detector.onnx").write_bytes(made.SerializeToString())
    photo, _ = placed(THREE)
    turned = Detector.open(other)
    assert turned.detector_id != detector.detector_id
    for one, two in zip(detector.find(photo), turned.find(photo), strict=True):
        assert one.box == pytest.approx(two.box, abs=1e-3)
        assert np.allclose(one.landmarks_52, two.landmarks_52, atol=1e-3)


def test_distances_in_strides_are_read_as_scrfd_gives_them(tmp_path: Path) -> None:
    """Two anchors a cell; only the second one of cell (row 2, column 3) is a face."""
    places = 2 * 8 * 8
    scores, boxes, points = np.zeros((places, 1)), np.zeros((places, 4)), np.zeros((places, 10))
    at = 2 * (2 * 8 + 3) + 1
    scores[at], boxes[at] = 0.9, (1, 0.5, 2, 3)
    points[at] = (-0.5, 0, 1.5, 0, 0.5, 1, -0.25, 2, 1.25, 2)
    values = {"s": scores, "b": boxes, "p": points}
    nodes = [helper.make_node("Identity", [f"{name}0"], [name]) for name in values]
    graph = helper.make_graph(
        nodes, "fixed",
        [helper.make_tensor_value_info("in", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in values.items()],
        [numpy_helper.from_array(value.astype(np.float32), f"{name}0") for name, value in values.items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    level = {"scores": "s", "boxes": "b", "landmarks": "p", "stride": 8}
    folder = write_detector(tmp_path / "d", SIDE, height=64, width=64, outputs=[level])
    (folder / "detector.onnx").write_bytes(made.SerializeToString())
    (face,) = Detector.open(folder).find(Image.new("RGB", (64, 64)))
    assert face.box == pytest.approx((16, 12, 40, 40))
    wanted = [(20, 16), (36, 16), (28, 24), (22, 32), (34, 32)]
    assert np.allclose(face.landmarks_52, wanted)
    assert face.score == pytest.approx(0.9)
    (larger,) = Detector.open(folder).find(Image.new("RGB", (128, 128)))  # the input is half of it
    assert larger.box == pytest.approx((32.5, 24.5, 80.5, 80.5))


def test_of_boxes_that_overlap_the_best_stays() -> None:
    boxes_N4 = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [8, 0, 18, 10]], float)
    assert suppress(boxes_N4, np.array([0.8, 0.9, 0.7, 0.6]), 0.4) == [1, 2, 3]
    assert suppress(boxes_N4, np.array([0.8, 0.9, 0.7, 0.6]), 1.0) == [1, 0, 2, 3]
    assert suppress(np.empty((0, 4)), np.empty(0), 0.4) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"outputs": [{"scores": "scores", "boxes": "boxes", "landmarks": "nose"}]}, "no output 'nose'"),
        ({"outputs": [{"scores": "landmarks", "boxes": "boxes", "landmarks": "boxes"}]}, "does not do what"),
        ({"outputs": [{"scores": "scores", "boxes": "boxes", "landmarks": "landmarks", "stride": 16}]}, None),
        ({"outputs": [{"scores": "scores", "boxes": "boxes", "landmarks": "landmarks", "stride": 7}]}, "do not fill"),
        ({"height": 100}, "does not do what its manifest says"),
        ({"std": [0]}, "std must be above 0"),
        ({"mean": [1, 2]}, "one number, or 3"),
        ({"template": {"height": 64, "width": 64, "points": [[1, 1]] * 5}}, "left before right"),
        ({"template": {"height": 64, "width": 64, "points": [[1, 1]] * 4}}, "at least 5 items"),
        ({"threshold": 1}, "Extra inputs are not permitted at 'threshold'"),
        ({"score_threshold": "nan"}, "score_threshold"),
    ],
)
def test_what_is_wrong_with_a_detector_is_one_sentence(
    tmp_path: Path, change: dict[str, object], told: str | None
) -> None:
    folder = write_detector(tmp_path / "d", SIDE, **change)
    if told is None:
        assert Detector.open(folder)
        return
    with pytest.raises(UserError, match=told) as caught:
        Detector.open(folder)
    assert "\n" not in str(caught.value)


def test_what_is_no_detector_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'manifest\.json' cannot be read"):
        Detector.open(tmp_path)
    folder = write_detector(tmp_path / "d", SIDE)
    (folder / "detector.onnx").write_bytes(b"not a model")
    with pytest.raises(UserError, match="is not a model that ONNX Runtime"):
        Detector.open(folder)
    (folder / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not a detector's manifest"):
        Detector.open(folder)


def test_places_that_are_no_places_are_no_faces(tmp_path: Path) -> None:
    """NaN, infinite, turned round, and landmarks in one point."""
    boxes = np.array([[np.nan, 0, 9, 9], [0, 0, np.inf, 9], [9, 9, 0, 0], [0, 0, 30, 30], [0, 0, 30, 30]], np.float32)
    good = np.array([10, 10, 20, 10, 15, 15, 11, 20, 19, 20], np.float32)
    points = np.stack([good, good, good, np.full(10, 5, np.float32), good])
    points[4, 3] = 1e30
    values = {"s": np.full(5, 0.9, np.float32), "b": boxes, "p": points}
    graph = helper.make_graph(
        [helper.make_node("Identity", [f"{name}0"], [name]) for name in values], "fixed",
        [helper.make_tensor_value_info("in", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in values.items()],
        [numpy_helper.from_array(value, f"{name}0") for name, value in values.items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    level = {"scores": "s", "boxes": "b", "landmarks": "p"}
    folder = write_detector(tmp_path / "d", SIDE, height=64, width=64, outputs=[level])
    (folder / "detector.onnx").write_bytes(made.SerializeToString())
    assert Detector.open(folder).find(Image.new("RGB", (64, 64))) == []


def test_the_manifest_is_read_from_json_alone(tmp_path: Path) -> None:
    folder = write_detector(tmp_path / "d", SIDE)
    told = json.loads((folder / "manifest.json").read_text())
    first = Detector.open(folder).detector_id
    (folder / "manifest.json").write_text(json.dumps(told, indent=4))
    assert Detector.open(folder).detector_id == first  # spelled otherwise
    (folder / "manifest.json").write_text(json.dumps(told | {"nms_iou": 0.3}))
    assert Detector.open(folder).detector_id != first
