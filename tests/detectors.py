"""A tiny real detector, and photographs for it: faces are patches with five coloured marks."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw

INPUT, WINDOW, STEP = 128, 49, 4
# Where the marks lie in a face, as shares of its side.
MARKS = ((0.30, 0.38), (0.70, 0.38), (0.50, 0.56), (0.36, 0.78), (0.64, 0.78))
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
DRAWN = 512  # the side of a face as it is painted


def template(side: int) -> dict[str, object]:
    """The crop of the whole face."""
    points = [[x * side - 0.5, y * side - 0.5] for x, y in MARKS]
    return {"height": side, "width": side, "points": points}


def model() -> onnx.ModelProto:
    """RGB [1, 3, 128, 128] in 0 to 1 to scores, boxes and landmarks of 32 x 32 places.

    A place is a face if its window holds all five colours and the blue mark is at its middle. Landmarks are the centres
    of gravity of the colours in the window.
    """
    colours = np.array([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -2], [1, -2, 1]], np.float32)
    least = np.array([0.4, 0.4, 0.4, 1.4, 1.4], np.float32)
    grid = np.arange(INPUT, dtype=np.float32)
    cells = np.arange(0, INPUT, STEP, dtype=np.float32)
    constants = {
        "colours": colours.reshape(5, 3, 1, 1), "least": -least, "x": grid.reshape(1, 1, 1, -1),
        "y": grid.reshape(1, 1, -1, 1), "cell_x": cells.reshape(1, 1, 1, -1), "cell_y": cells.reshape(1, 1, -1, 1),
        "little": np.float32(1e-6), "many": np.float32(1e4), "reach": np.float32(1 / STEP), "one": np.float32(1),
        "zero": np.float32(0), "channel": np.array([1], np.int64), "points": np.array([1, -1, 10], np.int64),
        "flat": np.array([1, -1], np.int64), "corners": np.array([1, -1, 4], np.int64),
        "grow": np.array([-6, -6, 6, 6], np.float32), "nose": np.array([2], np.int64),
    }  # fmt: skip
    pool = {"kernel_shape": [WINDOW] * 2, "strides": [STEP] * 2, "pads": [WINDOW // 2] * 4, "count_include_pad": 1}
    node = helper.make_node
    nodes = [
        node("Conv", ["picture", "colours", "least"], ["raw"]),
        node("Relu", ["raw"], ["mask"]),
        node("AveragePool", ["mask"], ["mass"], **pool),
        node("Add", ["mass", "little"], ["weight"]),
    ]
    for axis in "xy":
        nodes += [
            node("Mul", ["mask", axis], [f"at_{axis}"]),
            node("AveragePool", [f"at_{axis}"], [f"sum_{axis}"], **pool),
            node("Div", [f"sum_{axis}", "weight"], [f"mark_{axis}"]),
            node("Gather", [f"mark_{axis}", "nose"], [f"nose_{axis}"], axis=1),
            node("Sub", [f"nose_{axis}", f"cell_{axis}"], [f"off_{axis}"]),
            node("Abs", [f"off_{axis}"], [f"far_{axis}"]),
            node("ReduceMin", [f"mark_{axis}", "channel"], [f"low_{axis}"], keepdims=1),
            node("ReduceMax", [f"mark_{axis}", "channel"], [f"high_{axis}"], keepdims=1),
        ]
    nodes += [
        node("Max", ["far_x", "far_y"], ["far"]),
        node("Mul", ["far", "reach"], ["share"]),
        node("Sub", ["one", "share"], ["near"]),
        node("AveragePool", ["mask"], ["here"], **(pool | {"kernel_shape": [5] * 2, "pads": [2] * 4})),
        node("Gather", ["here", "nose"], ["nose_here"], axis=1),
        node("ReduceMin", ["mass", "channel"], ["poorest_mark"], keepdims=1),
        node("Min", ["poorest_mark", "nose_here"], ["poorest"]),
        node("Mul", ["poorest", "many"], ["ample"]),
        node("Min", ["ample", "near"], ["lesser"]),
        node("Clip", ["lesser", "zero", "one"], ["score"]),
        node("Reshape", ["score", "flat"], ["scores"]),
        # [1, 5, 32, 32] twice to [1, places, 10] with x and y in turn
        node("Unsqueeze", ["mark_x", "last"], ["xs"]),
        node("Unsqueeze", ["mark_y", "last"], ["ys"]),
        node("Concat", ["xs", "ys"], ["both"], axis=4),
        node("Transpose", ["both"], ["turned"], perm=[0, 2, 3, 1, 4]),
        node("Reshape", ["turned", "points"], ["landmarks"]),
        node("Concat", ["low_x", "low_y", "high_x", "high_y"], ["ends"], axis=1),
        node("Transpose", ["ends"], ["box"], perm=[0, 2, 3, 1]),
        node("Reshape", ["box", "corners"], ["tight"]),
        node("Add", ["tight", "grow"], ["boxes"]),
    ]
    constants["last"] = np.array([4], np.int64)
    places = (INPUT // STEP) ** 2
    graph = helper.make_graph(
        nodes,
        "marks",
        [helper.make_tensor_value_info("picture", TensorProto.FLOAT, [1, 3, INPUT, INPUT])],
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, places]),
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, places, 4]),
            helper.make_tensor_value_info("landmarks", TensorProto.FLOAT, [1, places, 10]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(made)
    return made


def write_detector(folder: Path, side: int, **manifest: object) -> Path:
    """A detector's folder whose crops have `side` x `side` pixels."""
    folder.mkdir(parents=True)
    (folder / "detector.onnx").write_bytes(model().SerializeToString())
    told = {
        "height": INPUT, "width": INPUT, "mean": [0], "std": [255], "template": template(side),
        "outputs": [{"scores": "scores", "boxes": "boxes", "landmarks": "landmarks"}],
    } | manifest  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(told))
    return folder


def painted(identity: int) -> Image.Image:
    """A face, upright: smooth grey of its own, and the five marks."""
    grey = np.random.default_rng(identity).integers(40, 216, (6, 6)).astype(np.uint8)
    face = Image.fromarray(grey).resize((DRAWN, DRAWN), Image.Resampling.BICUBIC).convert("RGB")
    draw = ImageDraw.Draw(face)
    for (x, y), colour in zip(MARKS, COLOURS, strict=True):
        draw.circle((x * DRAWN - 0.5, y * DRAWN - 0.5), 0.06 * DRAWN, fill=colour)
    return face


def placed(
    faces: Sequence[tuple[int, float, float, float, float]], size: tuple[int, int] = (640, 480), grey: int = 128
) -> tuple[Image.Image, list[NDArray[np.float64]]]:
    """A photograph of (identity, x, y of the middle, side, degrees clockwise), and where the marks lie in it."""
    photo, marks = Image.new("RGB", size, (grey,) * 3), []
    for identity, x, y, side, degrees in faces:
        turn = np.deg2rad(degrees)
        matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) * (side / DRAWN)
        back = np.linalg.inv(matrix)
        shift = np.array([DRAWN / 2, DRAWN / 2]) - back @ (x, y)
        numbers = (*back[0], shift[0], *back[1], shift[1])
        shrink = max(1, int(DRAWN / side / 2))  # as a lens would, not a grid of single points
        face, solid = painted(identity), Image.new("L", (DRAWN, DRAWN), 255)
        small = [found.reduce(shrink) for found in (face, solid)]
        scaled = tuple(float(number) / shrink for number in numbers)
        layer, mask = (
            found.transform(size, Image.Transform.AFFINE, scaled, Image.Resampling.BICUBIC) for found in small
        )
        photo.paste(layer, mask=mask)
        middle = np.array(MARKS) * DRAWN - DRAWN / 2
        marks.append(middle @ matrix.T + (x, y) - 0.5)
    return photo, marks


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
