"""How fast training is: Ray, DeepSpeed, the stream and MLflow together against a bare loop in PyTorch; and its start.

    python benchmarks/train.py                      # samples a second, in turns
    python benchmarks/train.py --start              # from the command to the first step, by stage
    python benchmarks/train.py --start --against /another/checkout

Each measurement is a process (or a cluster) of its own, the contenders in turns, so that a busy machine slows both
alike; given are medians, and the median of the turns' ratios. *CPU*: of all processes that take part, Ray's own and
MLflow's too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CASES = {"cached": (1, True), "uncached": (1, False), "two ranks": (2, True)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=3000, help="ten an identity")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64, help="samples a step of each rank")
    parser.add_argument("--width", type=int, default=32, help="of the convnet")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--warm", type=int, default=100, help="steps before the measurement")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--start", action="store_true")
    parser.add_argument("--against", type=Path, help="with --start: a checkout to compare with")
    parser.add_argument("--one", nargs=4, metavar=("CONTENDER", "CONFIG", "IMAGES", "WARM"), help=argparse.SUPPRESS)
    return parser.parse_args()


def tree(options: argparse.Namespace, folder: Path, ranks: int, cached: bool) -> dict[str, object]:
    """A config's plain values."""
    return {
        "data": {
            "path": str(folder / "set"), "height": options.side, "width": options.side,
            "batch_size": ranks * options.batch, "cache": "memory" if cached else "none", "decode_threads": 1,
        },
        "backbone": {"name": "convnet", "dimension": 128, "width": options.width},
        "scaling": {"workers": ranks},
        "optimizer": {"lr": 0.05},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        "run": {"epochs": 10_000, "max_steps": options.steps, "eval_every": 0, "checkpoint_every": 0},
    }  # fmt: skip


def product(config_file: Path, warm: int) -> tuple[float, float]:
    """Samples a second and microseconds of the processor a sample, after the first `warm` steps."""
    import psutil

    from trainer.config import load
    from trainer.run import start
    from trainer.train import Record

    def processor_seconds() -> float:
        mine = psutil.Process()
        return sum(sum(process.cpu_times()[:2]) for process in [mine, *mine.children(recursive=True)])

    seen: list[tuple[int, int, float]] = []  # step, when, processor

    def note(record: Record) -> None:
        if record.kind == "step" and record.step >= warm and record.step % warm == 0:
            seen.append((record.step, record.time_ms, processor_seconds()))

    config = load(config_file)
    with tempfile.TemporaryDirectory() as out:
        start(config.model_copy(update={"run": config.run.model_copy(update={"out": Path(out)})}), False, note, print)
    samples = (seen[-1][0] - seen[0][0]) * config.data.batch_size
    return samples / (seen[-1][1] - seen[0][1]) * 1e3, 1e6 * (seen[-1][2] - seen[0][2]) / samples


def measure_one(contender: str, config_file: Path, images: Path, warm: int) -> None:
    from benchmarks.train_bare import measure
    from trainer.config import load

    if contender == "hypersphere":
        rate, cpu = product(config_file, warm)
    else:
        config = load(config_file)
        rate, cpu = measure(config, images, config.data.cache == "memory", config.run.max_steps or 0, warm)
    print(json.dumps([rate, cpu]))


def compare(options: argparse.Namespace, folder: Path) -> None:
    print("| | hypersphere, samples/s | bare | ratio | of the turns | CPU µs a sample | bare | ratio |")
    print("|---|---:|---:|---:|---|---:|---:|---:|")
    for case in options.only:
        file = folder / f"{case}.yaml"
        file.write_text(json.dumps(tree(options, folder, *CASES[case])))
        found: dict[str, list[list[float]]] = {"hypersphere": [], "bare": []}
        for _ in range(options.repeats):
            for name, results in found.items():
                words = [sys.executable, __file__, "--one", name, str(file), str(folder / "images"), str(options.warm)]
                done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
                print(case, name, results[-1], file=sys.stderr)
        ours, bare = ([statistics.median(column) for column in zip(*r, strict=True)] for r in found.values())
        turns = sorted(one[0] / other[0] for one, other in zip(*found.values(), strict=True))
        spread = f"{turns[0]:.2f} to {turns[-1]:.2f}"
        print(f"| {case} | {ours[0]:.0f} | {bare[0]:.0f} | {statistics.median(turns):.3f} | {spread} "
              f"| {ours[1]:.0f} | {bare[1]:.0f} | {ours[1] / bare[1]:.3f} |", flush=True)  # fmt: skip


def main() -> None:
    options = parse()
    if options.one:
        contender, config_file, images, warm = options.one
        measure_one(contender, Path(config_file), Path(images), int(warm))
        return
    from benchmarks.data import make_set
    from benchmarks.train_start import report

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_set(folder, 200 if options.start else options.images, options.side)
        if options.start:
            file = folder / "start.yaml"
            file.write_text(json.dumps(tree(options, folder, 2, True)))
            others = {"before": options.against} if options.against else {}
            report(others | {"now": ROOT}, file, options.repeats)
        else:
            compare(options, folder)


if __name__ == "__main__":
    main()
