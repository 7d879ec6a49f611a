"""The sharded head: class centres, of which each rank holds some rows, plus a margin; usable in any training loop.

It needs torch alone, no Ray, no DeepSpeed and no Config. The same lines run in one process and under torchrun, where
each rank holds its share of the centres and brings its own part of the batch:

    import torch
    from trainer.distributed import sum_not_mean
    from trainer.head import Head, HeadOptimizer
    from trainer.losses import ArcFace

    if torch.distributed.is_initialized():
        model = torch.nn.parallel.DistributedDataParallel(model)
    head = Head(ArcFace(scale=16.0, margin=0.2), classes=1000, dimension=128)
    centres, weights = HeadOptimizer(head), torch.optim.SGD(model.parameters(), lr=0.1)
    for images, labels in batches:
        embeddings = sum_not_mean(model(images), head.group)  # DDP takes means; the head's gradients want the sum
        loss = head(embeddings, labels)  # the mean over all ranks' samples, equal on every rank
        loss.backward()
        weights.step(), weights.zero_grad()
        centres.step(lr=1.0), centres.zero_grad()

Which losses there are says `trainer.losses`; `HeadConfig` has the number formats, class sampling, and stepping inside
the backward.
"""

from trainer.head.head import Head
from trainer.head.optimizer import HeadOptimizer
from trainer.head.settings import HeadConfig, HeadOptimizerConfig

__all__ = ["Head", "HeadConfig", "HeadOptimizer", "HeadOptimizerConfig"]
