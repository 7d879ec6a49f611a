"""The sharded head: class centres, of which each rank holds some rows, plus a margin. (x, labels) -> loss.

Legend: b samples of this rank, B of all ranks, C classes, R rows of this rank (its classes x K centres), D dimension.

One step, on every rank:
  1. all-gather of embeddings and labels (`distributed.Gatherer`); every rank then computes e_BD from them
  2. this rank's part of the denominator, without the targets (`tiles.negatives`), and, for the samples whose
     class it owns, the target's logit t (`Margin.target`)
  3. ONE all-reduce of [B, 2]: the denominator's sum, and t (a rank that does not own a target puts 0)
  4. the loss from both, the same on every rank
and in the backward one reduce-scatter of the embeddings' gradient: three messages. More are sent by margins that
compare samples (all targets' cosines, [B], between 1 and 2) and by learnable scalars (4 bytes, backward).
Where logits have no bound, message 3 is an all-gather of [B, 2] with log sums.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from trainer.distributed import Gatherer, Group, RowRange, own_slice, replicated, stack_over_ranks, sum_over_ranks
from trainer.errors import UserError
from trainer.head.matmul import Workspace, free_memory
from trainer.head.rows import GradientSink, Own, Rows, own_centres, sampled_rows, sampled_share
from trainer.head.settings import HeadConfig
from trainer.head.softening import Hardening, uses_kernels
from trainer.head.tiles import TilePlan, fixed_shift, negatives
from trainer.losses.batch import widened
from trainer.losses.margins import Margin, Positives

INIT_BLOCK = 1024  # classes whose first values come from one seed, so that W does not depend on the number of ranks
STORE_SHARE = 0.25  # of the free memory that P may take for `algorithm: auto` to keep it
# Classes a tile. On a CPU what its cache holds of z; on a GPU enough to fill it. Where nothing but the result is of the
# tile's size, larger ones save launches.
CPU_TILE, GPU_TILE, BARE_TILE = 8192, 131_072, 1_048_576


class Head(nn.Module):
    """Class centres, sharded by rows, plus a margin.

    `head(x_bD, labels_b, keys)` is the mean loss over the valid samples of the *global* batch, equal on all ranks. Its
    backward gives x the exact gradient of that mean by this rank's samples (see `distributed.sum_not_mean` for engines
    that average over ranks), and writes this rank's rows of `weight.grad`:

    - of `unit_rows` the gradient's part along the row has no meaning; the optimizer removes it.
    - with sampling it is a sparse tensor over the sampled rows.
    - its memory is used again in the next step; copy what must last.

    Call `set_progress` before each step: the margin's warmup, class sampling and random margins follow it.

    Attributes:
        rows: the classes of this rank.
        weight: [R, D], row k of class c at (c - rows.start) * K + k.
        unit_rows: whether the rows of `weight` are unit vectors, to be kept so by the optimizer.
        bias: [classes of this rank], or None.
        scalars: the margin's learnable numbers, held by every rank.
        group: the ranks, with `group.traffic` counting what is sent.
    """

    def __init__(
        self,
        margin: Margin,
        classes: int,
        dimension: int,
        config: HeadConfig | None = None,
        *,
        seed: int = 0,
        class_counts: Sequence[int] | Tensor | None = None,
        device: torch.device | str = "cpu",
        group: Group | None = None,
    ) -> None:
        """
        Args:
            classes: C, of all ranks together.
            class_counts: samples of each class, [C]; for class weights and margins by frequency.
            group: the ranks; default: `Group.current()`.

        Raises:
            UserError: fewer than two classes, or a margin outside what so many classes allow.
        """
        super().__init__()
        if classes < 2:
            raise UserError(f"{classes} class(es) cannot be told apart; a head needs at least 2")
        self.margin = margin.resolve(classes, dimension)
        self.classes, self.dimension, self.seed = classes, dimension, seed
        self.config = config or HeadConfig()
        self.group = group or Group.current()
        self._gather = Gatherer(classes, dimension, self.group, "head")
        self.rows = RowRange.of(classes, self.group.rank, self.group.size)
        self.centres = self.margin.centres_per_class()
        self.unit_rows = self.margin.unit_rows and self.config.rows == "unit"
        self._make_parameters(torch.device(device))
        self._class_values = self._per_class(class_counts)
        self.sink = GradientSink(self.weight)
        self._memory = Workspace()
        self._step, self._warmup = 0, 1.0
        self._store: bool | None = None

    def _make_parameters(self, device: torch.device) -> None:
        dtype = torch.bfloat16 if self.config.param_dtype == "bf16" else torch.float32
        self.weight = nn.Parameter(self._first_rows(dtype, device))
        self.bias = nn.Parameter(torch.zeros(len(self.rows), device=device)) if self.margin.bias else None
        learnables = self.margin.learnables().items()
        self.scalars = nn.ParameterDict({name: nn.Parameter(torch.tensor(v, device=device)) for name, v in learnables})
        for name, value in self.margin.buffers().items():
            self.register_buffer(name, torch.tensor(value, device=device))

    @property
    def uses_kernels(self) -> bool:
        """Whether Triton's kernels compute; on the device where the head is now."""
        return uses_kernels(self.config.kernels, self.weight.device)

    @property
    def workspace_bytes(self) -> int:
        """Bytes that the products of a step have left for the next: P where it is stored, a tile of it where not."""
        buffers = {id(one): one.nbytes for one in (*self._memory.spares.values(), *self._memory.scratches.values())}
        return sum(buffers.values())

    def set_progress(self, step: int, warmup: float = 1.0) -> None:
        """Where the run is: the number of the step, and how far the margin's warmup has come, in [0, 1]."""
        self._step, self._warmup = step, warmup

    def forward(self, x_bD: Tensor, labels_b: Tensor, keys: Sequence[str] | None = None) -> Tensor:
        """The mean loss over the valid samples of the global batch; 0 where there is none.

        Args:
            x_bD: embeddings of this rank's samples, not normalised.
            labels_b: int64 classes, -1 for a slot that only fills the batch; equally many on every rank.
            keys: the samples' names, for messages.

        Raises:
            UserError: on every rank, if a label is no class, an embedding is not finite, or the ranks' batches differ
                in the first step.
        """
        found = self._gather(x_bD, labels_b, keys)
        margin = self.margin.at(self._step, self._warmup) if self.training else self.margin
        values = {name: replicated(scalar, self.group) for name, scalar in self.scalars.items()}
        values |= dict(self.named_buffers(recurse=False))
        step = Step(self, margin, found.x_BD, found.labels_B, values)
        loss = step.loss()
        found.raise_if_bad()
        for name, value in step.observed.items():  # only now: a bad sample must not leave its trace in them
            self.get_buffer(name).copy_(value)
        return loss

    def plan(
        self, margin: Margin, slots: int, classes: int, wide: torch.dtype, hardening: Hardening | None = None
    ) -> TilePlan:
        """How this step's tiles are computed, for `slots` samples of all ranks and the classes that take part."""
        dtype = torch.bfloat16 if self.config.compute_dtype == "bf16" and wide == torch.float32 else wide
        shift = None
        if bound := margin.bound():
            corrected = self.config.sample_correction and self.config.sample_rate < 1
            more = -math.log(sampled_share(self.config.sample_rate)) if corrected else 0.0
            shift = fixed_shift(bound[0], bound[1] + more, self.classes, wide)
        normalise = self.margin.unit_rows and not self.unit_rows
        copied = self.dimension if self.weight.is_cuda and dtype != self.weight.dtype else 0
        store = self._stores((slots + copied) * classes * self.centres * dtype.itemsize)
        tile = self.config.tile or (self._gpu_tile(store, dtype) if self.weight.is_cuda else CPU_TILE)
        tf32 = self.config.compute_dtype == "tf32"
        return TilePlan(
            *(classes, self.centres, tile, store, dtype, shift, normalise, hardening, self.uses_kernels, tf32),
            skip=self.config.skip_tolerance,
            unit_rows=self.unit_rows,
        )

    def _gpu_tile(self, store: bool, dtype: torch.dtype) -> int:
        bare = store and self.uses_kernels and dtype == torch.bfloat16 and not self.config.fused
        return BARE_TILE if bare else GPU_TILE

    def _stores(self, size: int) -> bool:
        """Whether P, of so many bytes, is kept for the backward; with `algorithm: auto` decided once, in the first step
        with a gradient. What is yet to be allocated for the rows' gradient is left free, and the optimizer's state is
        there already."""
        if self.config.algorithm != "auto":
            return self.config.algorithm == "store"
        if self._store is None:
            gradient = 0 if self.config.fused or self.weight.grad is not None else self.weight.nbytes
            store = size <= STORE_SHARE * (free_memory(self.weight.device) - gradient)
            if not torch.is_grad_enabled():
                return store
            self._store = store
        return self._store

    def _first_rows(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Random directions; each block of `INIT_BLOCK` classes from its own seed, whichever rank holds it. They are
        drawn on the device (10M rows on a CPU take minutes), so a GPU's differ from a CPU's."""
        K, D = self.centres, self.dimension
        weight = torch.empty(len(self.rows) * K, D, dtype=dtype, device=device)
        generator = torch.Generator(device)
        for block in range(self.rows.start // INIT_BLOCK, math.ceil(self.rows.stop / INIT_BLOCK)):
            generator.manual_seed(mixed_seed(self.seed, block, _INIT))
            values = nn.functional.normalize(torch.randn(INIT_BLOCK * K, D, generator=generator, device=device))
            first = block * INIT_BLOCK
            begin, end = max(first, self.rows.start), min(first + INIT_BLOCK, self.rows.stop)
            part = values[(begin - first) * K : (end - first) * K]
            weight[(begin - self.rows.start) * K : (end - self.rows.start) * K] = part
        return weight

    def _per_class(self, counts: Sequence[int] | Tensor | None) -> Tensor | None:
        """The margin's number for each of all C classes: 4 bytes a class, on every rank."""
        if counts is not None and len(counts) != self.classes:
            raise UserError(f"class_counts has {len(counts)} numbers for {self.classes} classes; give one a class")
        if type(self.margin).per_class is Margin.per_class:
            return None
        if counts is None:
            raise UserError(f"{self.margin.name} depends on how many samples each class has; give class_counts")
        values = self.margin.per_class(torch.as_tensor(counts))
        return None if values is None else values.to(self.weight.device)


_INIT, _NOISE, _SAMPLING = 1, 2, 3  # what random numbers are for: no two uses share a seed


def mixed_seed(seed: int, position: int, use: int) -> int:
    """A seed for one use at one position (a step or a block of rows)."""
    return (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + use * 0x2545F4914F6CDD1D) % 2**63


def step_noise(seed: int, step: int, batch: int, device: torch.device | str = "cpu") -> Tensor:
    """The standard normal numbers of a step's samples, [B], by place in the global batch: on any number of ranks. They
    are drawn on the device, so a GPU's differ from a CPU's."""
    generator = torch.Generator(device).manual_seed(mixed_seed(seed, step, _NOISE))
    return torch.randn(batch, generator=generator, device=device)


class Step:
    """The computation of one loss; its parts share the gathered batch."""

    def __init__(self, head: Head, margin: Margin, x_BD: Tensor, labels_B: Tensor, values: dict[str, Tensor]) -> None:
        self.head, self.margin, self.labels_B, self.values = head, margin, labels_B, values
        self.valid_B = labels_B >= 0
        self.observed: dict[str, Tensor] = {}
        self.batch_cos_B: Tensor | None = None
        # Targets are B numbers: they are computed in fp64, since 1 - cos^2 of a fp32 cosine near 1 has few digits left.
        self.exact_BD = widened(x_BD)
        self.norms_B, inverse_B = _length(self.exact_BD)
        self.unit_BD = self.exact_BD * inverse_B[:, None]
        self.e_BD, self.lengths_B = x_BD, self.norms_B
        if margin.unit_embedding:
            scale = margin.scale_of(values)
            self.exact_BD = self.unit_BD * scale
            self.e_BD = self.exact_BD.to(x_BD.dtype)
            self.lengths_B = torch.ones_like(self.norms_B) * scale
        self.rows, self.own = self._rows()

    def _rows(self) -> tuple[Rows, Own]:
        """The classes that take part, and where among them each sample's own class is."""
        head, config = self.head, self.head.config
        rows, own = Rows(head.weight, head.bias, None, head.centres), Own.of(self.labels_B, head.rows)
        if not head.training or config.sample_rate == 1:
            return rows, own
        seed = mixed_seed(head.seed, head._step, _SAMPLING)
        choice = {"corrected": config.sample_correction, "padded": head.uses_kernels}
        return sampled_rows(rows, own, head.rows.start, config.sample_rate, seed, **choice)

    def loss(self) -> Tensor:
        """The mean over the valid samples of all ranks."""
        negatives_B, targets_B = self._exchange(*self.parts())
        losses_B = self.margin.per_sample(negatives_B, targets_B, self._class_values())
        extra_B = self.margin.regularizer(own_slice(self.norms_B, self.head.group))
        if extra_B is not None:
            losses_B = losses_B + extra_B.to(losses_B)
        return torch.where(self.valid_B, losses_B, 0).sum() / self.valid_B.sum().clamp_min(1)

    def parts(self) -> tuple[Tensor, Tensor, float | None]:
        """What this rank knows: its part of the denominator (its logarithm where the shift, which comes third, is
        None), and the targets' logits, 0 where another rank owns the class."""
        head, margin, rows = self.head, self.margin, self.rows
        plan = head.plan(margin, len(self.labels_B), len(rows), self.e_BD.dtype, self._observe())
        sums_B, centres_BKD, bias_B = negatives(self.e_BD, rows, self.own, plan, sink=head.sink, memory=head._memory)
        targets_B = margin.target(self._positives(centres_BKD, bias_B))
        return sums_B, torch.where(self.own.mask_B, targets_B, 0).to(sums_B), plan.shift

    @torch.no_grad()
    def _observe(self) -> Hardening | None:
        """Bring the margin's running statistics up to date; for those that compare samples, fetch all their cosines."""
        head, margin = self.head, self.margin
        positives, cos_B = None, None
        if margin.compares_samples:
            mine = self._positives(*own_centres(self.rows, self.own, self.e_BD.dtype))
            cos_B = head.group.all_reduce(torch.where(self.own.mask_B, mine.cos_B, 0))
            positives = replace(mine, cos_B=cos_B)
            self.batch_cos_B = cos_B
        if head.training:
            self.observed = margin.observe(self.norms_B, cos_B, self.valid_B, self.values)
            self.values |= self.observed
        if positives is None or not margin.reweights:
            return None
        least_B = margin.hard_from(positives).to(self.e_BD)
        numbers = (margin.scale_of(self.values), *margin.hard_cosine(self.values))
        return Hardening(torch.stack([least_B.new_zeros(()) + number for number in numbers]), least_B)

    def _exchange(self, sums_B: Tensor, targets_B: Tensor, shift: float | None) -> tuple[Tensor, Tensor]:
        """N and t of every sample, from each rank's part: one message of [B, 2]."""
        mine_B2 = torch.stack([sums_B, targets_B], dim=1)
        if shift is not None:
            total_B2 = sum_over_ranks(mine_B2, self.head.group)
            # The bound keeps S normal; only a sample without any negative (sampling, few classes) has 0: N = a minimum.
            least = torch.finfo(total_B2.dtype).tiny
            return total_B2[:, 0].clamp_min(least).log() + shift, total_B2[:, 1]
        all_WB2 = stack_over_ranks(mine_B2, self.head.group)
        return torch.logsumexp(all_WB2[:, :, 0], dim=0), all_WB2[:, :, 1].sum(dim=0)

    def _positives(self, centres_BKD: Tensor, bias_B: Tensor) -> Positives:
        """What the margin is told of each sample's own class; of several centres the nearest."""
        centres_BKD = centres_BKD.double()
        norms_BK, inverse_BK = _length(centres_BKD)
        cos_BK = (centres_BKD * self.unit_BD[:, None]).sum(dim=2) * inverse_BK
        cos_B = cos_BK.max(dim=1).values.clamp(-1, 1)
        lengths_B = self.lengths_B
        if self.margin.unit_rows:
            dots_B = lengths_B * cos_B
        else:
            lengths_B = lengths_B * norms_BK[:, 0]
            dots_B = (centres_BKD[:, 0] * self.exact_BD).sum(dim=1)
        noise_B = None
        if self.margin.noisy:
            noise_B = step_noise(self.head.seed, self.head._step, len(bias_B), self.e_BD.device)
        return Positives(
            *(cos_B, dots_B + bias_B, lengths_B, self.norms_B, self.labels_B, self.values),
            *(noise_B, self._class_values(), self.batch_cos_B),
        )

    def _class_values(self) -> Tensor | None:
        head, device = self.head, self.labels_B.device
        if head._class_values is None:
            return None
        head._class_values = head._class_values.to(device)  # the head may have been moved
        return head._class_values[self.labels_B.clamp(0, head.classes - 1)]


def _length(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """|v| over the last axis and 1/|v|; both 0, without gradient, where v is 0: such a vector has no direction."""
    square = vectors.square().sum(dim=-1)
    some = square > 0
    safe = torch.where(some, square, 1)
    return torch.where(some, safe.sqrt(), 0), torch.where(some, safe.rsqrt(), 0)
