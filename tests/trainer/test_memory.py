"""Memory that runs out is one sentence with what to change."""

import resource
from pathlib import Path

import pytest
import torch

from tests.ranks import folder_of_shapes, run_on_ranks
from trainer import memory
from trainer.config import load
from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import
from trainer.errors import UserError
from trainer.train import run


def test_what_is_done_already_is_not_advised() -> None:
    first = memory.advice(load(None, []))
    assert first == (
        "lower data.batch_size (now 256), or head.algorithm=recompute, or engine.zero_stage=2, or "
        "head.optimizer.state_dtype=int8, or head.param_dtype=bf16, or take more workers"
    )
    changed = ["engine.zero_stage=2", "head.algorithm=recompute", "head.param_dtype=bf16", "scaling.use_gpu=true"]
    assert memory.advice(load(None, changed)) == (
        "lower data.batch_size (now 256), or engine.bf16=true, or head.optimizer.state_dtype=int8, or take more workers"
    )


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), KeyError("x")])
def test_other_errors_are_left_alone(error: Exception) -> None:
    with pytest.raises(type(error)), memory.told(load(None, [])):
        raise error


def too_large(rank: int, data: Path, folder: Path) -> None:
    """With an address space that is a gigabyte larger than what is taken already."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    wide = ["backbone.name=convnet", "backbone.width=1024", "data.batch_size=600", "data.height=24", "data.width=24"]
    config = load(None, [f"data.path={data}", f"run.out={folder}", *wide, "scaling.workers=1", "run.max_steps=1"])
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30, before[1]))
    try:
        words = r"^out of memory at step \d+, .+ \(.*allocate .* bytes.*\); lower data\.batch_size \(now 600\)"
        with pytest.raises(UserError, match=words):
            run(config, resume=False, report=lambda _: None)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's driver takes address space without end")
def test_a_batch_that_does_not_fit(tmp_path: Path) -> None:
    source = folder_of_shapes(tmp_path / "images", 8)
    run_import("folder", source, tmp_path / "data", ImportOptions(holdout_share=0.3))
    run_on_ranks(1, too_large, tmp_path / "data", tmp_path / "run")
