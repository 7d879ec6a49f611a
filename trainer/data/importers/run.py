"""Import: from a source of any kind to a finished data set, WebDataset tars with their indexes, tables and manifest.

In this order, each step on the disk before the next begins, so that a killed import goes on where it was:

1. `planning`: list the source, and share its samples out to shards;
2. `work`: write the shards, several at once in `processes`;
3. `decide`: find duplicates, and identities that turned out to have too few samples;
4. `work`: write anew the shards that hold any, with the labels that are left; nothing is decoded again;
5. `finish`: tables and manifest. Then the folder gets its name.
"""

import math
import os
import shutil
from pathlib import Path

from trainer.atomic import Kind, empty, fresh_folder, write_file
from trainer.data.curate.view import keep, local_files
from trainer.data.importers import KINDS, ImportOptions, Progress, importer_of
from trainer.data.importers.finish import decide, decided, finish
from trainer.data.importers.folder import check_name
from trainer.data.importers.in_place import index_in_place
from trainer.data.importers.plan import PLAN_FOLDER, Plan
from trainer.data.importers.planning import make_plan
from trainer.data.importers.processes import Program, Setup, cannot_write, run_tasks
from trainer.data.importers.work import REDONE, RESULTS, WORK_FOLDER, Bad, Result, Task, Tell, result_file
from trainer.data.manifest import MANIFEST_FILE, Manifest
from trainer.data.remote import checked, is_remote, shown
from trainer.errors import UserError

_DATA_SET = Kind("a data set", MANIFEST_FILE)
_DIGEST = ".digest"  # of the plan by which the shards in an unfinished folder were written
_WORTH_A_PROCESS = 4_000  # samples: fewer are written before another process has started


def run_import(
    kind: str,
    source: Path | str | None,
    out: Path | str,
    options: ImportOptions | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Import a data set into the new folder `out`, whole or not at all.

    The same input, options and image library give the same bytes, whatever the number of processes, and whether or not
    the import was interrupted. Train samples lie in an order shuffled by the seed, so that a shard is a mixture of
    identities. What is left out is named in the manifest.

    Args:
        kind: one of `KINDS`.
        source: a folder, file or address, as the kind says; None where it needs none (glyphs) or knows where to find it
            (omniglot).
        out: a folder of this machine.
        progress: called with a stage ("download", "list", "import", ...), what is done and what there is to do.

    Raises:
        UserError: the source cannot be used, too many images are unreadable, fewer than two identities are left, `out`
            exists, the disk is full, or a process was killed. All but the first and `out` leave what is done for the
            next call, which goes on there.
    """
    options = options or ImportOptions()
    show = progress or (lambda stage, done, total: None)
    if kind not in KINDS:
        raise UserError(f"--kind {kind} is not known; allowed: {', '.join(KINDS)}")
    if is_remote(out):
        raise UserError(
            f"--out '{shown(out)}' is not a folder of this machine; import into one, and copy that to its address with "
            "the storage's own tools: data sets are read from there as they are"
        )
    out = Path(out)
    if source is not None and not is_remote(source):
        check_name(os.path.abspath(source))
    places = [checked(place).removeprefix("file://") for place in (source, options.labels) if place is not None]
    keep(out, (Path(place) for place in places if not is_remote(place)))
    with fresh_folder(out, _DATA_SET, options.overwrite, resumable=True) as folder:
        try:
            if options.in_place:
                _in_place(kind, source, folder, options, show)
                keep(out, local_files(Manifest.read(folder)))  # a pattern may name archives in many folders
            else:
                _import(kind, None if source is None else str(source), folder, options, show)
        except OSError as error:
            raise UserError(cannot_write(error, folder)) from error
    return Manifest.read(out)


def _in_place(kind: str, source: Path | str | None, folder: Path, options: ImportOptions, show: Progress) -> None:
    if kind != "tars" or source is None:
        raise UserError(f"--in-place is not possible for --kind {kind}; it is for tars, with a SOURCE")
    empty(folder)
    index_in_place(str(source), folder, options, show).write(folder)


def _import(kind: str, source: str | None, folder: Path, options: ImportOptions, show: Progress) -> None:
    with Program(options.jobs or len(os.sched_getaffinity(0))) as program:

        def listing(stage: str, done: int, total: int) -> None:
            if stage == "list" and done > _WORTH_A_PROCESS and program.most > 1:
                program.start()  # it needs a second to be ready, as does the planning
            show(stage, done, total)

        plan = _plan(kind, source, folder, options, listing)
        if not (folder / MANIFEST_FILE).exists():  # else it was killed in its very last steps
            setup = Setup(folder, kind, options, 1)
            tally = _Tally(plan, folder, options, show)
            _run(setup, [Task(what="write", shard=shard) for shard in plan.shards], tally.tell, program)
            decision = decide(folder, plan, options.min_samples)
            _run(setup, decision.tasks, lambda done, bad: None, program)
            finish(folder, kind, plan, decision, options)
    for inner in (PLAN_FOLDER, WORK_FOLDER):
        shutil.rmtree(folder / inner, ignore_errors=True)  # it may be gone since an earlier kill
    (folder / _DIGEST).unlink()


def _plan(kind: str, source: str | None, folder: Path, options: ImportOptions, show: Progress) -> Plan:
    """Plan anew, always; and keep what an interrupted import wrote by a plan of the same digest."""
    shutil.rmtree(folder / PLAN_FOLDER, ignore_errors=True)
    (folder / PLAN_FOLDER).mkdir()
    try:
        make_plan(folder / PLAN_FOLDER, kind, importer_of(kind).list(source, options, show), options, show)
    except UserError:
        if not (folder / _DIGEST).exists():
            shutil.rmtree(folder)
        raise
    plan = Plan(folder / PLAN_FOLDER)
    if not (folder / _DIGEST).exists() or (folder / _DIGEST).read_text() != plan.file.digest:
        empty(folder, PLAN_FOLDER)
        for stage in (RESULTS, REDONE):
            (folder / WORK_FOLDER / stage).mkdir(parents=True)
        write_file(folder / _DIGEST, plan.file.digest)
    for leftover in folder.rglob(".partial-*"):
        leftover.unlink()
    return plan


def _run(setup: Setup, tasks: list[Task], tell: Tell, program: Program) -> None:
    """Do the tasks that have no result yet."""
    tasks = [task for task in tasks if not result_file(setup.folder, task).exists()]
    samples = [task.shard.samples for task in tasks]
    cores = program.most
    worth = cores if setup.options.jobs else 1 + sum(samples) // _WORTH_A_PROCESS
    processes = max(1, min(cores, len(tasks), worth))
    # A large shard beside few others leaves cores idle: threads use them, since decoding frees the interpreter's lock.
    threads = max(cores / processes, cores * max(samples, default=1) / max(1, sum(samples)))
    run_tasks(setup._replace(threads=math.ceil(threads)), tasks, processes, tell, program)


class _Tally:
    """Counts what is done, and ends the import when too much of it is bad."""

    def __init__(self, plan: Plan, folder: Path, options: ImportOptions, show: Progress) -> None:
        self._plan, self._folder, self._most, self._show = plan, folder, options.max_bad, show
        self._planned = sum(shard.samples for shard in plan.shards)
        self._done = self._bad = 0
        self._first: list[str] = []
        for shard in plan.shards:
            file = result_file(folder, Task(what="write", shard=shard))
            if file.exists():
                bad = Result.model_validate_json(file.read_bytes()).bad
                if bad and plan.file.threads > 1 and not decided(folder):
                    file.unlink()  # from elsewhere: what could not be had then may be had now
                else:
                    self.tell(shard.samples, bad)

    def tell(self, done: int, bad: list[Bad]) -> None:
        self._done += done
        self._bad += len(bad)
        self._first = (self._first + [one.reason for one in bad])[:3]
        if self._bad > self._most * self._plan.file.total:
            raise UserError(
                f"{self._bad} or more of {self._plan.file.total} samples cannot be read, over the --max-bad "
                f"{self._most:g} that is allowed ({'; '.join(self._first)}); mend or remove them, or raise --max-bad: "
                f"then the import goes on from what '{self._folder}' keeps of this one"
            )
        self._show("import", self._done, self._planned)
