"""Tracking of a run in MLflow, as far as MLflow is there.

What is recorded goes into an outbox, and from there in a background thread to MLflow: a slow or absent server never
holds up a training step, and gets later what it missed. With a folder, the outbox outlives the process; a guard process
sends the rest of it, should this one be killed, so that no run stays RUNNING.
"""

import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from trainer.guard import Guard
from trainer.outbox import Entry, Outbox, queue_inode
from trainer.sender import Sender, first_line, refused
from trainer.strict import Strict

_PATIENCE_S = 30  # that the end of a command waits for MLflow
_GUARD_PATIENCE_S = 600
_LONGEST_PAUSE_S = 15  # between two tries
_TRIES = 5  # of one entry that fails while MLflow answers otherwise
_BATCH = 500  # entries at once
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


def public_uri(uri: str) -> str:
    """A tracking URI without user and password."""
    return re.sub(r"//[^/@]*@", "//", uri)


class Tracker:
    """One MLflow run, written in the background.

    After `start`, MLflow is imported and called when `wake` is called or there is something to write beside the config:
    its import costs seconds of a core, which the start-up of the workers needs more.

    Args:
        config: where to, and under which names; `enabled: false` makes every call do nothing.
        on_trouble: called with one sentence when MLflow cannot be used, and when it can be again.
        run_id: an existing run to add to; empty: the one that the folder's last entries belong to; None: `start` makes
            a new one.
        folder: of the outbox, for one process at a time; None: what MLflow has not taken by the end is lost.
        on_run: called, in the background thread, with the identity of the run that `start` made or found.
        patience_s: how long `run_id` and `close` wait for MLflow.
    """

    def __init__(
        self,
        config: TrackingConfig,
        on_trouble: Callable[[str], None],
        run_id: str | None = None,
        *,
        folder: Path | None = None,
        on_run: Callable[[str], None] | None = None,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self._config, self._on_trouble, self._patience_s = config, on_trouble, patience_s
        self._given = run_id
        self._outbox = Outbox(folder if config.enabled else None, on_trouble)
        if folder is None:
            self._outbox.note(run_id=run_id or "")
        self._sender = Sender(config.uri, config.experiment, config.model_name, self._outbox, on_run)
        self._guard: Guard | None = None
        self._broken, self._closing = not config.enabled, False
        self._trouble: str | None = None  # why MLflow does not take the next entry
        self._wanted, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def start(self, tree: Mapping[str, Any], text: str, tags: Mapping[str, str]) -> None:
        """Make the run (or go on with the one named), with the config's tree as parameters and its text as a file.

        Parameters never change in MLflow: those of a run that goes on with others become tags `changed.KEY`.
        """
        if self._broken:
            return
        if not self._outbox.state.ended:  # an earlier process was killed, and its guard, too
            self._outbox.put(_status("KILLED") | {"unless_ended": True})
        self._outbox.note(ended=False)
        self._outbox.put({"kind": "run", "key": uuid.uuid4().hex, "run_id": self._given, "time_ms": _now_ms(),
                          "name": self._config.run_name, "tags": dict(tags)})  # fmt: skip
        self._outbox.put({"kind": "params", "values": {key: str(v)[:6000] for key, v in _flatten(tree).items()}})
        self._outbox.put({"kind": "text", "text": text, "name": "config.yaml"})
        if (box := self._outbox.folder) is not None:
            config = self._config.model_dump(mode="json")
            task = {"config": config, "folder": str(box), "inode": queue_inode(box)}
            self._guard = Guard(outlive, json.dumps(task))

    def wake(self) -> None:
        """Import MLflow and begin to send."""
        self._wanted.set()

    def run_id(self) -> str | None:
        """Identity of the run, once MLflow has answered; None where it has not."""
        self.wake()
        until = time.monotonic() + self._patience_s
        while not (self._broken or self._sender.found) and time.monotonic() < until:
            time.sleep(0.05)
        return (self._outbox.state.run_id or None) if self._sender.found or self._given else None

    @property
    def ended(self) -> bool:
        """Whether the end of the folder's run is recorded."""
        return self._outbox.state.ended

    def metrics(self, values: Mapping[str, float], step: int, time_ms: int) -> None:
        """Record numbers of one step."""
        self._put({"kind": "metrics", "values": dict(values), "step": step, "time_ms": time_ms})

    def go_back(self, step: int) -> None:
        """What is recorded from here on of later steps is news, although there are numbers of them already."""
        self._put({"kind": "back", "step": step})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file, or a folder with all it holds, as it is when MLflow takes it."""
        self._put({"kind": "artifact", "path": str(path.absolute()), "folder": folder})

    def register(self, embedder: Path, model_id: str) -> None:
        """Store an Embedder with the run, register it as a model version, and give that the alias `champion`."""
        self._put({"kind": "register", "path": str(embedder.absolute()), "model_id": model_id})

    def close(self, status: Status | None = None) -> None:
        """Send what waits and end the run; None leaves the run's status as it is."""
        if status is not None and not self._broken:
            self._put(_status(status))
            self._outbox.note(ended=True)
        self._closing = True
        self.wake()
        self._outbox.wake()
        self._thread.join(self._patience_s)
        self._stop.set()
        self._outbox.wake()
        waiting = 0 if self._broken else len(self._outbox)
        self._outbox.close()
        if self._guard is not None:
            self._guard.release() if waiting else self._guard.dismiss()
        if waiting:
            reason = self._trouble or f"it was too slow for {waiting} records"
            self._say(f"cannot be used: {reason}", "what it missed is lost", (
                f"{waiting} records wait in '{self._outbox.folder}'; they are sent if it answers within "
                f"{_GUARD_PATIENCE_S // 60} minutes, or when the run goes on with --resume"
            ))  # fmt: skip

    def _put(self, entry: Entry) -> None:
        if not self._broken:
            self._outbox.put(entry)
            self.wake()

    def _work(self) -> None:
        self._wanted.wait()
        most, tries, outbox = _BATCH, 0, self._outbox
        while not (self._broken or self._stop.is_set() or (self._closing and not outbox)):
            entries = outbox.head(most)
            if not entries:
                outbox.wait(1)
                continue
            if not outbox.mine():  # the run goes on in another process, which has taken the entries over
                self._broken = True
                break
            try:
                count = self._sender.send(entries)
            except Exception as error:  # noqa: BLE001  whatever MLflow, its database or the network raises, training goes on
                tries += 1
                useless = refused(error) or (tries >= _TRIES and self._sender.answers())
                if useless and most > 1:
                    most = 1  # one of them is wrong: which?
                elif useless:
                    most, tries = _BATCH, 0
                    self._drop(entries[0], error)
                else:
                    self._away(error)
                    self._stop.wait(min(_LONGEST_PAUSE_S, 2 ** min(tries - 1, 10)))
                continue
            outbox.taken(count)
            tries = 0
            self._back()

    def _drop(self, entry: Entry, error: Exception) -> None:
        """MLflow will never take this entry: without a run there is nothing to record, without another there is."""
        self._broken = entry["kind"] == "run"
        self._outbox.taken(len(self._outbox) if self._broken else 1)
        if self._broken:
            self._outbox.note(ended=True)
        what = "cannot be used" if self._broken else f"does not take the run's {entry['kind']}"
        self._say(f"{what}: {first_line(error)}", "going on without" + (" tracking" if self._broken else ""))

    def _away(self, error: Exception) -> None:
        if self._trouble is None and self._outbox.folder is not None:
            self._say(f"cannot be used: {first_line(error)}", f"what it misses waits in '{self._outbox.folder}'")
        self._trouble = first_line(error)

    def _back(self) -> None:
        if self._trouble is not None and self._outbox.folder is not None:
            self._say("answers again", "it is sent what it missed")
        self._trouble = None

    def _say(self, what: str, consequence: str, with_folder: str | None = None) -> None:
        consequence = with_folder if with_folder and self._outbox.folder is not None else consequence
        self._on_trouble(f"MLflow at '{public_uri(self._config.uri)}' {public_uri(what)}; {consequence}")


def outlive(task: str) -> None:
    """What the guard does when a run's process was killed: send what waits, and end the run."""
    settings = json.loads(task)
    folder = Path(settings["folder"])
    if queue_inode(folder) != settings["inode"]:  # the run goes on already
        return
    config = TrackingConfig.model_validate(settings["config"])
    tracker = Tracker(config, lambda _: None, "", folder=folder, patience_s=_GUARD_PATIENCE_S)
    tracker.close(None if tracker.ended else "KILLED")


def _status(status: Status) -> Entry:
    return {"kind": "status", "status": status, "time_ms": _now_ms()}


def _now_ms() -> int:
    return int(time.time() * 1000)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat
