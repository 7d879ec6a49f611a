"""MLflow: the only door to it.

Everything goes through one background thread, so that a slow or absent server never holds up a training step. A server
that cannot be reached is reported once; the run goes on without it.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from trainer.strict import Strict

_PATIENCE_S = 60
Status = Literal["FINISHED", "FAILED", "KILLED"]


class TrackingConfig(Strict):
    """Where to, and under which names."""

    uri: str = "sqlite:///mlflow.db"
    experiment: str = "hypersphere"
    run_name: str | None = None
    model_name: str = Field("hypersphere-embedder", description="registered model, of which export makes a champion")
    enabled: bool = True


def absolute_uri(uri: str, base: Path) -> str:
    """A tracking URI that means the same from every working directory."""
    for scheme in ("sqlite:///", "file:"):
        if uri.startswith(scheme) and not uri.startswith(scheme + "/"):
            return scheme + str((base / uri.removeprefix(scheme)).resolve())
    return uri


class Tracker:
    """One MLflow run, written in the background.

    After `start`, MLflow is imported and called when there is something to write beside the config: its import costs
    seconds of a core, which the start-up of the workers needs more.

    Args:
        config: where to, and under which names; `enabled: false` makes every call do nothing.
        on_trouble: called with one sentence when MLflow cannot be used.
        run_id: an existing run to add to; None: a new one is made by `start`.
    """

    def __init__(self, config: TrackingConfig, on_trouble: Callable[[str], None], run_id: str | None = None) -> None:
        self._config, self._on_trouble, self._run_id = config, on_trouble, run_id
        self._client: Any = None
        self._broken = not config.enabled
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue()  # None: the end
        self._ready, self._wanted = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def start(self, tree: Mapping[str, Any], text: str, tags: Mapping[str, str]) -> None:
        """Make the run (or go on with the one named), with the config's tree as parameters and its text as a file."""
        now_ms = int(time.time() * 1000)

        def call() -> None:
            from mlflow.entities import Param

            if self._run_id is None:
                experiment, name = _experiment(self._client, self._config), self._config.run_name
                run = self._client.create_run(experiment, start_time=now_ms, run_name=name, tags=dict(tags))
                self._run_id = run.info.run_id
            else:
                self._client.update_run(self._run_id, status="RUNNING")
            self._ready.set()
            params = [Param(key, str(value)[:6000]) for key, value in _flatten(tree).items()]
            self._client.log_batch(self._run_id, params=params)
            self._client.log_text(self._run_id, text, "config.yaml")

        self._calls.put(call)

    def run_id(self) -> str | None:
        """Identity of the run, once MLflow has answered; None where it has not."""
        self._wanted.set()
        self._ready.wait(_PATIENCE_S)
        return self._run_id

    def metrics(self, values: Mapping[str, float], step: int, time_ms: int) -> None:
        """Record numbers of one step."""

        def call() -> None:
            from mlflow.entities import Metric

            metrics = [Metric(key, value, time_ms, step) for key, value in values.items()]
            self._client.log_batch(self._run_id, metrics=metrics)

        self._put(call)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file, or a folder with all it holds."""

        def call() -> None:
            store = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            store(self._run_id, str(path), folder)

        self._put(call)

    def register(self, embedder: Path, model_id: str) -> None:
        """Store an Embedder with the run, register it as a model version, and give that the alias `champion`."""

        def call() -> None:
            from mlflow.exceptions import MlflowException

            client, name = self._client, self._config.model_name
            client.log_artifacts(self._run_id, str(embedder), "embedder")
            try:
                client.get_registered_model(name)
            except MlflowException:
                client.create_registered_model(name, description="Embedders of Hypersphere: image to unit vector")
            source = f"{client.get_run(self._run_id).info.artifact_uri}/embedder"
            version = client.create_model_version(name, source, self._run_id, tags={"model_id": model_id})
            client.set_registered_model_alias(name, "champion", version.version)

        self._put(call)

    def close(self, status: Status | None = None) -> None:
        """Write what is queued and end the run; None leaves the run's status as it is."""
        if status is not None:
            self._put(lambda: self._client.set_terminated(self._run_id, status))
        self._put(None)
        self._thread.join(_PATIENCE_S)
        if self._thread.is_alive():
            self._trouble(f"it did not take the last records within {_PATIENCE_S} s")

    def _put(self, call: Callable[[], None] | None) -> None:
        self._calls.put(call)
        self._wanted.set()

    def _work(self) -> None:
        self._wanted.wait()
        while (call := self._calls.get()) is not None:
            if self._broken:
                self._ready.set()
                continue
            try:
                if self._client is None:
                    self._client = _client(self._config.uri)
                call()
            except Exception as error:  # noqa: BLE001  whatever MLflow, its database or the network raises, training goes on
                self._trouble(str(error).splitlines()[0] if str(error) else type(error).__name__)

    def _trouble(self, reason: str) -> None:
        self._broken = True
        self._ready.set()
        self._on_trouble(f"MLflow at '{self._config.uri}' cannot be used: {reason}; going on without tracking")


def _client(uri: str) -> Any:
    # MLflow reads these when it is imported. Its own patience with a dead server is several minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # a new store's tables are no news
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _experiment(client: Any, config: TrackingConfig) -> str:
    found = client.get_experiment_by_name(config.experiment)
    if found is not None:
        return str(found.experiment_id)
    # Beside the database, wherever the run was started from; a server chooses its own place.
    location = None
    if config.uri.startswith("sqlite:////"):
        location = (Path(config.uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
    return str(client.create_experiment(config.experiment, artifact_location=location))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat
