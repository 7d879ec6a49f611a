"""The Dockerfile, read without an engine: its bases, what it copies, as whom it runs, what it would install."""

import importlib.metadata
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TARGETS = ["serving", "trainer"]
EXTRAS = [("serving-build", {"serving"}), ("trainer", {"trainer", "serving", "gpu"})]


def test_the_base_images_are_pinned_to_a_patch_release(images: dict[str, str], stages: dict[str, Any]) -> None:
    assert set(images) == {"PYTHON_IMAGE", "CUDA_IMAGE"}
    assert all(re.search(r":\d+\.\d+\.\d+-", image) for image in images.values()), images
    external = {stage.base for stage in stages.values()} - set(stages)
    assert external == set(images.values())


def test_the_trainer_compiles_with_the_cuda_major_that_torch_is_built_for(images: dict[str, str], pins: Any) -> None:
    assert pins["torch"] == "2.13.0", "another torch: look up its CUDA version, then change CUDA_IMAGE and this line"
    assert re.search(r"cuda:13\.\d+\.\d+-devel-", images["CUDA_IMAGE"])


@pytest.mark.parametrize("target", TARGETS)
def test_the_targets_run_without_root_and_refuse_pickles(stages: dict[str, Any], target: str) -> None:
    stage = stages[target]
    assert stage.last("USER") == "10001:10001"
    assert "useradd --uid 10001" in " ".join(stage.all("RUN"))
    environment = stage.environment()
    assert environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert environment["WDS_SECURE"] == "1"


def test_the_entry_points(stages: dict[str, Any]) -> None:
    serving, trainer = stages["serving"], stages["trainer"]
    assert serving.words("ENTRYPOINT") == ["hypersphere", "serve"]
    assert trainer.words("ENTRYPOINT") == ["hypersphere"]
    assert serving.words("VOLUME") == ["/var/lib/hypersphere"]
    assert any(word.startswith("/var/lib/hypersphere/") for word in serving.words("CMD"))
    assert "/healthz" in serving.last("HEALTHCHECK")
    assert f":{serving.last('EXPOSE')}/healthz" in serving.last("HEALTHCHECK")


def test_what_is_copied_exists_and_is_let_through(root: Path, stages: dict[str, Any]) -> None:
    let_through = _exceptions(root / ".dockerignore")
    copied: set[str] = set()
    for stage in stages.values():
        for rest in stage.all("COPY"):
            words = rest.split()
            if words[0].startswith("--from="):
                assert words[0].removeprefix("--from=") in stages, rest
                continue
            copied.update(words[:-1])
    missing = {path for path in copied if not (root / path).exists()}
    assert not missing, f"the Dockerfile copies {missing}, which the repository lacks"
    assert copied == let_through, "the Dockerfile's COPY and the exceptions of .dockerignore must name the same paths"


def _exceptions(path: Path) -> set[str]:
    """Paths that a .dockerignore beginning with `*` lets through."""
    rules = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*", "everything must be shut out first"
    return {rule.removeprefix("!") for rule in rules if rule.startswith("!")}


def test_no_secret_is_built_in(root: Path, stages: dict[str, Any]) -> None:
    for name, stage in stages.items():
        assert not stage.all("ADD"), f"stage {name} uses ADD, which fetches and unpacks; use COPY"
        named = [rest for keyword in ("ARG", "ENV") for rest in stage.all(keyword)]
        assert not re.search(r"TOKEN|PASSWORD|SECRET|API_KEY|INDEX_URL", " ".join(named), re.IGNORECASE), name


def test_the_third_party_layer_depends_on_two_files_only(stages: dict[str, Any]) -> None:
    for name in ("serving-build", "trainer"):
        keywords = [item for item in stages[name].instructions if item[0] in ("COPY", "RUN")]
        assert keywords[0] == ("COPY", "pyproject.toml constraints.txt ./"), name
        assert "install -c constraints.txt" in keywords[1][1], name


@pytest.mark.parametrize(("stage", "extras"), EXTRAS)
def test_everything_that_would_be_installed_is_pinned(
    root: Path, stages: dict[str, Any], pins: dict[str, str], stage: str, extras: set[str]
) -> None:
    """Follows the extras through the metadata of what is installed here, and holds each requirement against its pin."""
    command = next(rest for rest in stages[stage].all("RUN") if "install -c" in rest)
    asked = re.search(r'"\.\[([\w,]+)\]"', command)
    assert asked is not None
    assert set(asked[1].split(",")) == extras

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    texts = project["dependencies"] + [text for extra in extras for text in project["optional-dependencies"][extra]]
    waiting = [Requirement(text) for text in texts]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{requirement} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{requirement}, pinned: {pins[name]}"
        key = (name, frozenset(requirement.extras))
        if key not in seen:
            seen.add(key)
            waiting += _requirements(name, requirement.extras)
    installed = {name for name, _ in seen}
    assert ("torch" in installed) == (stage == "trainer")


def _requirements(name: str, extras: set[str]) -> list[Requirement]:
    """What an installed distribution requires with these extras; nothing of one that is not installed here."""
    try:
        texts = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = [Requirement(text) for text in texts]
    return [
        item
        for item in found
        if item.marker is None or any(item.marker.evaluate({"extra": extra}) for extra in {"", *extras})
    ]
