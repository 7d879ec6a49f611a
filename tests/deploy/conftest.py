"""What the deployment tests share: where the files are, the pinned versions, and the Dockerfile taken apart."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name


@dataclass(frozen=True)
class Stage:
    """One `FROM ... AS name` with its instructions, in order, as (keyword, rest)."""

    base: str
    instructions: list[tuple[str, str]]

    def all(self, keyword: str) -> list[str]:
        return [rest for found, rest in self.instructions if found == keyword]

    def last(self, keyword: str) -> str:
        return self.all(keyword)[-1]

    def words(self, keyword: str) -> list[str]:
        """The last instruction of this keyword, which must be in the exec form: a JSON list."""
        words: list[str] = json.loads(self.last(keyword))
        return words

    def environment(self) -> dict[str, str]:
        pairs = (re.findall(r'(\w+)=(?:"([^"]*)"|(\S+))', rest) for rest in self.all("ENV"))
        return {name: quoted or plain for found in pairs for name, quoted, plain in found}


def parse(text: str) -> tuple[dict[str, str], dict[str, Stage]]:
    """The global ARGs and the stages of a Dockerfile without heredocs; ARGs are filled in where a FROM uses them."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for line in filter(None, map(str.strip, joined.splitlines())):
        keyword, _, rest = line.partition(" ")
        rest = re.sub(r"\s+", " ", rest).strip()
        if keyword == "ARG" and current is None:
            name, _, value = rest.partition("=")
            arguments[name] = value
        elif keyword == "FROM":
            base, _, name = rest.partition(" AS ")
            filled = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], base)
            current = stages[name] = Stage(filled, [])
        else:
            assert current is not None, f"'{line}' stands before the first FROM"
            current.instructions.append((keyword, rest))
    return arguments, stages


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def pins(root: Path) -> dict[str, str]:
    """Version by canonical name, from constraints.txt."""
    pairs = (line.split("==") for line in (root / "constraints.txt").read_text().splitlines() if "==" in line)
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.fixture(scope="session")
def images(root: Path) -> dict[str, str]:
    """The base images that the Dockerfile starts from, by ARG."""
    return parse((root / "Dockerfile").read_text())[0]


@pytest.fixture(scope="session")
def stages(root: Path) -> dict[str, Stage]:
    return parse((root / "Dockerfile").read_text())[1]
