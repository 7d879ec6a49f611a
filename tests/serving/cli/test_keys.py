"""`hypersphere keys` as an operator meets it."""

import re

import pytest
from typer.testing import CliRunner

from serving.access.keys import opened
from serving.access.scopes import Scope
from serving.cli import app
from trainer.errors import UserError


@pytest.fixture
def run(tmp_path):
    def run(*line):
        done = CliRunner().invoke(app, ["keys", *line, "--store", str(tmp_path / "s")], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    return run


def test_a_key_from_its_making_to_its_end(run):
    token = run("create", "door 3", "--scope", "read", "--collection", "faces", "--expires", "90d").strip()
    assert re.fullmatch("hsk_[0-9a-f]{12}_[0-9a-f]{64}", token)
    key_id = token.split("_")[1]
    (line,) = run("list").splitlines()
    assert re.match(rf"{key_id}  until 20\S+ \S+  read  faces  no limit  never used  door 3$", line)
    second = run("rotate", key_id, "--grace", "1h").strip()
    assert second.split("_")[1] == key_id
    assert second != token
    run("revoke", key_id)
    listed = run("list")
    assert "revoked" in listed
    assert token[-64:] not in listed
    assert second[-64:] not in listed


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["list"], "hypersphere keys create"),
        (["revoke", "0" * 12], "hypersphere keys create"),
        (["create", "x", "--scope", "read", "--expires", "soon"], "30m, 12h or 90d"),
        (["create", "x", "--scope", "read", "--expires", "0d"], "expired at once"),
    ],
)
def test_what_cannot_be_is_a_sentence(run, line, told):
    with pytest.raises(UserError, match=told):
        run(*line)


def test_an_unknown_id(run):
    run("create", "x", "--scope", "audit")
    with pytest.raises(UserError, match="keys list"):
        run("revoke", "nobody")


def test_what_has_expired_is_not_rotated(run, tmp_path):
    with opened(tmp_path / "s-keys", make=True) as file:
        key_id = file.create("x", [Scope.READ], lifetime_s=-1).split("_")[1]
    with pytest.raises(UserError, match="has expired"):
        run("rotate", key_id)
    run("revoke", key_id)
