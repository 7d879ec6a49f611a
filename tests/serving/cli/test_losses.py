"""What the command line prints for people and for programs."""

import json

import pytest
from typer.testing import CliRunner

from serving.cli import app
from trainer.losses import table


@pytest.mark.parametrize("columns", ["80", "200"])
def test_the_table_of_losses_has_every_name_whole(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    done = CliRunner().invoke(app, ["losses"])
    assert done.exit_code == 0, done.output
    for row in table():
        assert row["name"] in done.output


def test_the_table_of_losses_as_json() -> None:
    done = CliRunner().invoke(app, ["losses", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == table()
