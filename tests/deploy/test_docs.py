"""docs/deployment.md: the command line accepts its commands, and the files that it names are there."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from serving.cli import app


def _page(root: Path) -> str:
    return (root / "docs/deployment.md").read_text()


def _commands(page: str) -> list[list[str]]:
    """The words after `hypersphere`, or the compose service `tools` (alias hs), of each command in a code block."""
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [re.match(r"(?:hypersphere|hs|docker compose .* run .* tools) (.+)", line) for line in lines]
    return [shlex.split(match[1]) for match in found if match]


def test_the_command_line_accepts_every_command_on_the_page(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    commands = _commands(_page(root))
    assert [words[0] for words in commands] == [
        *["keys"] * 6,
        *["audit"] * 2,
        "data",
        "submit",
        "export",
        "evaluate",
        "calibrate",
        "submit",
        "submit",
        "export",
    ]
    for words in commands:
        command, rest = typer.main.get_command(app), words
        while commands_below := getattr(command, "commands", None):
            command, rest = commands_below[rest[0]], rest[1:]
        command.make_context("hypersphere", list(rest))  # parses and converts, and runs nothing


def test_files_and_paths_named_on_the_page_exist(root: Path) -> None:
    page = _page(root)
    named = set(re.findall(r"(?<![\w/$])(?:deploy|configs|docs|tests)/[\w./-]*\w", page))
    generated = {name for name in named if "/secrets" in name}
    assert generated
    assert {name for name in named - generated if not (root / name).exists()} == set()
