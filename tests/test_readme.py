"""README.md: its commands are the command line's, and the tree and the map name what is there, all of it."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer

from serving.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "README.md").read_text()


def blocks() -> str:
    return "\n".join(re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL))


def test_the_command_line_accepts_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = [shlex.split(line)[1:] for line in blocks().splitlines() if line.startswith("hypersphere ")]
    assert {words[0] for words in commands} >= {"data", "train", "export", "evaluate", "calibrate", "serve", "submit"}
    for words in commands:
        command, rest = typer.main.get_command(app), words
        while below := getattr(command, "commands", None):
            command, rest = below[rest[0]], rest[1:]
        command.make_context("hypersphere", list(rest))  # parses and converts, and runs nothing


def test_make_has_every_target_that_is_named() -> None:
    targets = set(re.findall(r"\bmake (\w+)", blocks()))
    assert targets == {"demo", "test"}
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_tree_names_every_source_file_once() -> None:
    tree = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert tree
    named, folder = [], ""
    for line in tree[1].splitlines():
        name = line.split()[0]
        if name.endswith("/") and not line.startswith(" "):
            folder = name
        else:
            named.append(folder + name if line.startswith(" ") else name)
    there = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    sources = {n for n in there if n.startswith(("trainer/", "serving/")) and not n.endswith("__init__.py")}
    assert sources == {name for name in named if name.startswith(("trainer/", "serving/"))}
    assert len(named) == len(set(named))


def test_links_and_paths_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"`((?:trainer|serving|deploy|configs|docs|benchmarks)/[\w./-]+)`", PAGE):
        assert (ROOT / name).exists(), name
