"""The sharded head: class centres, of which each rank holds some rows, plus a margin; usable in any training loop.

It needs torch alone, no Ray, no DeepSpeed and no Config. README.md has the lines, which are the same in one process and
under torchrun. Which losses there are says `trainer.losses`; `HeadConfig` has the number formats, class sampling, and
stepping inside the backward.
"""

from trainer.head.head import Head
from trainer.head.optimizer import HeadOptimizer
from trainer.head.settings import HeadConfig, HeadOptimizerConfig

__all__ = ["Head", "HeadConfig", "HeadOptimizer", "HeadOptimizerConfig"]
