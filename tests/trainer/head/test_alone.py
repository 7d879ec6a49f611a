"""The head by itself: the README's lines beside a plain model, with torch alone, on one and two ranks."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import run_on_ranks

ROOT = Path(__file__).resolve().parents[3]
ABSENT = ["pydantic", "yaml", "ray", "deepspeed", "mlflow", "webdataset"]
STEPS, SAMPLES = 12, 8


def lines_of_the_documentation() -> str:
    """The README's block of Python."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return block


def run_them(rank: int, folder: Path, ranks: int) -> None:
    """The documented lines, with only the model and the batches given; leaves the losses of its last batch."""
    # A None in sys.modules makes Python believe that the package is not installed.
    sys.modules |= dict.fromkeys(ABSENT)  # type: ignore[arg-type]
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 128))
    images, labels = torch.randn(SAMPLES, 20), torch.randint(0, 1000, (SAMPLES,))
    share = SAMPLES // ranks
    mine = slice(rank * share, (rank + 1) * share)
    found: list[float] = []

    def batches() -> object:
        for _ in range(STEPS):
            yield images[mine], labels[mine]
            found.append(float(names["loss"].detach()))  # type: ignore[attr-defined]

    names: dict[str, object] = {"model": model, "batches": batches()}
    exec(lines_of_the_documentation(), names)  # noqa: S102  the documentation is what is tested
    head = names["head"]
    assert type(head).__module__ == "trainer.head.head"
    (folder / f"{ranks}-{rank}.json").write_text(
        json.dumps({"losses": found, "rows": len(head.rows), "weights": model[0].weight.sum().item()})  # type: ignore[attr-defined]
    )


def test_the_documented_lines_train_on_one_and_on_two_ranks_alike(tmp_path: Path) -> None:
    for ranks in (1, 2):
        run_on_ranks(ranks, run_them, tmp_path, ranks)
    (alone, first, second) = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert (alone["rows"], first["rows"], second["rows"]) == (1000, 500, 500)
    assert len(alone["losses"]) == STEPS
    assert alone["losses"][-1] < 0.5 * alone["losses"][0]
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    assert first["weights"] == pytest.approx(alone["weights"], rel=1e-3)


def test_without_a_process_group_they_run_too(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from tests.trainer.head.test_alone import run_them
run_them(0, Path({str(tmp_path)!r}), 1)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "1-0.json").is_file()


def test_the_readme_shows_these_lines_and_no_others() -> None:
    shown = [block for block in (ROOT / "README.md").read_text().split("```python\n")[1:] if "trainer.head" in block]
    for block in shown:
        assert block.partition("```")[0].strip() == lines_of_the_documentation().strip()
