"""From a client's command to an Embedder on machines that share nothing but a bucket and an MLflow server.

The faults take minutes: CLUSTER=long, or `make test-cluster`.
"""

import json
import re
import subprocess
import time

import pytest

from tests.cluster.conftest import LONG, SECRET, Cluster
from tests.cluster.machines import within

pytestmark = [pytest.mark.timeout(3000)]

STEPS, EVERY = (400, 50) if LONG else (30, 10)
CONFIG = f"""
data: {{path: s3://data/set, height: 24, width: 24, batch_size: 32}}
backbone: {{name: convnet, dimension: 32, width: 8}}
optimizer: {{lr: 0.02}}
run: {{epochs: 1000, max_steps: {STEPS}, checkpoint_every: {EVERY}, log_every: 1, eval_every: 0}}
"""
_PUT = """
import sys, fsspec
from pathlib import Path
from tests.ranks import folder_of_shapes
from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import
run_import("folder", folder_of_shapes(Path("shapes"), 9, 20), "set", ImportOptions(holdout_share=0.34))
Path("config.yaml").write_text(sys.argv[1])
files = fsspec.filesystem("s3")
for name in ("data", "runs"):
    files.mkdir(name)
files.put("set/", "s3://data/set/", recursive=True)
"""
_LOSSES = """
import json, sys, urllib.request
def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    url, kind = sys.argv[1] + "/api/2.0/mlflow/" + path, {"Content-Type": "application/json"}
    return json.load(urllib.request.urlopen(urllib.request.Request(url, data, kind)))
found = ask("experiments/get-by-name?experiment_name=" + sys.argv[2])["experiment"]["experiment_id"]
runs = ask("runs/search", {"experiment_ids": [found]})["runs"]
assert len(runs) == 1, runs
history = ask(f"metrics/get-history?run_id={runs[0]['info']['run_id']}&metric_key=loss&max_results=25000")["metrics"]
print(json.dumps([runs[0]["info"]["status"], [[one["step"], one["value"]] for one in history]]))
"""


@pytest.fixture(scope="session")
def filled(cluster: Cluster) -> Cluster:
    """The cluster, with a data set in the bucket."""
    cluster.user("python", "-c", _PUT, CONFIG)
    return cluster


def submission(cluster: Cluster, name: str) -> list[str]:
    words = ["hypersphere", "submit", "--address", f"http://{cluster.head.address}:8265", "--config", "config.yaml"]
    for variable in cluster.credentials:
        words += ["--env", variable]
    return [*words, f"run.out=s3://runs/{name}", f"tracking.uri={cluster.mlflow}", f"tracking.experiment={name}"]


def losses(cluster: Cluster, name: str) -> dict[int, float]:
    """What MLflow has of the only run of an experiment, which is to have ended well, with each step once."""
    status, history = json.loads(cluster.user("python", "-c", _LOSSES, cluster.mlflow, name))
    assert status == "FINISHED"
    assert [step for step, _ in history] == list(range(1, STEPS + 1))
    return dict(history)


@pytest.fixture(scope="session")
def undisturbed(filled: Cluster) -> dict[int, float]:
    """The losses of a run without faults."""
    printed = filled.user(*submission(filled, "undisturbed"))
    assert "job SUCCEEDED" in printed
    assert SECRET not in printed
    return losses(filled, "undisturbed")


def test_a_run_from_a_bucket_into_a_bucket_ends_as_an_embedder(filled: Cluster, undisturbed: dict[int, float]) -> None:
    assert undisturbed[STEPS] < undisturbed[1]
    filled.hypersphere("export", "--run", "s3://runs/undisturbed", "--out", "embedder")
    told = filled.hypersphere("evaluate", "--embedder", "embedder", "--data", "s3://data/set", "--out", "report")
    assert "rank-1" in told
    # Hypersphere writes the secret nowhere. Ray logs a job's variables in one place, which docs/deployment.md names.
    for machine in (filled.head, *filled.workers):
        places = machine.run(["bash", "-c", f"grep -rlF '{SECRET}' /tmp /root || true"]).splitlines()
        assert [place for place in places if not place.endswith("/logs/runtime_env_agent.log")] == []


def training(cluster: Cluster, name: str) -> subprocess.Popen[bytes]:
    """Submit a run, and return when it is in the middle of an epoch, far from a checkpoint."""
    cluster.client.log.write_text("")
    job = cluster.client.start(submission(cluster, name), cluster.token | cluster.credentials)

    def far() -> bool:
        steps = re.findall(rf"step (\d+)/{STEPS}\b", cluster.client.log.read_text())
        return job.poll() is not None or any(int(step) >= 3 * STEPS // 10 for step in steps)

    within(900, far, "the run has begun")
    assert job.poll() is None, f"it ended too early: {cluster.client.log.read_text()}"
    return job


def ends_like(undisturbed: dict[int, float], cluster: Cluster, name: str, job: subprocess.Popen[bytes]) -> None:
    assert job.wait(1200) == 0, cluster.client.log.read_text()
    assert losses(cluster, name) == pytest.approx(undisturbed, rel=1e-4)


@pytest.mark.skipif(not LONG, reason="minutes; CLUSTER=long or `make test-cluster` runs it")
def test_a_node_that_is_killed_is_replaced_and_the_losses_are_the_same(
    filled: Cluster, undisturbed: dict[int, float]
) -> None:
    job = training(filled, "killed")
    filled.workers.pop().kill()
    filled.workers.append(filled.join("three"))
    ends_like(undisturbed, filled, "killed", job)


@pytest.mark.skipif(not LONG, reason="minutes; CLUSTER=long or `make test-cluster` runs it")
def test_a_node_that_is_cut_off_for_20_s_comes_back_or_is_replaced(
    filled: Cluster, undisturbed: dict[int, float]
) -> None:
    job = training(filled, "cut")
    filled.workers[0].unplug()
    time.sleep(20)
    filled.workers[0].plug()
    ends_like(undisturbed, filled, "cut", job)
