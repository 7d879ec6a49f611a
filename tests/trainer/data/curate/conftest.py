"""Small sets of drawn characters, one with wrong labels, and an embedder good enough to find them."""

import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from trainer.data.image import Preprocessing, load_image
from trainer.data.importers.run import ImportOptions, run_import
from trainer.data.manifest import Manifest
from trainer.embedder import MODEL_FILE, EmbedderManifest, model_id, write_manifest

SIDE, DIMENSION = 32, 48
LEARNT, SHOWN = ("Alphabet_of_the_Magi", "Anglo-Saxon_Futhorc"), ("Greek", "Latin", "Hebrew")
PREPROCESSING = Preprocessing(mode="L", height=SIDE, width=SIDE)
WRONG = 60
Contents = dict[str, Counter[tuple[str, int]]]


def _contents(address: Path) -> Contents:
    """How often each split has each (identity, checksum of the image)."""
    manifest = Manifest.read(address)
    found: Contents = {}
    for name in manifest.splits:
        split = manifest.split(name)
        indexes = [split.index(shard) for shard in range(len(split.shards))]
        records = [record for index in indexes for record in index.records]
        found[name] = Counter((split.classes[int(record["label"])], int(record["crc"])) for record in records)
    return found


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], Contents]:
    return _contents


def _files(omniglot_zip: Path, alphabets: tuple[str, ...]) -> dict[str, bytes]:
    """`Alphabet_character01/0001_01.png`: the file."""
    with zipfile.ZipFile(omniglot_zip) as archive:
        names = sorted(PurePosixPath(name) for name in archive.namelist() if name.endswith(".png"))
        return {
            f"{name.parts[-3]}_{name.parts[-2]}/{name.name}": archive.read(str(name))
            for name in names
            if name.parts[-3] in alphabets
        }


def _write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


@pytest.fixture(scope="session")
def wrong_labels(omniglot_zip: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """72 characters in 1,440 drawings, 60 of which lie in another character's folder; and where these lie."""
    files = _files(omniglot_zip, SHOWN)
    random = np.random.default_rng(0)
    folders = sorted({name.split("/")[0] for name in files})
    moved = set()
    for name in random.choice(sorted(files), WRONG, replace=False).tolist():
        others = [folder for folder in folders if folder != name.split("/")[0]]
        place = f"{others[random.integers(len(others))]}/{name.split('/')[1]}"
        files[place] = files.pop(name)
        moved.add(place)
    root = tmp_path_factory.mktemp("wrong")
    _write(root / "images", files)
    run_import("folder", root / "images", root / "set", ImportOptions(holdout_share=0, samples_per_shard=500))
    return root / "set", moved


@pytest.fixture(scope="session")
def embedder(omniglot_zip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Strengths of eight directions of stroke in places of the picture, and the best linear map of them."""
    files = _files(omniglot_zip, LEARNT)
    images = np.stack([load_image(content, PREPROCESSING) for content in files.values()])
    labels = np.unique([name.split("/")[0] for name in files], return_inverse=True)[1]
    (features,) = onnxruntime.InferenceSession(_graph(None)).run(["flat"], {"images": images})
    fitted = LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.1, n_components=DIMENSION).fit(features, labels)
    weights = fitted.scalings_[:, :DIMENSION]
    content = _graph((weights, -features.mean(axis=0) @ weights))
    folder = tmp_path_factory.mktemp("embedder")
    (folder / MODEL_FILE).write_bytes(content)
    identity = model_id(content, PREPROCESSING)
    write_manifest(folder, EmbedderManifest(model_id=identity, dimension=DIMENSION, preprocessing=PREPROCESSING))
    return folder


def _graph(linear: tuple[NDArray[np.floating], NDArray[np.floating]] | None) -> bytes:
    """The ONNX file: features alone, or the embedding by `linear`, weights and bias."""
    x, y = np.meshgrid(np.arange(-2, 3), np.arange(-2, 3))
    bell = np.exp(-(x**2 + y**2) / 2)
    slopes = np.stack([(np.cos(turn) * x + np.sin(turn) * y) * bell for turn in np.arange(8) * np.pi / 4])
    slopes = slopes[:, np.newaxis].astype(np.float32) / 1000
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["float", "slopes"], ["strokes"], pads=[2] * 4),
        helper.make_node("Relu", ["strokes"], ["directed"]),
        helper.make_node("AveragePool", ["directed"], ["places"], kernel_shape=[8, 8], strides=[4, 4]),
        helper.make_node("Sqrt", ["places"], ["roots"]),
        helper.make_node("Flatten", ["roots"], ["flat"]),
    ]
    constants = {"slopes": slopes}
    output = helper.make_tensor_value_info("flat", TensorProto.FLOAT, ["B", None])
    if linear is not None:
        constants |= {"weights": linear[0].astype(np.float32), "bias": linear[1].astype(np.float32)}
        nodes.append(helper.make_node("Gemm", ["flat", "weights", "bias"], ["raw"]))
        nodes.append(helper.make_node("LpNormalization", ["raw"], ["embeddings"], axis=1, p=2))
        output = helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["B", DIMENSION])
    taken = helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", 1, SIDE, SIDE])
    initial = [numpy_helper.from_array(values, name) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "embedder", [taken], [output], initial)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a set, to be damaged."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))
