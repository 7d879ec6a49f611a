"""The Omniglot benchmark: its recipes are configs, each loss has one, and a loss below its stated rank-1 fails."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import margins
from trainer.losses import by_name


@pytest.mark.parametrize("table", margins.TABLES)
def test_every_recipe_is_a_config(table: str, tmp_path: Path) -> None:
    for one in margins.TABLES[table]:
        config = one.config(tmp_path / "data", tmp_path / "out", epochs=3, seed=2)
        named = {spec.name for spec in (config.loss, *config.auxiliary)}
        assert one.loss in named, one.name
        assert (config.run.epochs, config.run.seed, config.scaling.workers) == (3, 2, 1)


def test_every_loss_of_the_project_has_a_row_and_states_a_rank1() -> None:
    assert [one.name for one in margins.LOSSES] == list(by_name())
    for one in margins.LOSSES:
        config = one.config(Path("data"), Path("out"), 1, 0)
        assert one.name in {spec.name for spec in (config.loss, *config.auxiliary)}
        assert one.floor > 10 / 194, "no more than chance"


def test_recipes_differ_in_the_loss_and_its_optimizer_alone() -> None:
    def rest(one: margins.Recipe) -> dict[str, Any]:
        tree = one.config(Path("data"), Path("out"), 1, 0).model_dump(mode="json")
        tree["data"].pop("identities_per_batch")
        tree["head"].pop("optimizer")
        return {key: value for key, value in tree.items() if key not in ("loss", "auxiliary", "optimizer")}

    assert all(rest(one) == rest(margins.LOSSES[0]) for one in margins.LOSSES)


def test_the_ablation_has_the_ten_margins() -> None:
    assert len(margins.TABLES["ablation"]) == 10


class Stub:
    """Stands for the trainings, which take minutes."""

    def __init__(self, rank1: float) -> None:
        self.rank1 = rank1

    def __call__(self, recipes: Any, data: Path, options: Any, done: Any) -> list[dict[str, Any]]:
        runs = [{"val/rank1": self.rank1 + 0.01 * k, "val/fnir_at_fpir_1pct": 0.5, "seconds": 2.0} for k in range(3)]
        return [margins.row(one, runs) for one in recipes]


@pytest.mark.parametrize(("rank1", "code"), [(0.99, 0), (0.0, 1)])
def test_a_loss_below_its_stated_rank1_fails_the_command(
    rank1: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(margins, "measure", Stub(rank1))
    monkeypatch.setattr(margins, "omniglot", lambda source, folder, console: folder)
    file = tmp_path / "margins.json"
    assert margins.main(["--only", "arcface", "--json", str(file)]) == code
    captured = capsys.readouterr()
    assert ("stated above" in captured.err) == (code == 1)
    (row,) = json.loads(file.read_text())["rows"]
    assert row["val/rank1"]["mean"] == pytest.approx(rank1 + 0.01)
    assert f"| arcface | {100 * row['val/rank1']['mean']:.1f} ± 2.5 |" in captured.out


def test_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        margins.parse(["--only", "arcfac"])
    assert "arcfac" in capsys.readouterr().err
    assert margins.main(["--source", str(tmp_path / "nothing.zip"), "--folder", str(tmp_path)]) == 2
    assert "nothing.zip" in capsys.readouterr().err
