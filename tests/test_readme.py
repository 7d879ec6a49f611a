"""README.md: its commands are the command line's, its phrases are those of the files, and what it names is there."""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from serving.cli import app
from tests.serving.conftest import Server, onnx_model, photo, write_embedder

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "README.md").read_text()
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "docs/papers.md", "docs/api.md")}


def blocks() -> str:
    return "\n".join(re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL))


def phrase(path: Path) -> str:
    """The first line of a file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


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


def test_the_tree_names_every_folder_with_its_phrase() -> None:
    tree = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert tree
    named = dict(line.split(maxsplit=1) for line in tree[1].splitlines())
    folders = [path.parent for room in ("trainer", "serving") for path in (ROOT / room).rglob("__init__.py")]
    assert named == {f"{folder.relative_to(ROOT)}/": phrase(folder / "__init__.py") for folder in folders}
    assert list(named) == sorted(named, key=lambda name: (not name.startswith("trainer"), name))


def test_every_source_file_says_its_purpose_in_one_line() -> None:
    for room in ("trainer", "serving"):
        for path in (ROOT / room).rglob("*.py"):
            assert phrase(path).endswith((".", "?", "`")), path


def test_the_files_to_read_first_have_their_phrases() -> None:
    named = re.findall(r"^\d\. `([\w/.]+)`: (.+)$", PAGE, re.MULTILINE)
    assert len(named) == 6
    assert dict(named) == {name: phrase(ROOT / name) for name, _ in named}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGES[page]):
        assert ((ROOT / page).parent / target).exists(), target
    for name in re.findall(r"`((?:trainer|serving|deploy|configs|docs|benchmarks|tests)/[\w./-]+)`", PAGES[page]):
        assert (ROOT / name).exists(), name


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running service of several collections, in whose folder there are images."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "collections").mkdir()
    embedder = write_embedder(folder / "embedder", onnx_model())
    running = Server(embedder=embedder, store=folder / "collections", keep_images=True)
    for number, name in enumerate(("alice.png", "someone.png", "000000000.png", "000000001.png")):
        (folder / name).write_bytes(photo(1, number))
    yield running
    running.kill()


@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_the_examples_of_the_api_run(service: Server, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(service.store).parent)
    text = (ROOT / page).read_text()
    commands = [line for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    asked = [line for line in commands if line.startswith("curl ")]
    assert len(asked) >= 2
    for line in asked:
        words = shlex.split(line.replace("http://127.0.0.1:8000", service.url))
        done = subprocess.run([*words, "--silent", "--fail-with-body"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}: {done.stdout}"
    for program in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        if "serving.client" in program:
            program = program.replace("http://127.0.0.1:8000", service.url)
            subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
