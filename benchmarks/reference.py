"""What must not change when code is only moved: recorded through the command line, and compared to the last digit.

    python benchmarks/reference.py record before        # at one commit
    python benchmarks/reference.py record after         # at another, with PYTHONPATH naming its checkout
    python benchmarks/reference.py compare before after

`record OUT [SECTION.KEY=VALUE]...` imports Omniglot (`OMNIGLOT_ZIP`; glyphs where it is not set), trains the demo's
config for 200 steps, exports, evaluates, calibrates, serves, and keeps in OUT/reference.json: every number MLflow got
but times and memory, the embeddings of fixed images, both reports, and the answers to fixed requests. Identities that
are made anew (of models, runs, samples and requests) are left out.
"""

import argparse
import io
import json
import os
import socket
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(os.environ.get("PYTHONPATH", "").split(os.pathsep)[0] or Path(__file__).resolve().parent.parent)
STEPS = 200
PROBES = 12  # identities that the service is asked about; the last third is never enrolled
LEFT_OUT = {"samples_per_s", "memory_mb", "gpu_memory_mb", "model_id", "request_id", "sample_id", "created_at"}


def main() -> int:
    """Exit code 0: recorded, or both alike; 1: they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    recording = commands.add_parser("record")
    recording.add_argument("out", type=Path)
    recording.add_argument("overrides", nargs="*", help="of the training's config")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "record":
        record(arguments.out.resolve(), arguments.overrides)
        return 0
    before, after = (read(folder) for folder in (arguments.before, arguments.after))
    differences = list(compare(before, after))
    print("\n".join(differences[:40]) or f"all {len(before)} values are alike, to the last digit")
    return 1 if differences else 0


def record(out: Path, overrides: list[str]) -> None:
    """Every step of the main job in the new folder `out`."""
    out.mkdir(parents=True)
    data, run, embedder = out / "data", out / "run", out / "embedder"
    omniglot = ["omniglot", "--holdout-alphabets", "6"]
    kind = omniglot if os.environ.get("OMNIGLOT_ZIP") else ["glyphs", "--holdout-share", "0.2"]
    hypersphere(out, "data", "import", "--kind", *kind, "--out", str(data))
    tracking = f"tracking.uri=sqlite:///{out / 'mlflow.db'}"
    fixed = [f"data.path={data}", f"run.out={run}", tracking, f"run.max_steps={STEPS}", "run.log_every=1"]
    hypersphere(out, "train", "--config", str(ROOT / "configs/demo.yaml"), *fixed, *overrides)
    hypersphere(out, "export", "--run", str(run), "--out", str(embedder))
    both = ["--embedder", str(embedder), "--data", str(data)]
    hypersphere(out, "evaluate", *both, "--out", str(out / "evaluation"))
    hypersphere(out, "calibrate", *both, "--fpir", "0.1")
    report = json.loads((out / "evaluation" / "report.json").read_text())
    manifest = json.loads((embedder / "manifest.json").read_text())
    with service(out, embedder) as url:
        answers = ask(url, images(data))
    found = {
        "metrics": metrics(out / "mlflow.db"),
        "evaluation": report,
        "calibration": manifest["calibration"],
        "answers": answers,
    }
    (out / "reference.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(flat(found))} values are in {out / 'reference.json'}")


def hypersphere(folder: Path, *arguments: str) -> None:
    """One command of the command line of the checkout under test."""
    print("hypersphere", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "serving.cli", *arguments], cwd=folder, env=environment(), check=True)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def metrics(database: Path) -> dict[str, list[tuple[int, float]]]:
    """Each metric's values by step, as MLflow's store has them."""
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT key, step, value FROM metrics ORDER BY key, step").fetchall()
    found: dict[str, list[tuple[int, float]]] = {}
    for key, step, value in rows:
        found.setdefault(key, []).append((step, value))
    return found


def images(data: Path) -> list[tuple[bytes, bytes]]:
    """Two images of each of some held-out identities."""
    split = json.loads((data / "manifest.json").read_text())["splits"]["val"]
    of_class: dict[int, list[bytes]] = {}
    for shard in split["shards"]:
        with tarfile.open(data / shard["name"]) as tar:
            files = {member.name: file.read() for member in tar if (file := tar.extractfile(member))}
        for name in sorted(files):
            if name.endswith(".cls"):
                stem = name.removesuffix(".cls")
                picture = next(files[f"{stem}.{kind}"] for kind in ("png", "jpg") if f"{stem}.{kind}" in files)
                of_class.setdefault(int(files[name]), []).append(picture)
    return [(of_class[label][0], of_class[label][1]) for label in sorted(of_class)[:PROBES]]


def ask(url: str, pairs: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    """Embed, enrol, verify and identify; the answers."""
    known = pairs[: PROBES * 2 // 3]
    answers: dict[str, Any] = {"embed": [], "enrol": [], "verify": [], "identify": []}
    with httpx.Client(base_url=url, timeout=60) as client:
        for first, second in pairs:
            files = [("images", (f"{n}.png", io.BytesIO(image))) for n, image in enumerate((first, second))]
            answers["embed"].append(json_of(client.post("/v1/embed", files=files)))
        for number, (first, _) in enumerate(known):
            answers["enrol"].append(json_of(enrol(client, f"subject-{number}", first)))
        for number, (first, second) in enumerate(pairs):
            other = pairs[(number + 1) % len(pairs)][0]
            for reference in (first, other):
                both = {"probe": ("p.png", second), "reference": ("r.png", reference)}
                answers["verify"].append(json_of(client.post("/v1/verify", files=both)))
            probe = {"image": ("p.png", second)}
            answers["identify"].append(json_of(client.post("/v1/identify", files=probe, data={"top_k": "5"})))
    return answers


def enrol(client: httpx.Client, subject: str, image: bytes) -> httpx.Response:
    """By POST, or by PUT where the service knows no POST."""
    for method in ("POST", "PUT"):
        answer = client.request(method, f"/v1/subjects/{subject}/samples", files={"images": ("a.png", image)})
        if answer.status_code != 405:
            break
    return answer


def json_of(answer: httpx.Response) -> Any:
    if answer.is_error:
        sys.exit(f"{answer.request.method} {answer.request.url}: {answer.status_code} {answer.text}")
    return answer.json()


@contextmanager
def service(out: Path, embedder: Path) -> Iterator[str]:
    """The service on a free port, with a gallery of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["serve", "--embedder", str(embedder), "--store", str(out / "gallery.sqlite"), "--port", str(port)]
    with (out / "service.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.cli", *arguments], cwd=out, env=environment(), stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                if httpx.get(f"{url}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def read(folder: Path) -> dict[str, Any]:
    """What was recorded in a folder, by path."""
    return flat(json.loads((folder / "reference.json").read_text()))


def flat(tree: Any, at: str = "") -> dict[str, Any]:
    """Every leaf by its path, without what is new in every run."""
    if isinstance(tree, dict):
        parts = [(str(key), value) for key, value in tree.items() if key not in LEFT_OUT and not key.endswith("_ids")]
    elif isinstance(tree, list | tuple):
        parts = [(str(number), value) for number, value in enumerate(tree)]
    else:
        return {at: tree}
    return {path: leaf for key, value in parts for path, leaf in flat(value, f"{at}/{key}").items()}


def compare(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """One line for each leaf that is not in both, or is not the same in both."""
    for path in before.keys() | after.keys():
        if path not in after or path not in before:
            yield f"{path}: only {'before' if path in before else 'after'}"
        elif before[path] != after[path] and not (before[path] != before[path] and after[path] != after[path]):
            yield f"{path}: {before[path]!r}, then {after[path]!r}"


if __name__ == "__main__":
    sys.exit(main())
