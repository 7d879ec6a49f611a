"""MLflow: the only door to it.

Each entry of the outbox is one kind of call. MLflow is imported at the first of them.
"""

import logging
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.outbox import Entry, Outbox

_KEY = "hypersphere.key"  # tag by which a run is found whose creation was not answered
_METRICS, _PARAMS = 1000, 100  # that MLflow takes at once
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS",
             "INVALID_STATE", "NOT_IMPLEMENTED")  # fmt: skip


class Sender:
    """Gives entries to MLflow.

    Args:
        uri, experiment, model_name: where to, and under which names.
        outbox: where the identity of the run is noted.
        on_run: called with it.
    """

    def __init__(
        self, uri: str, experiment: str, model_name: str, outbox: Outbox, on_run: Callable[[str], None] | None
    ) -> None:
        self._uri, self._experiment, self._model_name = uri, experiment, model_name
        self._outbox, self._on_run = outbox, on_run
        self._made: Any = None
        self.found = False  # whether this process knows that its run exists
        self._last: dict[str, int] = {}  # step of each number that was sent or is there
        # For a run that another process began: numbers of later steps are sent in any case.
        self._news_after: float | None = math.inf if outbox.state.run_id else None
        self._senders: dict[str, Callable[[Entry], None]] = {
            "run": self._run, "params": self._params, "text": self._text, "artifact": self._artifact,
            "register": self._register, "status": self._status, "back": self._back,
        }  # fmt: skip

    @property
    def _client(self) -> Any:
        if self._made is None:
            self._made = _client(self._uri)
        return self._made

    @property
    def _run_id(self) -> str:
        return self._outbox.state.run_id

    def answers(self) -> bool:
        """Whether MLflow knows the run, and says so."""
        try:
            self._client.get_run(self._run_id)
        except Exception:  # noqa: BLE001  any trouble is no answer
            return False
        return True

    def send(self, entries: list[Entry]) -> int:
        """Send the first entries, as many as go into one call; how many those were. Sending them again is harmless."""
        if entries[0]["kind"] != "metrics":
            self._senders[entries[0]["kind"]](entries[0])
            return 1
        from mlflow.entities import Metric

        metrics: list[Any] = []
        count, last = 0, dict(self._last)
        for entry in entries:
            if entry["kind"] != "metrics" or (metrics and len(metrics) + len(entry["values"]) > _METRICS):
                break
            for key, value in entry["values"].items():
                if key not in last:
                    last[key] = self._known(key)
                if entry["step"] > last[key]:  # a run that goes on from a checkpoint does some steps again
                    metrics.append(Metric(key, value, entry["time_ms"], entry["step"]))
                    last[key] = entry["step"]
            count += 1
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics)
        self._last = last
        return count

    def _known(self, key: str) -> int:
        """The last step of which MLflow has this number; of a run that this process began it has none."""
        if self._news_after is None:
            return -1
        there = self._client.get_metric_history(self._run_id, key)
        return int(min(self._news_after, max((one.step for one in there), default=-1)))

    def _back(self, entry: Entry) -> None:
        step = entry["step"]
        self._last = {key: min(last, step) for key, last in self._last.items()}
        if self._news_after is not None:
            self._news_after = min(self._news_after, step)

    def _run(self, entry: Entry) -> None:
        known = "" if entry["run_id"] is None else entry["run_id"] or self._run_id
        self._last, self._news_after = {}, math.inf
        if known and self._is_active(known):
            self._client.update_run(known, status="RUNNING")
        else:
            experiment = _experiment(self._client, self._uri, self._experiment)
            made = self._client.search_runs([experiment], f"tags.`{_KEY}` = '{entry['key']}'", max_results=1)
            tags = entry["tags"] | {_KEY: entry["key"]}
            run = made[0] if made else self._client.create_run(
                experiment, start_time=entry["time_ms"], run_name=entry["name"], tags=tags
            )  # fmt: skip
            known = run.info.run_id
            self._news_after = None
        self._outbox.note(run_id=known)
        if self._on_run is not None:
            self._on_run(known)
        self.found = True

    def _is_active(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if refused(error):
                return False
            raise

    def _params(self, entry: Entry) -> None:
        from mlflow.entities import Param, RunTag

        data = self._client.get_run(self._run_id).data
        fresh = [Param(key, value) for key, value in entry["values"].items() if key not in data.params]
        for first in range(0, len(fresh), _PARAMS):
            self._client.log_batch(self._run_id, params=fresh[first : first + _PARAMS])
        tags = []
        for key, value in entry["values"].items():
            course = data.tags.get(f"changed.{key}", data.params.get(key, value))
            if course != value and not course.endswith(f" -> {value}"):
                tags.append(RunTag(f"changed.{key}", f"{course} -> {value}"[-5000:]))
        if tags and self._news_after is not None:
            self._news_after = -1  # with another config all numbers are news
        for first in range(0, len(tags), _PARAMS):
            self._client.log_batch(self._run_id, tags=tags[first : first + _PARAMS])

    def _text(self, entry: Entry) -> None:
        self._client.log_text(self._run_id, entry["text"], entry["name"])

    def _artifact(self, entry: Entry) -> None:
        store = self._client.log_artifacts if Path(entry["path"]).is_dir() else self._client.log_artifact
        store(self._run_id, entry["path"], entry["folder"])

    def _register(self, entry: Entry) -> None:
        from mlflow.exceptions import MlflowException

        client, name = self._client, self._model_name
        client.log_artifacts(self._run_id, entry["path"], "embedder")
        with suppress(MlflowException):  # it is there already; where it is not, the next call says why
            client.create_registered_model(name, description="Embedders of Hypersphere: image to unit vector")
        source = f"{client.get_run(self._run_id).info.artifact_uri}/embedder"
        tags = {"model_id": entry["model_id"]}
        there = [one for one in client.search_model_versions(f"run_id='{self._run_id}'") if one.tags == tags]
        version = there[0] if there else client.create_model_version(name, source, self._run_id, tags=tags)
        client.set_registered_model_alias(name, "champion", version.version)

    def _status(self, entry: Entry) -> None:
        if "unless_ended" in entry and self._client.get_run(self._run_id).info.status != "RUNNING":
            return
        self._client.set_terminated(self._run_id, entry["status"], entry["time_ms"])


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def refused(error: Exception) -> bool:
    """Whether asking again is useless, as it is not with a server, a network or a database that is away or busy."""
    return isinstance(error, FileNotFoundError | KeyError) or getattr(error, "error_code", None) in _REFUSALS


def _client(uri: str) -> Any:
    # MLflow reads these when it is imported. Its own patience with a dead server is several minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # a new store's tables are no news
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _experiment(client: Any, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    # Beside the database, wherever the run was started from; a server chooses its own place.
    location = None
    if uri.startswith("sqlite:////"):
        location = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
    return str(client.create_experiment(name, artifact_location=location))
