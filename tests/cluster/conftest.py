"""A cluster of machines that share nothing: Ray's head and two workers, a client, and a store with S3 and MLflow."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.cluster.machines import Machine, Site, cannot, within

LONG = os.environ.get("CLUSTER") == "long"
_UP_S = 900  # for Ray or MLflow to start, on a machine that has other work, too
_STARTED = "Ray runtime started"
TOKEN = "0123456789abcdef" * 4
SECRET = "s3cr3t-of-the-bucket"


@dataclass
class Cluster:
    """Its machines, and what a user of it has in the environment."""

    site: Site
    head: Machine
    workers: list[Machine]
    client: Machine
    store: Machine

    @property
    def token(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}

    @property
    def credentials(self) -> dict[str, str]:
        """Of the bucket: the client has them, the nodes of the cluster have not."""
        return {
            "AWS_ENDPOINT_URL": f"http://{self.store.address}:9000", "AWS_ACCESS_KEY_ID": "annie",
            "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip

    @property
    def mlflow(self) -> str:
        return f"http://{self.store.address}:5000"

    def user(self, *words: str, **more: str) -> str:
        """Run a program on the client; what it printed."""
        return self.client.run(words, self.token | self.credentials | more)

    def hypersphere(self, *words: str) -> str:
        """Run a command on the client; what it printed."""
        return self.user("hypersphere", *words)

    def join(self, name: str) -> Machine:
        """A new worker, with room for one rank."""
        machine = self.site.machine(name)
        _ray(machine, self.token, f"--address={self.head.address}:6379", "--num-cpus=1")
        return machine


def _ray(machine: Machine, environment: dict[str, str], *options: str) -> None:
    """Start Ray's processes of a machine, and again whenever they end, as a supervisor of services does."""
    words = ["ray", "start", f"--node-ip-address={machine.address}", "--object-store-memory=80000000", "--block"]
    # Ray would count the memory that all machines and all else here use together, and end workers.
    environment = environment | {"RAY_memory_monitor_refresh_ms": "0", "RAY_worker_niceness": "0"}
    machine.start(["bash", "-c", 'while true; do "$@"; sleep 1; done', "again", *words, *options], environment)


def _answers(machine: Machine, port: int) -> bool:
    words = ["bash", "-c", f"exec 3<>/dev/tcp/{machine.address}/{port}"]
    return machine.start(words).wait() == 0


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The machines, up; they are gone after the tests, however these end."""
    if (reason := cannot()) is not None:
        pytest.skip(reason)
    site = Site(tmp_path_factory.mktemp("cluster"))
    try:
        head, store, client = (site.machine(name) for name in ("head", "store", "client"))
        made = Cluster(site, head, [], client, store)
        # One after the other: Ray gives up on a node that takes 30 s to start.
        _ray(head, made.token, "--head", "--port=6379", "--num-cpus=0", "--dashboard-host=0.0.0.0")
        within(_UP_S, lambda: _STARTED in head.log.read_text() and _answers(head, 8265), "Ray's head starts")
        for name in ("one", "two"):
            made.workers.append(made.join(name))
            within(_UP_S, lambda: _STARTED in made.workers[-1].log.read_text(), "a worker joins")
        store.start(["moto_server", "-H", "0.0.0.0", "-p", "9000"])
        mlflow = "mlflow server --host 0.0.0.0 --port 5000 --workers 1 --allowed-hosts *"
        places = "--backend-store-uri sqlite:////root/mlflow.db --artifacts-destination /root/artifacts"
        store.start([*mlflow.split(), *places.split()], {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
        within(_UP_S, lambda: _answers(store, 5000) and _answers(store, 9000), "the store answers")
        yield made
    finally:
        site.close()
