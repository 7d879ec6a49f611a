"""Which checkpoints of a run there are, which of them are kept, and what a killed writer has left.

A training that diverges shows it some steps after it went wrong. Until a run has gone `TRUSTED_AFTER` steps on from a
checkpoint, it is not trusted: the newest trusted one is kept whatever else is removed, and when a run diverges, the
later ones are marked, and no resume takes them.
"""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.files import MANIFEST, Checkpoint, Damaged, open_checkpoint, read_manifest
from trainer.distributed import Group
from trainer.storage import Folder

CHECKPOINTS = "checkpoints"  # in a run's folder
TRUSTED_AFTER = 100  # steps
# Files in a checkpoint's folder that say what became of it.
TRUSTED = "trusted"  # it stays so, also for a resumed run that diverges soon
DIVERGED = "diverged"
BEST = "best"  # with the metric and its value
_FOLDER = re.compile(r"step-(\d{8,})")
_EARLIER_PARTIAL = re.compile(r"step-\d{8,}\.partial")  # of formats 1 and 2


@dataclass(frozen=True)
class Shelf:
    """The checkpoints of a run as one listing has shown them, by their steps, each ascending.

    Attributes:
        names: of all files, relative to `folder`.
    """

    folder: Folder
    names: frozenset[str]

    @classmethod
    def of(cls, folder: Folder) -> "Shelf":
        return cls(folder, frozenset(folder.sizes()))

    def _with(self, file: str) -> list[int]:
        parts = (name.split("/") for name in self.names)
        found = (_FOLDER.fullmatch(path[0]) for path in parts if path[1:] == [file])
        return sorted(int(match[1]) for match in found if match)

    @property
    def diverged(self) -> list[int]:
        return self._with(DIVERGED)

    @property
    def whole(self) -> list[int]:
        """Those that a resume may take."""
        return sorted(set(self._with(MANIFEST)) - set(self.diverged))

    def trusted(self, step: int) -> list[int]:
        """Mark and return those from which a run went on long enough, of one that is at `step`."""
        whole, marked = self.whole, self._with(TRUSTED)
        fresh = [one for one in whole if one <= step - TRUSTED_AFTER and one not in marked]
        for one in fresh:
            place(self.folder, one).write(TRUSTED, "{}\n")
        return [one for one in whole if one in marked or one in fresh]

    def best(self) -> tuple[int, dict[str, float]] | None:
        """The step of the one that was best last, and its metric."""
        for step in reversed([one for one in self._with(BEST) if one in self.whole]):
            with suppress(ValueError):  # somebody has edited it
                return step, dict(json.loads(place(self.folder, step).read(BEST)))
        return None

    def remove(self, step: int) -> None:
        """Its manifest first: what is left then, if that is all, is no checkpoint."""
        inside = f"{place(self.folder, step).name}/"
        names = sorted(name for name in self.names if name.startswith(inside))
        self.folder.remove(sorted(names, key=lambda name: name != inside + MANIFEST))


def place(folder: Folder, step: int) -> Folder:
    """The folder of the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def latest(folder: Folder) -> Checkpoint | None:
    """The newest whole checkpoint; None where there is none.

    Raises:
        Damaged: its manifest is damaged, or a file is missing or has another size.
    """
    steps = Shelf.of(folder).whole
    return open_checkpoint(place(folder, steps[-1])) if steps else None


def sweep(folder: Folder) -> None:
    """Remove what no checkpoint names: left by a writer that was killed or failed. Nobody must be writing."""
    shelf = Shelf.of(folder)
    known, held = set(), shelf.whole + shelf.diverged
    for step in held:
        inside = place(folder, step)
        try:
            manifest = read_manifest(inside)
        except Damaged:
            known |= {name for name in shelf.names if name.startswith(f"{inside.name}/")}
            continue
        files = [entry.path or name for name, entry in manifest.files.items()]
        known |= {f"{inside.name}/{name}" for name in [*files, MANIFEST, TRUSTED, DIVERGED, BEST]}
    parts = {name: name.split("/")[0] for name in shelf.names - known}
    folder.remove(
        sorted(name for name, top in parts.items() if _FOLDER.fullmatch(top) or _EARLIER_PARTIAL.fullmatch(top))
    )
    if isinstance(folder.address, Path):
        for empty in folder.address.glob("step-*"):
            with suppress(OSError):  # it is not empty
                empty.rmdir()


def prune(folder: Folder, keep: int, step: int) -> None:
    """Remove old ones after that of `step` was written: the newest `keep` stay, the newest trusted one, the one that
    will be trusted next, and the best. Later ones are of a course that was left."""
    shelf = Shelf.of(folder)
    whole, trusted, best = shelf.whole, shelf.trusted(step), shelf.best()
    held = [one for one in whole if one <= step]
    after = [one for one in held if one not in trusted]
    kept = {*held[-keep:], *[one for one in trusted if one <= step][-1:], *after[:1], *([best[0]] if best else [])}
    past = [one for one in shelf.diverged if trusted and one <= trusted[-1]]  # the run is past where it went wrong
    for one in [*sorted(set(whole) - kept), *past]:
        shelf.remove(one)


def mark_best(folder: Folder, step: int, metric: str, value: float) -> None:
    """Mark the checkpoint of a step as the best one, in place of an earlier one."""
    before = Shelf.of(folder)._with(BEST)
    place(folder, step).write(BEST, json.dumps({metric: value}) + "\n")
    folder.remove(f"{place(folder, one).name}/{BEST}" for one in before if one != step)


def set_aside(folder: Folder, step: int, group: Group) -> int:
    """Mark the checkpoints that are not trusted, for a run that diverged at `step`; the step from which a resume will
    go on. A collective."""
    if group.rank == 0:
        shelf = Shelf.of(folder)
        for one in sorted(set(shelf.whole) - set(shelf.trusted(step))):
            place(folder, one).write(DIVERGED, "{}\n")
    group.barrier()
    return max(Shelf.of(folder).whole, default=0)
