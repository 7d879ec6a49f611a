"""What the command line says at once, and what a training run shows."""

import io
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from serving.cli import app
from serving.cli.terminal import TrainingView
from trainer.errors import UserError
from trainer.train import Record

HEAVY = ("torch", "ray", "numpy", "pydantic", "matplotlib", "mlflow", "onnxruntime", "fastapi")


def test_help_loads_no_framework() -> None:
    program = (
        "import serving.cli, sys\nserving.cli.app(['--help'], standalone_mode=False)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert "verify (1:1) and identify (1:N)" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_source_of_an_import_is_an_argument() -> None:
    done = CliRunner().invoke(app, ["data", "import", "--kind", "omniglot", "--out", "set", "--source", "a.zip"])
    assert isinstance(done.exception, UserError)
    assert (
        str(done.exception) == "--source is no option: write the source as a word, 'hypersphere data import a.zip ...'"
    )


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"val/rank1": 0.8312, "val/fnir_at_fpir_1pct": 0.5, "neural_collapse/a": 1.0, "neural_collapse/b": 2.0},
            "step 40: rank-1 83.1%, FNIR at FPIR 1 % 50.0%, 2 other figures in run.json and MLflow",
        ),
        ({"val/rank1": 1.0}, "step 40: rank-1 100.0%"),
    ],
)
def test_an_evaluation_is_one_short_line(values: dict[str, float], line: str) -> None:
    file = io.StringIO()
    with TrainingView(Console(file=file, width=200)) as view:
        view.record(Record("metrics", 40, 80, values))
    assert file.getvalue().strip() == line


def test_a_run_without_a_terminal_is_told_in_tenths() -> None:
    file = io.StringIO()
    with TrainingView(Console(file=file, width=200)) as view:
        view.record(Record("start", 0, 100))
        for step in range(1, 101):
            view.record(Record("step", step, 100, {"loss": 1.0, "samples_per_s": 5.0, "memory_mb": 7.0}))
        view.record(Record("note", text="[a note]"))
    lines = file.getvalue().splitlines()
    assert len(lines) == 12
    assert lines[0] == "step 0/100  starting"
    assert lines[-2:] == ["step 100/100  loss 1.000  5 samples/s  7 MB", "[a note]"]
