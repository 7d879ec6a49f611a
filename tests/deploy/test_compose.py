"""compose.yaml against the Compose Specification's schema, and against what the schema cannot say."""

import json
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

FILES = ["compose.yaml", "compose.gpu.yaml"]


@pytest.fixture(scope="module")
def compose(root: Path) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((root / "deploy/compose.yaml").read_text())
    return tree


def _schema() -> Any:
    return json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())


@pytest.mark.parametrize("name", FILES)
def test_the_file_follows_the_compose_specification(root: Path, name: str) -> None:
    tree = yaml.safe_load((root / "deploy" / name).read_text())
    faults = jsonschema.Draft202012Validator(_schema()).iter_errors(tree)
    assert not [f"{'.'.join(map(str, fault.path))}: {fault.message}" for fault in faults]


def test_the_schema_finds_a_misspelt_key(compose: dict[str, Any]) -> None:
    wrong = compose | {"services": {"service": {"image": "x", "port": ["8000"]}}}
    assert not jsonschema.Draft202012Validator(_schema()).is_valid(wrong)


def test_what_services_name_is_declared(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name, service in services.items():
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in compose["volumes"], name
        assert set(service.get("networks", [])) <= set(compose["networks"]), name
        assert set(service.get("secrets", [])) <= set(compose["secrets"]), name
        for other, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}, name
            assert "healthcheck" in services[other], f"{name} waits for the health of {other}, which has no check"


def test_ports_are_published_on_the_loopback_only(compose: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert published == {
        "mlflow": ["127.0.0.1:5000:5000"],
        "ray-head": ["127.0.0.1:8265:8265"],
        "service": ["127.0.0.1:8000:8000"],
    }


@pytest.mark.parametrize("name", ["ray-head", "ray-worker", "tools"])
def test_ray_asks_for_the_token_in_the_secret(root: Path, compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    environment = service["environment"]
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
    assert "RAY_AUTH_TOKEN" not in environment
    assert service["secrets"] == ["ray_token"]
    token = compose["secrets"]["ray_token"]["file"]
    assert f"{Path(token).parent}/" in (root / "deploy/.gitignore").read_text().splitlines()


def test_long_running_services_are_watched_limited_and_unprivileged(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}, name
        assert ("healthcheck" in service) == (service["restart"] == "unless-stopped"), name


def test_images_are_pinned_and_built_from_targets_that_exist(
    root: Path, compose: dict[str, Any], stages: dict[str, Any], pins: dict[str, str]
) -> None:
    services = compose["services"]
    assert services["mlflow"]["image"].endswith(f":v{pins['mlflow']}")
    for name, service in services.items():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
        if "build" in service:
            assert service["build"]["target"] in stages, name
            assert (root / "deploy" / service["build"]["context"] / "Dockerfile").is_file(), name


def test_the_service_uses_the_folders_and_the_health_check_of_its_image(
    compose: dict[str, Any], stages: dict[str, Any]
) -> None:
    service, stage = compose["services"]["service"], stages["serving"]
    mounted = {volume.split(":")[1] for volume in service["volumes"]}
    assert set(stage.words("VOLUME")) <= mounted
    options = service["command"]
    assert options[options.index("--embedder") + 1].startswith("/embedders/")
    assert "/embedders" in mounted
    assert [word for word in options if word.startswith("--")] == [w for w in stage.words("CMD") if w.startswith("--")]
    assert json.dumps(service["healthcheck"]["test"][1:]) in stage.last("HEALTHCHECK")


def test_every_port_of_a_health_check_is_the_one_listened_on(compose: dict[str, Any]) -> None:
    for name in ("mlflow", "ray-head", "ray-worker"):
        service = compose["services"][name]
        port = re.search(r"127\.0\.0\.1:(\d+)/", service["healthcheck"]["test"][-1])
        assert port is not None
        assert any(word.endswith(f"port={port[1]}") for word in service["command"]), name


@pytest.mark.parametrize("files", [FILES[:1], FILES])
def test_docker_compose_reads_it(root: Path, tmp_path: Path, files: list[str]) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("the docker command with its compose plug-in is not installed; the schema was checked without it")
    arguments = [word for name in files for word in ("-f", str(root / "deploy" / name))]
    command = [docker, "compose", *arguments, "--profile", "tools", "config", "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
