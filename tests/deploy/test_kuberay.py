"""The KubeRay manifests: their structure, and that job, Config, volumes and secret fit each other."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from trainer.config import load


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    return root / "deploy/kuberay"


def _documents(folder: Path) -> list[dict[str, Any]]:
    """Every object that the kustomization lists, in order."""
    names = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    return [tree for name in names for tree in yaml.safe_load_all((folder / name).read_text())]


@pytest.fixture(scope="module")
def job(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((folder / "rayjob.yaml").read_text())
    return tree


def _pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def _faults(tree: object) -> list[str]:
    schema = json.loads(Path(__file__).with_name("rayjob.schema.json").read_text())
    found = jsonschema.Draft202012Validator(schema).iter_errors(tree)
    return [f"{'.'.join(map(str, fault.path))}: {fault.message}" for fault in found]


def test_the_job_has_the_fields_that_the_api_asks_for(job: dict[str, Any]) -> None:
    assert not _faults(job)


def test_the_structure_check_finds_faults(job: dict[str, Any]) -> None:
    misspelt = job | {"spec": {**job["spec"], "entryPoint": "x"}}
    assert _faults(misspelt)
    number = job | {"spec": {**job["spec"], "entrypoint": 1}}
    assert _faults(number)


def test_the_cluster_runs_the_ray_that_was_tested(job: dict[str, Any], pins: dict[str, str]) -> None:
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]


def test_the_config_of_the_job_is_valid_and_asks_for_the_gpus_there_are(folder: Path, job: dict[str, Any]) -> None:
    config = load(folder / "train.yaml")
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in groups]
    gpus = sum(group["replicas"] * int(limit["nvidia.com/gpu"]) for group, limit in zip(groups, limits, strict=True))
    assert config.scaling.use_gpu
    assert config.scaling.most == gpus
    assert config.scaling.least in [int(limit["nvidia.com/gpu"]) for limit in limits]
    assert {config.scaling.least, gpus} <= set(config.world_sizes())
    for limit in limits:
        assert int(limit["nvidia.com/gpu"]) * config.scaling.cpus_per_worker <= float(limit["cpu"])
    mounts = {mount["mountPath"] for mount in _pods(job)[0]["containers"][0]["volumeMounts"]}
    assert str(config.data.path.parent) in mounts
    assert str(config.run.out.parent) in mounts
    assert job["spec"]["entrypoint"] == "hypersphere train --config /etc/hypersphere/train.yaml --resume"
    assert "/etc/hypersphere" in mounts


def test_mounts_claims_config_and_secret_exist(folder: Path, job: dict[str, Any]) -> None:
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    claims = {tree["metadata"]["name"] for tree in _documents(folder) if tree["kind"] == "PersistentVolumeClaim"}
    configs = {item["name"] for item in kustomization["configMapGenerator"]}
    secrets = {item["name"] for item in kustomization["secretGenerator"]}
    for pod in _pods(job):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
            if "configMap" in volume:
                assert volume["configMap"]["name"] in configs
    assert job["spec"]["rayClusterSpec"]["authOptions"]["secretName"] in secrets
    assert kustomization["generatorOptions"]["disableNameSuffixHash"] is True


def test_the_token_stays_out_of_the_repository(root: Path, folder: Path) -> None:
    generator = yaml.safe_load((folder / "kustomization.yaml").read_text())["secretGenerator"][0]
    key, _, path = generator["files"][0].partition("=")
    assert key == "auth_token", "KubeRay reads this key and no other"
    assert f"{Path(path).parent}/" in (root / "deploy/.gitignore").read_text().splitlines()
    assert not [tree for tree in _documents(folder) if tree["kind"] == "Secret"]


def test_only_ray_the_submitter_and_the_operator_reach_the_cluster(folder: Path, job: dict[str, Any]) -> None:
    policy = next(tree for tree in _documents(folder) if tree["kind"] == "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    inside, outside = policy["ingress"]
    assert inside["from"] == [{"podSelector": policy["podSelector"]}]
    assert [port["port"] for port in outside["ports"]] == [8265]
    submitter = outside["from"][0]["podSelector"]["matchLabels"]["batch.kubernetes.io/job-name"]
    assert submitter == job["metadata"]["name"]


def test_kustomize_builds_it(folder: Path, tmp_path: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed; the manifests were checked one by one without it")
    copy = tmp_path / "kuberay"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("secrets"))
    (copy / "secrets").mkdir()
    (copy / "secrets/auth_token").write_text("for-this-test-only")
    result = subprocess.run([kubectl, "kustomize", str(copy)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    built = list(yaml.safe_load_all(result.stdout))
    kinds = sorted(tree["kind"] for tree in built)
    expected = ["ConfigMap", "Namespace", "NetworkPolicy", "PersistentVolumeClaim", "PersistentVolumeClaim", "RayJob"]
    assert kinds == [*expected, "Secret"]
    assert {tree["metadata"].get("namespace", tree["metadata"]["name"]) for tree in built} == {"hypersphere"}
    assert not _faults(next(tree for tree in built if tree["kind"] == "RayJob"))
