"""What the terminal shows: progress bars and tables."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from trainer.evaluation.report import Report

_PLAIN_EVERY = 0.1  # without a terminal, a line each tenth of the way


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage; yields `show(stage, done, total)`. Nothing is drawn where there is no terminal."""
    bar = Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: dict[str, TaskID] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total or None)
        bar.update(tasks[stage], completed=done, total=total or None)

    with bar:
        yield show


class TrainingView:
    """The bar of a training run: loss, samples/s, ETA and memory; lines instead where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._next_line = 0.0

    def __enter__(self) -> "TrainingView":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, step: int, total: int, values: Mapping[str, float]) -> None:
        """Show where the training is."""
        text = (
            f"loss {values['loss']:.3f}  {values['samples_per_s']:.0f} samples/s  {values['memory_mb']:.0f} MB"
            if "loss" in values
            else "starting"
        )
        if not self._console.is_terminal:
            if step >= self._next_line * total:
                self._console.print(f"step {step}/{total}  {text}", highlight=False)
                self._next_line += _PLAIN_EVERY
            return
        if self._task is None:
            self._task = self._bar.add_task("train", total=total, text=text)
        self._bar.update(self._task, completed=step, total=total, text=text)

    def line(self, text: str) -> None:
        """A line above the bar."""
        self._bar.console.print(escape(text), highlight=False)


def rows_table(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """Two columns: what, and its value."""
    table = Table(title=title, show_header=False, title_justify="left")
    for what, value in rows:
        table.add_row(escape(what), escape(value))
    return table


def report_rows(report: "Report") -> list[tuple[str, str]]:
    """The headline figures of an evaluation, each with what it was measured on; a figure not resolved says why."""
    shot, open_set = report.one_shot, report.open_set
    rows = [
        (
            f"rank-1, one image enrolled per identity, gallery of {shot.gallery_size}",
            f"{shot.rank1:.2%}  (95 %: {shot.low:.2%} to {shot.high:.2%}; {shot.probes} probes)",
        )
    ]
    for far in report.verification.tar_at_far:
        rows.append((f"TAR at FAR {far.far:g}", _rate(far.tar, far.reason)))
    rows.append(("EER", f"{report.verification.eer:.2%}"))
    for point in open_set.points:
        interval = f"  (95 %: {point.low:.2%} to {point.high:.2%})" if point.low is not None and point.high else ""
        what = f"FNIR at FPIR {point.fpir:g}, {open_set.unenrolled} identities not enrolled, gallery of"
        rows.append((f"{what} {open_set.gallery_size}", _rate(point.fnir, point.reason) + interval))
    return rows


def _rate(value: float | None, reason: str | None) -> str:
    return f"{value:.2%}" if value is not None else f"not resolved: {reason}"


def losses_table(losses: Sequence[Mapping[str, Any]]) -> Table:
    """The losses by family."""
    table = Table()
    table.add_column("name", no_wrap=True)  # what a config asks for: never cut
    for column in ("family", "formula", "defaults", "source"):
        table.add_column(column, overflow="fold")
    for loss in losses:
        defaults = ", ".join(f"{key}={value}" for key, value in loss["defaults"].items())
        table.add_row(
            *(escape(str(loss[key])) for key in ("name", "family", "formula")), escape(defaults), escape(loss["source"])
        )
    return table
