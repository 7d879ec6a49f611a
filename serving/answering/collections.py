"""The collections of a service: each a gallery in a file of its own, pinned to one of the loaded embedders.

`--store` names a file, which is the collection `default` and the only one, or a folder, in which every NAME.db is one.
A collection is dropped in two steps: its file is renamed, from when on it is gone, and then what is left is removed, at
the next start if need be.
"""

import logging
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving.access.scopes import COLLECTION as NAME
from serving.access.scopes import DEFAULT_COLLECTION
from serving.answering.once import Once
from serving.errors import ApiError, invalid
from serving.gallery import Gallery
from serving.images.models import Model
from serving.settings import Settings
from serving.storage.changes import IdempotencyKey
from serving.storage.database import begun, pinned
from serving.storage.mark import mark_path
from serving.storage.sealing import read_key
from serving.storage.store import Store
from serving.telemetry.drift import Drift
from serving.telemetry.metrics import Metrics
from trainer.atomic import sync
from trainer.errors import UserError

log = logging.getLogger("hypersphere.serving")
DROPPED = ".dropped"
BESIDE = ("-wal", "-shm", "-mark", "-index")  # what a store has beside it


@dataclass(frozen=True)
class Collection:
    """A gallery and the model of its vectors, under the name by which routes know it."""

    name: str
    gallery: Gallery
    model: Model
    settings: Settings
    metrics: Metrics
    drift: Drift
    dropped: threading.Event = field(default_factory=threading.Event, compare=False)

    def signed(self, request_id: str) -> dict[str, Any]:
        """What every answer carries."""
        return {"collection": self.name, "model_id": self.model.model_id, "request_id": request_id}


class Collections:
    """The open collections. Methods may be called from several threads."""

    def __init__(self, settings: Settings, models: Sequence[Model], metrics: Metrics) -> None:
        """Open all that there are; a new folder begins with the collection `default`, and no file is read yet.

        Args:
            models: the first one is that of a new collection whose model is not named.

        Raises:
            UserError: a store cannot be used, or is pinned to a model that is not loaded.
        """
        self._settings, self._metrics = settings, metrics
        self._models = {model.model_id: model for model in models}
        self._open = dict[str, Collection]()
        self._once = Once[bool](settings.idempotency_hours)
        self._lock = threading.Lock()  # of creating and dropping
        self.on_drop: Callable[[Collection], object] = lambda collection: None
        self.folder = settings.store if settings.store.is_dir() else None
        try:
            for name in self._found() or [DEFAULT_COLLECTION]:
                self._open[name] = self._opened(name)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all stores. Idempotent."""
        for collection in self.all():
            collection.gallery.close()

    def all(self) -> list[Collection]:
        """In the order of their names."""
        return [self._open[name] for name in sorted(self._open)]

    def get(self, name: str) -> Collection:
        """Raises ApiError 404."""
        found = self._open.get(name)
        if found is None:
            raise ApiError(
                404, "no_collection", f"no collection '{name[:63]}' is there; GET /v1/collections lists them"
            )
        return found

    def create(self, name: str, model_id: str | None, key: IdempotencyKey | None = None) -> tuple[Collection, bool]:
        """A new collection, loaded, for vectors of `model_id` (None: of the first embedder); and whether a request with
        the same key made it before.

        Raises:
            ApiError: it is there already, it may not have the name or the model, or there are too many.
            UserError: its store cannot be made.
        """
        self._refuse_file()
        if not re.fullmatch(NAME, name):
            raise invalid(("name", f"1 to 63 of a-z, 0-9, - and _ are allowed, the first a letter or digit: {NAME}"))
        if model_id is not None and model_id not in self._models:
            told = f"model {model_id} is not loaded; loaded: {', '.join(self._models)}"
            raise ApiError(409, "wrong_model", told, {"sent": model_id, "served": list(self._models)})
        with self._lock:
            if self._once.get(name, key):
                return self.get(name), True
            if name in self._open:
                raise ApiError(409, "collection_exists", f"the collection '{name}' exists; choose another name")
            if len(self._open) >= (most := self._settings.max_collections):
                told = f"there are {most} collections, as many as are allowed; drop one, or raise --max-collections"
                raise ApiError(409, "too_many_collections", told, {"max_collections": most})
            if (path := self._path(name)).exists() or mark_path(path).exists():
                told = f"the service's folder has a file '{name}.db' that it has not opened; start it again to serve it"
                raise ApiError(409, "collection_exists", told)
            self._open = self._open | {
                name: self._made(name, model_id)
            }  # whoever walks over it sees the one or the other
            self._once.put(name, key, True)
            return self._open[name], False

    def drop(self, name: str, key: IdempotencyKey | None = None) -> bool:
        """Remove a collection and all its files; requests that are using it are answered 404 or finish before. Whether
        a request with the same key did it before.

        Raises:
            ApiError: there is none of the name, or it is the only one there can be.
        """
        self._refuse_file()
        with self._lock:
            if self._once.get(name, key):
                return True
            dropped = self.get(name)
            self._open = {key: value for key, value in self._open.items() if key != name}
            dropped.dropped.set()
            self.on_drop(dropped)
            self._once.forget(name)
            self._closed(dropped)
            self._once.put(name, key, True)
            return False

    def _made(self, name: str, model_id: str | None) -> Collection:
        """A new collection, whole or not at all."""
        try:
            made = self._opened(name, model_id)
        except BaseException:
            _remove(self._path(name))
            raise
        try:
            made.gallery.load()
        except BaseException:
            self._closed(made)
            raise
        return made

    def _closed(self, collection: Collection) -> None:
        """Close a collection and remove its files."""
        self._metrics.dropped(collection.name)
        collection.gallery.close()
        _remove(collection.gallery.path)

    def _refuse_file(self) -> None:
        if self.folder is None:
            told = "this service keeps one collection in one file; for several start it with --store FOLDER/ "
            told += "(a folder that exists, or a name that ends with /)"
            raise ApiError(409, "one_collection", told)

    def _found(self) -> list[str]:
        """Names of the collections in the folder, after what was cut off is tidied away."""
        if self.folder is None:
            return []
        files, left_over = set(self.folder.glob("*.db")), list[Path]()
        for file in files:
            if not re.fullmatch(NAME, file.stem):
                raise UserError(f"'{file}' is no name of a collection; rename it to {NAME}.db, or move it away")
            if not mark_path(file).exists() and not begun(file):  # a creation that was cut off
                left_over.append(file)
        for dropped in self.folder.glob(f"*.db{DROPPED}"):
            if (file := dropped.with_name(dropped.name.removesuffix(DROPPED))).exists():
                raise UserError(f"'{file}' was dropped, but is there again; remove '{dropped}', or move '{file}' away")
            left_over.append(file)
        for file in left_over:  # nothing is removed before everything was found in order
            log.warning("'%s' was never begun, or was dropped, and is removed", file)
            _remove(file)
        # A mark without its store is one that was lost, which is said when it is opened.
        marks = {file.with_name(file.name.removesuffix("-mark")) for file in self.folder.glob("*.db-mark")}
        return sorted(file.stem for file in files | marks if file.exists() or file in marks)

    def _opened(self, name: str, model_id: str | None = None) -> Collection:
        path = self._path(name)
        model = self._model_of(path, model_id)
        settings = self._settings
        hours, key = settings.idempotency_hours, read_key(settings.encryption_key_file)
        store = Store(path, model.model_id, model.dimension, hours, settings.restored, key)
        rules = model.verify_rule, model.identify_rule
        limits, forms = (settings.threads, settings.max_samples), (settings.index, settings.template)
        gallery = Gallery(store, *rules, *limits, model.normaliser, *forms)
        gallery.on_search = self._metrics.searched
        drift = Drift(model.identify_rule.curve)
        self._metrics.opened(name, gallery, drift)
        return Collection(name, gallery, model, settings, self._metrics, drift)

    def _path(self, name: str) -> Path:
        return self._settings.store if self.folder is None else self.folder / f"{name}.db"

    def _model_of(self, path: Path, model_id: str | None) -> Model:
        """The model that a store is pinned to; of a new one, the one that is asked for, or the first."""
        first = next(iter(self._models))
        if len(self._models) == 1:
            return self._models[first]  # the store itself says best why it does not fit
        found = model_id or pinned(path) or first
        if found not in self._models:
            loaded = ", ".join(self._models)
            raise UserError(f"the store '{path}' holds vectors of model {found}, which is not loaded; loaded: {loaded}")
        return self._models[found]


def _remove(store: Path) -> None:
    """Remove a store and its own files beside it. It is renamed first, and goes last: while there is the renamed file,
    the others are known to be left over."""
    dropped = store.with_name(store.name + DROPPED)
    if store.exists():
        store.rename(dropped)
        sync(store.parent)
    for path in (*(store.with_name(store.name + end) for end in BESIDE), dropped):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    sync(store.parent)
