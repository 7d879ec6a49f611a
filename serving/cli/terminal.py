"""What the terminal shows: lines, progress bars and tables."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.progress import TimeRemainingColumn as Remaining
from rich.text import Text

if TYPE_CHECKING:
    from trainer.train import Record

_PLAIN_EVERY = 0.1  # without a terminal, a line each tenth of the way

# What is printed may hold anything: brackets are no styles, and words between colons no pictures.
out = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
err = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)


def warn(text: str) -> None:
    """A line on stderr; the command goes on."""
    err.print(text, style="yellow")


def fail(text: str, what: str = "error") -> None:
    """The line on stderr that a failed command ends with."""
    err.print(Text.assemble((f"{what}:", "bold red"), " ", text))


@contextmanager
def progress(console: Console = out) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage; yields `show(stage, done, total)`. Nothing is drawn where there is no terminal."""
    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), Elapsed(), Remaining())
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    tasks: dict[str, TaskID] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total or None)
        bar.update(tasks[stage], completed=done, total=total or None)

    with bar:
        yield show


class TrainingView(Progress):
    """The bar of a training run: loss, samples/s, ETA and memory; lines instead where there is no terminal."""

    def __init__(self, console: Console) -> None:
        counts, times = (TextColumn("step"), MofNCompleteColumn()), (Elapsed(), TextColumn("left"), Remaining())
        columns = (*counts, BarColumn(), TextColumn("{task.fields[text]}"), *times)
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self._next_line = 0.0

    def record(self, record: "Record") -> None:
        """Show what rank 0 tells: in the bar, or as a line above it."""
        if record.kind in ("start", "step"):
            self._step(record.step, record.total_steps, record.values)
        elif record.kind in ("note", "metrics", "back"):
            text = record.text or f"step {record.step}: {_evaluation(record.values)}"
            self.console.print(text, markup=False, highlight=False)

    def _step(self, step: int, total: int, values: Mapping[str, float]) -> None:
        text = "starting"
        if "loss" in values:
            text = "loss {loss:.3f}  {samples_per_s:.0f} samples/s  {memory_mb:.0f} MB".format_map(values)
        if self.console.is_terminal:
            task = self.task_ids[0] if self.task_ids else self.add_task("train", total=total, text=text)
            self.update(task, completed=step, total=total, text=text)
        elif step >= self._next_line * total:
            self.console.print(f"step {step}/{total}  {text}", highlight=False)
            self._next_line += _PLAIN_EVERY


def _evaluation(values: Mapping[str, float]) -> str:
    """One short line of an evaluation: what was found of the identities held out, and where the rest is."""
    named = (("val/rank1", "rank-1"), ("val/fnir_at_fpir_1pct", "FNIR at FPIR 1 %"))
    shown = [f"{what} {values[key]:.1%}" for key, what in named if key in values]
    others = len(values) - len(shown)
    shown += [f"{others} other figures in run.json and MLflow"] if others else []
    return ", ".join(shown)
