"""The main job, from images to an answer over HTTP, with the commands that a user would type.

Run it with `make demo`. Everything it writes lies in the folder `demo/`.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from serving.client import Client
from serving.wire.schemas import IdentifyAnswer

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
DATA, RUN, EMBEDDER, STORE = DEMO / "data", DEMO / "run", DEMO / "embedder", DEMO / "gallery.sqlite"
SHARED_COPY = ROOT.parent / "shared" / "data" / "omniglot" / "images_background.zip"
HELD_OUT_ALPHABETS = 6
STRANGERS = 20  # identities of the validation split that are not enrolled
FPIR = 0.1  # what is allowed to the threshold
TURNS = "same,turn90,turn180,turn-90"  # each is another character to the network: four opinions on each image
SHOWN = 5  # of each kind, in the table of answers

console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)


def main() -> int:
    """Run every step; the exit code is 0 when all of them, and the answers' format, were right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the service running")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="for the training, e.g. run.epochs=2")
    arguments = parser.parse_args()
    keep = arguments.keep
    started = time.monotonic()
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir()
    step("1/7 images to WebDataset shards", *import_command())
    overrides = [f"data.path={DATA}", f"run.out={RUN}", f"tracking.uri=sqlite:///{DEMO / 'mlflow.db'}"]
    step(
        "2/7 train: Ray, DeepSpeed, sharded ArcFace",
        "train",
        "--config",
        str(ROOT / "configs/demo.yaml"),
        *overrides,
        *arguments.overrides,
    )
    views = ["--views", TURNS, "--join", "concatenate"]
    step("3/7 export to ONNX, register in MLflow", "export", "--run", str(RUN), "--out", str(EMBEDDER), *views)
    both = ["--embedder", str(EMBEDDER), "--data", str(DATA)]
    step("4/7 evaluate on alphabets never seen", "evaluate", *both)
    target = ["--fpir", str(FPIR), "--gallery-size", str(split()["identities"] - STRANGERS)]
    step(f"5/7 calibrate: {FPIR:.0%} of strangers' searches may return somebody", "calibrate", *both, *target)
    console.rule("6/7 serve", align="left")
    with service(keep) as url:
        console.rule("7/7 enrol, then ask over HTTP", align="left")
        enrol_and_ask(url)
        closing(url, keep, time.monotonic() - started)
    return 0


def import_command() -> list[str]:
    """Omniglot where it can be had, glyphs otherwise; says which."""
    common = ["--out", str(DATA)]
    omniglot = ["data", "import", "--kind", "omniglot", "--holdout-alphabets", str(HELD_OUT_ALPHABETS), *common]
    if os.environ.get("OMNIGLOT_ZIP"):
        console.print(f"data: Omniglot, from OMNIGLOT_ZIP={os.environ['OMNIGLOT_ZIP']}", highlight=False)
        return omniglot
    if SHARED_COPY.is_file():
        console.print(f"data: Omniglot, from {SHARED_COPY}", highlight=False)
        return [*omniglot, str(SHARED_COPY)]
    if hypersphere(*omniglot, quiet=True) == 0:
        console.print("data: Omniglot, downloaded")
        return [*omniglot, "--overwrite"]
    console.print("data: Omniglot could not be downloaded; glyphs rendered from fonts instead")
    return ["data", "import", "--kind", "glyphs", "--holdout-share", "0.2", *common]


def split() -> dict[str, Any]:
    """The validation split as the manifest describes it."""
    manifest = json.loads((DATA / "manifest.json").read_text())
    return dict(manifest["splits"]["val"])


def hypersphere(*arguments: str, quiet: bool = False) -> int:
    """Run one command of the command line; its exit code."""
    command = [sys.executable, "-m", "serving.cli", *arguments]
    return subprocess.run(command, cwd=DEMO, stderr=subprocess.DEVNULL if quiet else None, check=False).returncode


def step(title: str, *arguments: str) -> None:
    """Run one command under a heading; stop the demo if it fails."""
    console.rule(title, align="left")
    console.print(f"$ hypersphere {' '.join(arguments)}", style="dim", highlight=False)
    started = time.monotonic()
    code = hypersphere(*arguments)
    if code:
        console.print(f"'hypersphere {arguments[0]}' failed with exit code {code}; the demo stops here", style="red")
        sys.exit(code)
    console.print(f"{time.monotonic() - started:.0f} s", style="dim")


@contextmanager
def service(keep: bool) -> Iterator[str]:
    """The service on a free port; stopped at the end unless it is to be kept."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["serve", "--embedder", str(EMBEDDER), "--store", str(STORE), "--port", str(port)]
    console.print(f"$ hypersphere {' '.join(arguments)}", style="dim", highlight=False)
    url = f"http://127.0.0.1:{port}"
    with (DEMO / "service.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.cli", *arguments],
            cwd=DEMO, stdout=log, stderr=subprocess.STDOUT, start_new_session=keep,
        )  # fmt: skip
    ready = False
    try:
        wait_until_ready(url, process)
        ready = True
        yield url
    finally:
        if not (keep and ready):
            process.terminate()
            process.wait(30)


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    """Return when /readyz says so."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    sys.exit(f"the service did not start; its log:\n{(DEMO / 'service.log').read_text()}")


def held_out_images() -> dict[str, list[bytes]]:
    """The images of each held-out identity, read back from the shards."""
    val = split()
    images: dict[str, list[bytes]] = defaultdict(list)
    for shard in val["shards"]:
        with tarfile.open(DATA / shard["name"]) as tar:
            parts: dict[str, dict[str, bytes]] = defaultdict(dict)
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                parts[key][extension] = file.read() if file else b""
        for part in parts.values():
            image = part.get("png") or part["jpg"]
            images[json.loads(part["json"])["identity"]].append(image)
    return dict(images)


def enrol_and_ask(url: str) -> None:
    """Enrol one image of most held-out identities, then identify others of them, and of identities never enrolled."""
    images = held_out_images()
    names = sorted(images)
    stride = max(1, len(names) // STRANGERS)
    strangers = set(names[::stride][:STRANGERS])
    members = [name for name in names if name not in strangers]
    with Client(url) as client:
        for name in members:
            client.enrol(subject(name), images=[images[name][0]])
        console.print(f"enrolled {len(members)} identities with one image each; {len(strangers)} stay strangers")
        asked = [(name, identify(client, images[name][1])) for name in members]
        asked += [(name, identify(client, images[name][1])) for name in sorted(strangers)]
    show(asked, strangers)


def subject(name: str) -> str:
    """An identity's name as a subject id, which may hold no slash."""
    return name.replace("/", ".")


def identify(client: Client, image: bytes) -> IdentifyAnswer:
    """Who is this, or is it nobody we know?"""
    return client.identify(image=image, top_k=1, below_threshold=True)


def show(asked: list[tuple[str, IdentifyAnswer]], strangers: set[str]) -> None:
    """The table of answers: a few of each kind, and the rates over all."""
    table = Table("probe", "is", "nearest", "score", "decision", "right")
    for column in (table.columns[0], table.columns[2]):
        column.overflow = "fold"
    right = {True: 0, False: 0}
    shown = {True: 0, False: 0}
    for name, answer in asked:
        stranger, best = name in strangers, answer.candidates[0]
        found = answer.decision == "match"
        correct = (not found) if stranger else (found and best.subject_id == subject(name))
        right[stranger] += correct
        shown[stranger] += 1
        if shown[stranger] <= SHOWN:
            kind = "never enrolled" if stranger else "enrolled"
            mark = "[green]yes[/]" if correct else "[red]no[/]"
            table.add_row(name, kind, best.subject_id, f"{best.score:.3f}", answer.decision, mark)
    console.print(table)
    first = asked[0][1]
    console.print(f"threshold {first.threshold:.4f}: {first.threshold_source}", highlight=False)
    console.print(f"enrolled, and found as themselves: {right[False]} of {shown[False]}")
    console.print(f"strangers, and called unknown:     {right[True]} of {shown[True]}")


def closing(url: str, keep: bool, seconds: float) -> None:
    """Where to look further."""
    console.rule(f"done in {seconds:.0f} s", align="left")
    mlflow = Path(sys.executable).with_name("mlflow")
    console.print(f"experiments  {mlflow} ui --backend-store-uri sqlite:///{DEMO / 'mlflow.db'}", highlight=False)
    console.print(f"plots        {EMBEDDER / 'evaluation'}, {RUN / 'neural_collapse.png'}", highlight=False)
    if keep:
        console.print(f"API          {url}/docs (stop the service with: pkill -f {STORE})", highlight=False)
    else:
        console.print("API          make demo KEEP=1 leaves the service running and prints the URL of its docs")


if __name__ == "__main__":
    sys.exit(main())
