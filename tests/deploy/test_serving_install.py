"""The Dockerfile's serving target without an engine: its build steps run in an empty folder and an empty virtual
environment, then its command and its health check run from there.

Paths that the image has at its root are put below the temporary folder; apart from that the steps are the file's own.
"""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from serving.cli import app
from trainer.data.image import Preprocessing
from trainer.data.importers.shards import Sample, write_shard
from trainer.data.manifest import Manifest
from trainer.data.split import write_split
from trainer.embedder import MODEL_FILE, Embedder, EmbedderManifest, model_id, write_manifest
from trainer.evaluation.report import Calibration, Report, Threshold

pytestmark = pytest.mark.timeout(900)

LIMIT = 520_000_000  # bytes of installed packages, of which Arrow, FAISS, ONNX Runtime and NumPy are 350 million
ABSENT = ["torch", "ray", "deepspeed", "mlflow", "webdataset", "matplotlib", "scipy"]
IMAGE_PATHS = re.compile(r"(?<![\w.])/(?=(?:deps|src|opt|embedders?|var/lib/hypersphere)\b)")


@dataclass(frozen=True)
class Installed:
    """The replayed image: `folder` stands for its root."""

    folder: Path
    environment: dict[str, str]

    def locate(self, text: str) -> str:
        return IMAGE_PATHS.sub(f"{self.folder}/", text)

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        # The command is looked up in the image's PATH, not in that of the tests.
        program = shutil.which(command[0], path=self.environment["PATH"]) or command[0]
        words = [program, *command[1:]]
        return subprocess.run(words, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def installed(root: Path, stages: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    folder = tmp_path_factory.mktemp("image")
    _require_an_index(folder)
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    building = inherited | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    image = Installed(folder, building)
    workdir = folder
    for keyword, rest in stages["serving-build"].instructions:
        if keyword == "WORKDIR":
            workdir = Path(image.locate(rest))
            workdir.mkdir()
        elif keyword == "COPY":
            _copy(root, workdir, rest.split())
        elif keyword == "RUN":
            step = image.locate(re.sub(r"--mount=\S+ ", "", rest))
            result = subprocess.run(["/bin/sh", "-c", step], cwd=workdir, env=building, capture_output=True, text=True)
            assert result.returncode == 0, f"{step}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    shutil.rmtree(folder / "src")  # the image has the installed packages, not the sources
    shutil.rmtree(folder / "deps")
    environment = {
        name: image.locate(value.replace("${PATH}", "/usr/bin:/bin"))
        for name, value in stages["serving"].environment().items()
    }
    yield Installed(folder, {"HOME": str(folder), "LANG": "C.UTF-8"} | environment)
    shutil.rmtree(folder)  # pytest would keep the last three


def _require_an_index(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder / "probe"), "setuptools>=80"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"pip reaches no package index, so the serving target was not installed: {reason}")


def _copy(root: Path, workdir: Path, words: list[str]) -> None:
    """COPY without flags: files into a folder, or one folder to a folder."""
    *sources, target = words
    for source in sources:
        if (root / source).is_dir():
            shutil.copytree(root / source, workdir / target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(root / source, workdir / target)


def test_it_stays_below_520_megabytes(installed: Installed) -> None:
    files = [path for path in (installed.folder / "opt/hypersphere").rglob("*") if not path.is_symlink()]
    size = sum(path.stat().st_size for path in files)
    print(f"serving target: {size / 1e6:.0f} MB of installed packages")
    assert size < LIMIT


def test_training_frameworks_are_absent(installed: Installed) -> None:
    code = f"import importlib.util as u; print([name for name in {ABSENT} if u.find_spec(name)])"
    result = installed.run(["python", "-c", code])
    assert result.stdout.strip() == "[]", result.stderr


def test_the_installed_packages_are_the_pinned_ones(installed: Installed, pins: dict[str, str]) -> None:
    code = "import importlib.metadata as m; print(*[d.name + '==' + d.version for d in m.distributions()])"
    found = dict(word.split("==") for word in installed.run(["python", "-c", code]).stdout.split())
    assert found.pop("hypersphere")
    assert len(found) > 10
    different = {name: version for name, version in found.items() if pins.get(_canonical(name)) != version}
    assert not different


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_command_line_and_the_service_import(installed: Installed) -> None:
    result = installed.run(["hypersphere", "--help"])
    assert result.returncode == 0, result.stderr
    assert "serve" in result.stdout
    result = installed.run(["python", "-c", "import serving.server.process, sys; print('torch' in sys.modules)"])
    assert result.stdout.strip() == "False", result.stderr


@pytest.fixture(scope="module")
def embedder(installed: Installed) -> Path:
    """An Embedder of one matrix, where the image expects its mount."""
    preprocessing = Preprocessing(mode="L", height=8, width=8)
    weights = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weights"], ["raw"]),
        helper.make_node("LpNormalization", ["raw"], ["embeddings"], axis=1, p=2),
    ]
    graph = helper.make_graph(
        nodes,
        "embedder",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", 1, 8, 8])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["B", 4])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    content = model.SerializeToString()
    folder = installed.folder / "embedder"
    folder.mkdir()
    (folder / MODEL_FILE).write_bytes(content)
    identity = model_id(content, preprocessing)
    threshold = Threshold(
        value=0.5, target="FMR", rate=0.01, low=0, high=0.02, probes=100, subjects=10, model_id=identity, source="none"
    )
    calibration = Calibration(verify=threshold, identify=threshold.model_copy(update={"target": "FPIR"}))
    manifest = EmbedderManifest(model_id=identity, dimension=4, preprocessing=preprocessing, calibration=calibration)
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
    return number


def test_the_images_command_serves_until_it_is_stopped(
    installed: Installed, stages: dict[str, Any], embedder: Path, port: int
) -> None:
    """ENTRYPOINT, CMD and HEALTHCHECK as they stand, on a free port of the loopback; without a key they refuse."""
    stage = stages["serving"]
    refused = installed.run([installed.locate(word) for word in stage.words("ENTRYPOINT") + stage.words("CMD")])
    assert refused.returncode == 2
    assert "HYPERSPHERE_API_KEY" in refused.stderr
    (installed.folder / "var/lib/hypersphere").mkdir(parents=True)
    replaced = {"0.0.0.0": "127.0.0.1", "8000": str(port)}
    words = [replaced.get(word, installed.locate(word)) for word in stage.words("ENTRYPOINT") + stage.words("CMD")]
    health = [
        word.replace(":8000/", f":{port}/") for word in json.loads(stage.last("HEALTHCHECK").partition("CMD ")[2])
    ]

    log = installed.folder / "log"
    program = shutil.which(words[0], path=installed.environment["PATH"])
    assert program is not None
    environment = installed.environment | {"HYPERSPHERE_API_KEY": "a-key-of-this-very-test"}
    with log.open("w") as file:
        process = subprocess.Popen([program, *words[1:]], env=environment, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 60
        while installed.run(health).returncode and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.3)
        assert process.poll() is None, log.read_text()
        assert installed.run(health).returncode == 0, log.read_text()
    finally:
        process.terminate()
        code = process.wait(timeout=60)
    assert code == 0, log.read_text()
    assert installed.run(health).returncode != 0, "the health check must fail once the service is gone"
    assert list((installed.folder / "var/lib/hypersphere").iterdir()), "the store must be on the volume"


@pytest.fixture(scope="module")
def data_set(installed: Installed) -> Path:
    """Twenty identities of five 8 x 8 images each, all held out."""
    generator = np.random.default_rng(0)
    classes = [f"person{number:02d}" for number in range(20)]
    folder = installed.folder / "data"
    folder.mkdir()
    samples = []
    for label, name in enumerate(classes):
        face = generator.integers(0, 256, (8, 8))
        for number in range(5):
            pixels = (face + generator.normal(scale=20, size=face.shape)).clip(0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            samples.append(Sample(len(samples), label, name, f"{name}/{number}.png", {}, "png", file.getvalue()))
    shards = [write_shard(folder, "val-000000.tar", samples)]
    split = write_split(folder, "val", classes, np.full(20, 5), shards)
    Manifest(kind="folder", image_mode="L", splits={"val": split}).write(folder)
    return folder


def test_an_embedder_is_evaluated_and_calibrated_and_data_verified(
    installed: Installed, embedder: Path, data_set: Path
) -> None:
    result = installed.run(["hypersphere", "data", "verify", str(data_set)])
    assert result.returncode == 0, result.stderr
    assert "every shard is as it was written" in result.stdout
    both = ["--embedder", str(embedder), "--data", str(data_set)]
    result = installed.run(["hypersphere", "evaluate", *both])
    assert result.returncode == 0, result.stderr
    assert "rank-1" in result.stdout
    assert (
        result.stderr.strip() == "no page: 'matplotlib' is not installed; pip install 'hypersphere[trainer]' brings it"
    )
    report = Report.model_validate_json((embedder / "evaluation" / "report.json").read_text())
    assert (report.samples, report.identities) == (100, 20)
    result = installed.run(["hypersphere", "calibrate", *both, "--fpir", "0.1", "--fmr", "0.01"])
    assert result.returncode == 0, result.stderr
    calibration = Embedder.open(embedder).manifest.calibration
    assert calibration is not None
    assert (calibration.identify.rate, calibration.identify.gallery_size) == (0.1, 20)


def test_data_are_held_out_merged_and_cleaned(installed: Installed, embedder: Path, data_set: Path) -> None:
    drawn, both, cleaned = (str(installed.folder / name) for name in ("drawn", "both", "cleaned"))
    for words in (
        ["split", str(data_set), "--out", drawn, "--split", "val", "--into", "test", "--by", "sample"],
        ["merge", str(data_set), drawn, "--out", both, "--prefix"],
        ["clean", str(data_set), "--out", cleaned, "--split", "val", "--embedder", str(embedder)],
    ):
        result = installed.run(["hypersphere", "data", *words])
        assert result.returncode == 0, result.stderr
    assert (installed.folder / "cleaned/suspects.png").stat().st_size > 0
    assert installed.run(["hypersphere", "data", "verify", both]).returncode == 0


WITHOUT_EXTRAS = ("import", "verify", "merge", "split", "clean")
OF_A_STORE = {
    "stats": [],
    "verify": [],
    "backup": ["--out", "copy"],
    "restore": ["copy"],
    "export": ["--out", "copy"],
    "import": ["copy"],
}
ACCESS = {
    "keys create": ["door", "--scope", "read"],
    "keys list": [],
    "keys revoke": ["0123456789ab"],
    "keys rotate": ["0123456789ab"],
    "audit verify": ["--audit", "nothing"],
    "audit find": ["--audit", "nothing", "--subject", "alice"],
    "gallery migrate": ["--embedder", "nothing", "--out", "moved"],
    "gallery key": ["--out", "new.key"],
    "gallery rekey": ["new.key", "--encryption-key-file", "new.key"],
}
OTHERS = {
    "data check": ["set"],
    "data preview": [],
    "train": [],
    "submit": ["--address", "http://127.0.0.1:1"],
    "export": ["--run", "run"],
    "losses": [],
    "plot geometry": [],
    "plot gradients": [],
}


@pytest.mark.parametrize("words", OTHERS)
def test_every_other_command_names_the_extra_that_it_needs(installed: Installed, words: str) -> None:
    result = installed.run(["hypersphere", *words.split(), *OTHERS[words]])
    assert result.returncode == 2
    assert result.stdout == ""
    (sentence,) = result.stderr.strip().splitlines()
    assert re.fullmatch(
        r"error: this command needs '\w+', which is not installed: run pip install 'hypersphere\[trainer\]'", sentence
    )


@pytest.mark.parametrize("word", OF_A_STORE)
def test_a_gallery_is_looked_after(installed: Installed, word: str) -> None:
    result = installed.run(["hypersphere", "gallery", word, *OF_A_STORE[word], "--store", "nothing"])
    assert result.returncode == 2
    assert re.match(r"error: (there is no store '(nothing|copy)'|'copy' cannot be read as Parquet)", result.stderr)


def test_who_may_do_what_and_who_did(installed: Installed) -> None:
    for words, more in ACCESS.items():
        store = [] if words.startswith("audit") or words == "gallery key" else ["--store", "kept.db"]
        result = installed.run(["hypersphere", *words.split(), *more, *store])
        made = words in ("keys create", "keys list", "gallery key")
        assert result.returncode == (0 if made else 2), result.stderr
        assert made or re.match("error: (no key has the id|there is no|'nothing')", result.stderr), result.stderr


def test_no_command_is_left_out_above() -> None:
    def names(command: Any, above: str) -> list[str]:
        below = getattr(command, "commands", None)
        return [above.strip()] if below is None else [n for key, c in below.items() for n in names(c, f"{above} {key}")]

    assert sorted(names(typer.main.get_command(app), "")) == sorted(
        [
            "serve",
            "evaluate",
            "calibrate",
            *(f"data {word}" for word in WITHOUT_EXTRAS),
            *(f"gallery {word}" for word in OF_A_STORE),
            *ACCESS,
            *OTHERS,
        ]
    )
