"""From the command to the first step: when each process starts, imports, and what all of them take of the processor.

A `sitecustomize` on the path of every process notes the times, so that the product knows nothing of the measurement.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

_TRACE = "TRAIN_START_TRACE"
_HOOK = """
import importlib.abc, os, sys, time
def note(what):
    with open(os.environ["TRAIN_START_TRACE"], "a") as file:
        file.write(f"{time.time()}\\t{os.getpid()}\\t{what}\\n")
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in ("torch", "deepspeed", "ray", "ray.train", "trainer.launch"):
            return None
        spec = next(filter(None, (f.find_spec(name, path, target) for f in sys.meta_path if f is not self)), None)
        if spec is not None:
            run = spec.loader.exec_module
            def exec_module(module):
                run(module)
                note(name)
            spec.loader.exec_module = exec_module
        return spec
if "TRAIN_START_TRACE" in os.environ:
    command = open("/proc/self/cmdline").read()
    note("worker" if "default_worker.py" in command else "process")
    sys.meta_path.insert(0, Watch())
"""


def measure(project: Path, config: Path, out: Path) -> dict[str, float]:
    """Seconds from the command to each stage, in order, and seconds of the processor of all processes together."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace"
        (Path(folder) / "sitecustomize.py").write_text(_HOOK)
        environment = os.environ | {"PYTHONPATH": f"{folder}:{project}", _TRACE: str(trace)}
        words = ["train", "--config", str(config), f"run.out={out}", "run.max_steps=10", "run.log_every=1"]
        started = time.time()
        with subprocess.Popen(
            [sys.executable, "-m", "serving.cli", *words],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=project,
        ) as command:
            assert command.stdout
            first = next((line for line in command.stdout if line.startswith("step ") and "loss" in line), None)
            now, cpu = time.time(), _processor_seconds(trace)
            command.stdout.read()
        if command.returncode or first is None:
            raise SystemExit(f"the run has failed: {command.returncode}")
        return _stages([line.split("\t") for line in trace.read_text().splitlines()], started, now) | {"cpu": cpu}


def _stages(notes: list[list[str]], started: float, first_step: float) -> dict[str, float]:
    driver = notes[0][1]
    ranks = {pid for _, pid, what in notes if what == "deepspeed"}

    def last(what: str, pids: set[str]) -> float:
        return max(float(at) for at, pid, name in notes if name == what and pid in pids) - started

    ray_up = min(float(at) for at, _, what in notes if what == "worker") - started
    controller = min(float(at) for at, pid, what in notes if what == "ray.train" and pid != driver) - started
    return {
        "imports of the command": last("trainer.launch", {driver}),
        "ray.init, and a first process": ray_up,
        "Ray Train's controller": controller,
        "processes of the ranks": last("worker", ranks),
        "  with Ray imported": last("ray.train", ranks),
        "  with torch and the loop": last("trainer.launch", ranks),
        "  with DeepSpeed": last("deepspeed", ranks),
        "first step": first_step - started,
    }


def _processor_seconds(trace: Path) -> float:
    """Of every process that still runs with this trace in its environment, and of those that it has outlived."""
    total = 0.0
    for process in psutil.process_iter():
        try:
            if process.environ().get(_TRACE) == str(trace):
                total += sum(process.cpu_times()[:4])
        except psutil.Error:
            continue
    return total


def report(projects: dict[str, Path], config: Path, repeats: int) -> None:
    """Measure the projects in turn, `repeats` times, and print the medians."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in projects}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeats):
            for name, project in projects.items():
                found[name].append(measure(project, config, Path(folder) / f"{name}{turn}"))
                print(f"{name}: {found[name][-1]['first step']:.1f} s", file=sys.stderr)
    print(f"{'seconds since the command':32}" + "".join(f"{name:>12}" for name in projects))
    for stage in found[next(iter(projects))][0]:
        medians = [statistics.median(one[stage] for one in runs) for runs in found.values()]
        print(f"{stage:32}" + "".join(f"{value:12.1f}" for value in medians))
