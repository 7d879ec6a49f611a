"""When a snapshot of an index is taken, and how a start goes on from one.

A start takes the rows of the snapshot, removes all of the subjects that were changed since, and reads those anew from
the store. What a kill kept from being erased in the snapshot is erased then. A snapshot is written when much was added
or some time has passed since the last one, and at a clean stop.
"""

import hashlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from serving.search.blocks import Block, Find, of_subjects
from serving.search.index import Index
from serving.search.snapshot import Snapshot, Source
from serving.search.templates import Template
from serving.storage.reading import Piece
from serving.storage.rows import NOBODY
from serving.storage.store import Store
from trainer.evaluation.normalise import Normaliser

LEAST_SAMPLES = 20_000  # fewer are read from the store in a second
MOST_CHANGED = 0.2  # of the subjects, that are read one by one; beyond it all are read in one pass
EVERY_S = 600.0  # between two snapshots
SOONER_S, GROWN = 10.0, 1.2  # where there are so many times the samples of the last one
STOP_S = 10.0  # the longest that a clean stop is held up
log = logging.getLogger("hypersphere.serving")


class Keeper:
    """The snapshots of one store's index."""

    def __init__(self, store: Store, normaliser: Normaliser | None, template: Template = "maximum") -> None:
        width, scores = normaliser.width if normaliser else store.dimension, ""
        if normaliser:
            scores = hashlib.sha256(normaliser.kind.encode() + normaliser.cohort_KD.tobytes()).hexdigest()
        source = Source(store.uid.hex(), store.model_id, width, scores + template.removeprefix("maximum"))
        self._store, self._template = store, template
        self._snapshot = Snapshot(Path(os.path.realpath(store.path)), source)
        self._samples, self._tried = 0, -math.inf  # of the last snapshot; when one was last tried
        self._writing: threading.Thread | None = None
        self._closing = threading.Event()

    def resume(self, index: Index, put: Callable[[Index, Piece], None], threads: int) -> bool:
        """Fill the empty index from the snapshot and from what was changed since; whether that could be done."""
        if self._store.restored or self._store.encrypted:  # another history from some revision on; in plain text
            self._snapshot.drop("")
        parts = self._snapshot.open(threads)
        if not parts or self._snapshot.revision is None:
            return False
        changed = self._store.changes_since(self._snapshot.revision)
        state = self._store.state()
        if changed is None:
            self._snapshot.drop("it is of a later revision than the store")
            return False
        since = of_subjects([one.number - NOBODY for one in changed])
        self._snapshot.erase(since)
        if len(changed) > MOST_CHANGED * state.subjects:
            log.info("%d of %d subjects changed since the snapshot: all are read anew", len(changed), state.subjects)
            return False
        index.take(parts, ((number - NOBODY, name) for number, name in self._store.names()), since)
        for one in changed:
            if one.subject_id is not None and (piece := self._store.samples_of(one.subject_id)):
                put(index, piece)
        rows = state.samples if self._template == "maximum" else state.subjects
        if (index.subjects, index.samples) != (state.subjects, rows):
            self._snapshot.drop("it does not go with the store")
            return False
        self._samples, self._tried = index.samples, time.monotonic()
        self._rest(index)
        log.info("the index was taken from a snapshot, and %d subjects that were changed since", len(changed))
        return True

    def tend(self, index: Index, revision: int) -> None:
        """Begin to write a snapshot in the background, where it is time. Called with changes of the index kept out."""
        passed = time.monotonic() - self._tried
        due = passed >= EVERY_S or (passed >= SOONER_S and index.samples >= GROWN * self._samples)
        if due and self._differs(index, revision) and not (self._writing and self._writing.is_alive()):
            self._writing = threading.Thread(target=self._write, args=(index, index.parts(), revision), name="snapshot")
            self._writing.start()

    def close(self, index: Index | None, revision: int) -> None:
        """End what is under way. `index`: of which a last snapshot is taken, with changes kept out; None: take none."""
        self._closing.set()
        if self._writing:
            self._writing.join()
        if index is not None and self._differs(index, revision):
            self._closing = threading.Event()
            timer = threading.Timer(STOP_S, self._closing.set)
            timer.start()
            self._write(index, index.parts(), revision)
            timer.cancel()

    def erase(self, find: Find) -> None:
        """Let rows be off the disk when this returns. Raises OSError where that cannot be."""
        self._snapshot.erase(find)

    def relabel(self, old: int, new: int) -> None:
        """Give a subject's rows to another."""
        self._snapshot.relabel(old, new)

    def drop(self, reason: str) -> None:
        """Remove the snapshot. Raises OSError where that cannot be."""
        self._snapshot.drop(reason)

    def _differs(self, index: Index, revision: int) -> bool:
        if self._store.encrypted:  # a snapshot is not, since it is mapped
            return False
        return index.samples >= LEAST_SAMPLES and revision != self._snapshot.revision

    def _rest(self, index: Index) -> None:
        if index.form != "exact":  # a search reads few of the vectors
            self._snapshot.rest()

    def _write(self, index: Index, parts: list[tuple[Block, int]], revision: int) -> None:
        self._tried = time.monotonic()
        try:
            index.share(self._snapshot.write(parts, revision, self._closing.is_set))
            self._rest(index)
            self._samples = sum(rows for _, rows in parts)
        except OSError as error:
            log.warning("the snapshot of the index could not be written: %s", error)
