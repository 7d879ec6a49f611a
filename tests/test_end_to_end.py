"""From images to an HTTP answer, with the commands that a user types and every component for real.

Omniglot where the archive is at hand (five small alphabets), glyphs otherwise.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.cli import main
from trainer.data.manifest import Manifest
from trainer.embedder import Embedder

pytestmark = [pytest.mark.timeout(580), pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).resolve().parent.parent
ALPHABETS = ("Futurama", "Early_Aramaic", "Braille", "Hebrew", "Greek", "Korean")
SETTINGS = [
    "backbone.name=convnet", "backbone.dimension=64", "backbone.width=16", "data.height=28", "data.width=28",
    "data.batch_size=128", "run.epochs=6", "run.max_steps=60", "run.log_every=5", "run.eval_every=3",
    "run.checkpoint_every=25", "run.collapse=true", "optimizer.lr=0.1", "head.optimizer.lr=1", "loss.scale=24",
    "loss.margin=0.2",
]  # fmt: skip


def hypersphere(*arguments: str, cwd: Path, expect: int = 0, **environment: str) -> str:
    """Run the command line; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "serving.cli", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def data(work: Path) -> Path:
    archive = Path(os.environ.get("OMNIGLOT_ZIP", ROOT.parent / "shared/data/omniglot/images_background.zip"))
    if not archive.is_file():
        hypersphere("data", "import", "--kind", "glyphs", "--holdout-share", "0.3", "--out", "data", cwd=work)
        return work / "data"
    with zipfile.ZipFile(archive) as whole:
        for name in whole.namelist():
            if any(f"/{alphabet}/" in name for alphabet in ALPHABETS):
                whole.extract(name, work / "images")
    source = str(work / "images" / "images_background")
    hypersphere("data", "import", source, "--kind", "omniglot", "--holdout-alphabets", "2", "--out", "data", cwd=work)
    return work / "data"


@pytest.fixture(scope="module")
def run(work: Path, data: Path) -> Path:
    text = hypersphere("train", f"data.path={data}", "run.out=run", *SETTINGS, cwd=work)
    assert re.search(r"step 60/60 +loss [\d.]+ +\d+ samples/s +\d+ MB", text), text
    assert re.search(r"step 60: rank-1 [\d.]+%.*, 9 other figures in run.json and MLflow\n", text), text
    assert "MLflow at" not in text
    return work / "run"


@pytest.fixture(scope="module")
def embedder(work: Path, data: Path, run: Path) -> Path:
    hypersphere("export", "--run", str(run), cwd=work)
    both = ["--embedder", str(run / "embedder"), "--data", str(data)]
    text = hypersphere("evaluate", *both, cwd=work)
    assert "rank-1" in text
    hypersphere("calibrate", *both, "--fpir", "0.05", "--fmr", "0.01", cwd=work)
    return run / "embedder"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def client(work: Path, embedder: Path) -> Iterator[httpx.Client]:
    port = free_port()
    with (work / "service.log").open("w") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "serving.cli",
                "serve",
                "-e",
                str(embedder),
                "--store",
                "g.sqlite",
                "--port",
                str(port),
            ],
            cwd=work,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            for _ in range(300):
                try:
                    if client.get("/readyz").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                assert process.poll() is None, (work / "service.log").read_text()
                time.sleep(0.1)
            yield client
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def held_out(data: Path) -> dict[str, list[bytes]]:
    """Images of the validation identities, from the shards."""
    val = Manifest.read(data).split("val")
    found: dict[str, list[bytes]] = {}
    for shard in val.shards:
        with tarfile.open(data / shard.name) as tar:
            files = {member.name: tar.extractfile(member) for member in tar}
            content = {name: file.read() for name, file in files.items() if file is not None}
        for name, label in content.items():
            if name.endswith(".cls"):
                found.setdefault(val.classes[int(label)], []).append(content[name.replace(".cls", ".png")])
    return found


def identify(client: httpx.Client, image: bytes) -> dict[str, Any]:
    data = {"below_threshold": "true"}
    return dict(client.post("/v1/identify", files={"image": ("p.png", image)}, data=data).json())


def test_identify_answers_over_http(client: httpx.Client, data: Path, embedder: Path) -> None:
    images = held_out(data)
    names = sorted(images)
    members, strangers = names[: len(names) // 2], names[len(names) // 2 :]
    for number, name in enumerate(members):
        put = client.post(f"/v1/subjects/s{number}/samples", files=[("images", ("a.png", images[name][0]))])
        assert put.status_code == 201, put.text
    nearest = 0
    for number, name in enumerate(members):
        answer: dict[str, Any] = client.post("/v1/identify", files={"image": ("p.png", images[name][0])}).json()
        assert answer["decision"] == "match"
        assert answer["candidates"][0]["subject_id"] == f"s{number}"
        assert answer["candidates"][0]["score"] == pytest.approx(1, abs=1e-4)
        probe = identify(client, images[name][1])
        nearest += probe["candidates"][0]["subject_id"] == f"s{number}"
    assert nearest >= 5, f"{nearest} of {len(members)} characters found; chance finds 1"
    unknown = 0
    for name in strangers:
        answer = identify(client, images[name][0])
        assert (answer["candidates"][0]["score"] >= answer["threshold"]) == (answer["decision"] == "match")
        assert answer["gallery_size"] == len(members)
        assert answer["fpir_target"] == 0.05
        assert answer["model_id"] == Embedder.open(embedder).model_id
        unknown += answer["decision"] == "unknown"
    assert unknown >= 0.7 * len(strangers)
    verified = client.post(
        "/v1/verify", files={"probe": ("a.png", images[names[0]][0]), "reference": ("b.png", images[names[0]][0])}
    ).json()
    assert verified["decision"] == "match"
    assert client.delete("/v1/subjects/s0").status_code == 204
    gone = identify(client, images[names[0]][0])
    assert all(candidate["subject_id"] != "s0" for candidate in gone["candidates"])


def test_the_run_is_in_mlflow(work: Path, run: Path, embedder: Path) -> None:
    from mlflow import MlflowClient

    noted = json.loads((run / "run.json").read_text())
    client = MlflowClient(noted["tracking_uri"], noted["tracking_uri"])
    found = client.get_run(noted["mlflow_run_id"])
    assert found.info.status == "FINISHED"
    assert found.data.params["loss.name"] == "arcface"
    for metric in ("loss", "learning_rate", "samples_per_s", "val/rank1", "evaluation/rank1"):
        assert client.get_metric_history(noted["mlflow_run_id"], metric), metric
    paths = {item.path for item in client.list_artifacts(noted["mlflow_run_id"], "evaluation")}
    assert any(path.endswith(".png") for path in paths)
    assert "neural_collapse.png" in {item.path for item in client.list_artifacts(noted["mlflow_run_id"])}
    assert [one["step"] for one in noted["evaluations"]][-1] == 60
    champion = client.get_model_version_by_alias("hypersphere-embedder", "champion")
    assert champion.tags["model_id"] == Embedder.open(embedder).model_id


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cwd: Path, *arguments: str) -> str:
    """What a command says that ends with exit code 2, run in this process: most of its time would go into imports."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["hypersphere", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_what_training_refuses(
    work: Path, data: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        return refused(monkeypatch, capsys, work, *arguments)

    text = said("train", f"data.path={data}", "run.out=run", *SETTINGS)
    assert "holds the checkpoints of an earlier run" in text
    assert "--resume" in text
    assert "nowhere" in said("train", "data.path=nowhere")
    gpus = ["scaling.workers=64", "data.batch_size=64", "scaling.use_gpu=true"]
    assert "GPU" in said("train", f"data.path={data}", "run.out=r2", *gpus)
    assert "holds no checkpoint" in said("export", "--run", "nowhere")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray cluster of one node with its dashboard; its address, and the environment that its clients need."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text("a-token-for-the-tests-of-hypersphere-0123456789")
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PYTHONPATH": str(ROOT)}
    gcs, dashboard = free_port(), free_port()
    ray = str(Path(sys.executable).with_name("ray"))
    start = [ray, "start", "--head", "--num-cpus=3", "--include-dashboard=true", "--disable-usage-stats"]
    ports = [f"--port={gcs}", f"--dashboard-port={dashboard}"]
    subprocess.run([*start, *ports], env=os.environ | environment, check=True, capture_output=True, timeout=120)
    yield f"http://127.0.0.1:{dashboard}", environment
    subprocess.run([ray, "stop", "--force"], env=os.environ | environment, check=True, capture_output=True, timeout=60)


def test_submit_sends_the_job_and_returns_its_status(
    cluster: tuple[str, dict[str, str]], work: Path, data: Path
) -> None:
    address, environment = cluster
    command = str(Path(sys.executable).with_name("hypersphere"))
    common = ["submit", "--address", address, "--command", command]
    short = [f"data.path={data}", *SETTINGS, "run.max_steps=3", "run.eval_every=0", "tracking.enabled=false"]
    text = hypersphere(*common, "run.out=jobs/good", *short, cwd=work, **environment)
    assert "step 3/3" in text
    assert "job SUCCEEDED" in text
    assert (work / "jobs/good/checkpoints/step-00000003").is_dir()
    text = hypersphere(*common, "run.out=jobs/bad", *short, "data.path=/nowhere", cwd=work, expect=1, **environment)
    assert "/nowhere" in text
    assert "job FAILED" in text


def test_submit_to_nowhere_is_one_sentence(
    work: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    text = refused(monkeypatch, capsys, work, "submit", "--address", address, f"data.path={data}")
    assert address in text
    assert "Traceback" not in text
