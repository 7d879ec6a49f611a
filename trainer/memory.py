"""What to change when memory runs out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.config import Config
from trainer.errors import UserError
from trainer.pulse import PULSE


def advice(config: Config) -> str:
    """What a run with this config could do to need less, the cheapest first."""
    head = config.head
    changes = [
        ("engine.bf16=true", config.scaling.use_gpu and not config.engine.bf16),
        ("head.algorithm=recompute", head.algorithm != "recompute"),
        ("engine.zero_stage=2", config.scaling.most > 1 and config.engine.zero_stage < 2),
        ("head.optimizer.state_dtype=int8", head.optimizer.state_dtype != "int8"),
        ("head.param_dtype=bf16", head.param_dtype != "bf16"),
    ]
    wanted = [change for change, open_ in changes if open_]
    return ", or ".join([f"lower data.batch_size (now {config.data.batch_size})", *wanted, "take more workers"])


@contextmanager
def told(config: Config) -> Iterator[None]:
    """Say in one sentence that memory ran out, and what to change.

    Raises:
        UserError: in place of torch's and Python's errors.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's on a GPU is a RuntimeError, too
        wanted = str(error).partition("\n")[0]
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "DefaultCPUAllocator" not in wanted:
            raise
        detail = f" ({wanted[:200].rstrip('.')})" if wanted else ""
        raise UserError(f"out of memory at {PULSE}{detail}; {advice(config)}") from error
