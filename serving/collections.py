"""The collections of a service: each a gallery in a file of its own, pinned to one of the loaded embedders.

`--store` names a file, which is the collection `default` and the only one, or a folder, in which every NAME.db is one.
A collection is dropped in two steps: its file is renamed, from when on it is gone, and then what is left is removed, at
the next start if need be.
"""

import logging
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.changes import IdempotencyKey
from serving.database import pinned
from serving.errors import ApiError, invalid
from serving.gallery import Gallery
from serving.metrics import Metrics
from serving.models import Model
from serving.once import Once
from serving.scopes import COLLECTION as NAME
from serving.scopes import DEFAULT_COLLECTION
from serving.sealing import read_key
from serving.settings import Settings
from serving.store import Store
from trainer.atomic import sync
from trainer.errors import UserError

log = logging.getLogger("hypersphere.serving")
DROPPED = ".dropped"


@dataclass(frozen=True)
class Collection:
    """A gallery and the model of its vectors, under the name by which routes know it."""

    name: str
    gallery: Gallery
    model: Model
    settings: Settings
    metrics: Metrics

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
        folder = self._in_folder()
        if not re.fullmatch(NAME, name):
            raise invalid(("name", f"1 to 63 of a-z, 0-9, - and _ are allowed, the first a letter or digit: {NAME}"))
        if model_id is not None and model_id not in self._models:
            told = f"model {model_id} is not loaded; loaded: {', '.join(self._models)}"
            raise ApiError(409, "wrong_model", told, {"sent": model_id, "served": list(self._models)})
        with self._lock:
            if self._once.get(key):
                return self.get(name), True
            if name in self._open:
                raise ApiError(409, "collection_exists", f"the collection '{name}' exists; choose another name")
            if len(self._open) >= (most := self._settings.max_collections):
                told = f"there are {most} collections, as many as are allowed; drop one, or raise --max-collections"
                raise ApiError(409, "too_many_collections", told, {"max_collections": most})
            _remove(folder, name)  # what a drop or a creation that was cut off left
            made = self._opened(name, model_id)
            made.gallery.load()
            self._open = self._open | {name: made}  # whoever walks over it sees the one or the other
            self._once.put(key, True)
            return made, False

    def drop(self, name: str, key: IdempotencyKey | None = None) -> bool:
        """Remove a collection and all its files; requests that are using it are answered 404 or finish before. Whether
        a request with the same key did it before.

        Raises:
            ApiError: there is none of the name, or it is the only one there can be.
        """
        folder = self._in_folder()
        with self._lock:
            if self._once.get(key):
                return True
            dropped = self.get(name)
            self._open = {key: value for key, value in self._open.items() if key != name}
            self._metrics.dropped(name)
            dropped.gallery.close()
            (folder / f"{name}.db").rename(folder / f"{name}.db{DROPPED}")
            sync(folder)
            _remove(folder, name)
            self._once.put(key, True)
            return False

    def _in_folder(self) -> Path:
        if self.folder is None:
            told = "this service keeps one collection in one file; start it with --store FOLDER for several"
            raise ApiError(409, "one_collection", told)
        return self.folder

    def _found(self) -> list[str]:
        """Names of the collections in the folder, after what was cut off is tidied away."""
        if self.folder is None:
            return []
        for file in self.folder.glob(f"*.db{DROPPED}"):
            _remove(self.folder, file.name.removesuffix(f".db{DROPPED}"))
        names = []
        for file in sorted(self.folder.glob("*.db")):
            if not re.fullmatch(NAME, file.stem):
                raise UserError(f"'{file}' is no name of a collection; rename it to {NAME}.db, or move it away")
            names.append(file.stem)
        return names

    def _opened(self, name: str, model_id: str | None = None) -> Collection:
        path = self._settings.store if self.folder is None else self.folder / f"{name}.db"
        model = self._model_of(path, model_id)
        settings = self._settings
        hours, key = settings.idempotency_hours, read_key(settings.encryption_key_file)
        store = Store(path, model.model_id, model.dimension, hours, settings.restored, key)
        rules = model.verify_rule, model.identify_rule
        limits, forms = (settings.threads, settings.max_samples), (settings.index, settings.template)
        gallery = Gallery(store, *rules, *limits, model.normaliser, *forms)
        gallery.on_search = self._metrics.searched
        self._metrics.opened(name, gallery)
        return Collection(name, gallery, model, settings, self._metrics)

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


def _remove(folder: Path, name: str) -> None:
    """Remove all files of a collection, the renamed one last: while it is there, they are known to be left over."""
    for path in (*folder.glob(f"{name}.db-*"), folder / f"{name}.db{DROPPED}"):
        if path.is_dir():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    sync(folder)
