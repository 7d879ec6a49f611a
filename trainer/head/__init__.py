"""The sharded head: class centres, of which each rank holds some rows, plus a margin; usable in any training loop."""

from trainer.head.head import Head
from trainer.head.optimizer import HeadOptimizer

__all__ = ["Head", "HeadOptimizer"]
