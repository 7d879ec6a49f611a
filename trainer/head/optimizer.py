"""The optimizer of the head: it steps this rank's rows of the class centres, and the few numbers beside them.

Legend: R rows of this rank, D dimension, n rows of a block. It never sends anything: a rank holds whole rows, and the
gradient of numbers that all ranks share is already summed.

For a row w with gradient G (`lr` the learning rate, mu the momentum):
  sgd     v <- mu v + G;                                            u = v
  adamw   m <- b1 m + (1-b1) G; q <- b2 q + (1-b2) G^2;             u = m' / (sqrt(q') + eps), both bias-corrected
Rows with a length:  w <- w - lr u, with decay: sgd adds decay w to G, adamw takes lr decay w from w.
Unit rows:           the part along w is taken out (sgd: of v, adamw: of G and of u), and w <- (w - lr u) / |w - lr u|.
For SGD that one projection also carries old momentum to where the row is now. Decay only shortens a row, which the
division undoes, so unit rows have none.

With sampling the gradient is sparse, and rows that took no part are neither read nor written: their momentum waits,
and AdamW's bias correction counts each row's own steps.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.head.head import Head, mixed_seed
from trainer.head.rounding import Noise, RowState, block_size, to_bf16
from trainer.head.rows import GradientSink, Rows
from trainer.losses.margins import MAX_SCALE

EPS = 1e-8
LEAST_SCALE = 1e-3
_ROUNDING = 4  # see `mixed_seed`
_FIRST, _SECOND, _WEIGHT = 0, 1, 2  # uses of the rounding's random bits


class HeadOptimizer:
    """SGD with momentum or AdamW for a `Head`, by `head.config.optimizer`: `step(lr)` after a backward, `zero_grad()`.

    With `HeadConfig.fused` the rows are stepped during the backward, tile by tile, so that their gradient is never
    stored; `prepare(lr)` then must be called before each backward, and `step` updates what is left.
    """

    def __init__(self, head: Head) -> None:
        config = head.config.optimizer
        self.head, self.config = head, config
        weight, adam = head.weight, config.name == "adamw"
        self.first = RowState(weight, config.state_dtype)
        self.second = RowState(weight, config.state_dtype) if adam else None
        self.steps_R1 = torch.zeros(len(weight), 1, dtype=torch.int32, device=weight.device) if adam else None
        self.count = torch.zeros((), dtype=torch.int64)
        self.small = {name: p for name, p in head.named_parameters() if p is not weight}
        self.small_first = {name: torch.zeros_like(p) for name, p in self.small.items()}
        self.small_second = {name: torch.zeros_like(p) for name, p in self.small.items()} if adam else {}
        self._first_row = head.rows.start * head.centres
        self._noise: Noise | None = None
        self._by_kernel = head.uses_kernels and not adam
        self._rounds = not self._by_kernel and (config.state_dtype != "fp32" or weight.dtype == torch.bfloat16)
        self.armed: float | None = None
        if head.config.fused:
            head.sink = _StepSink(self)

    def prepare(self, lr: float) -> None:
        """The learning rate of the coming backward, for a fused head; else it does nothing."""
        if self.head.config.fused:
            self._begin()
            self.armed = lr

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One step with the learning rate `lr`; parameters without a gradient keep their value and state."""
        gradient = self.head.weight.grad
        if not self.head.config.fused:
            self._begin()
        sink = self.head.sink
        if gradient is not None and gradient is sink.sparse:
            self.step_rows(sink.places, sink.gradient_RD, lr)
        elif gradient is not None and gradient.is_sparse:
            gradient = gradient.coalesce()
            self.step_rows(gradient.indices()[0], gradient.values(), lr)
        elif gradient is not None:
            self.step_rows(slice(0, gradient.shape[0]), gradient, lr)
        for name, parameter in self.small.items():
            self._step_small(name, parameter, lr)

    def zero_grad(self) -> None:
        """Forget the gradients; their memory is used again in the next backward."""
        for parameter in self.head.parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors. `rows.*` have a row for each row of `head.weight`, `classes.bias.*` a number a class of this
        rank, `shared.*` are equal on all ranks."""
        state = self.first.tensors("rows.first")
        if self.second is not None and self.steps_R1 is not None:
            state |= self.second.tensors("rows.second") | {"rows.steps": self.steps_R1}
        for kind, tensors in (("first", self.small_first), ("second", self.small_second)):
            for name, tensor in tensors.items():
                state[f"{'classes' if name == 'bias' else 'shared'}.{name}.{kind}"] = tensor
        return state | {"shared.count": self.count}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()` of the same rows.

        Raises:
            UserError: the state is of another optimizer or type.
        """
        own = self.state_dict()
        for name, tensor in own.items():
            if name not in state or state[name].shape != tensor.shape or state[name].dtype != tensor.dtype:
                found = "absent" if name not in state else f"{state[name].dtype} {tuple(state[name].shape)}"
                raise UserError(
                    f"the stored optimizer state '{name}' is {found} where {tensor.dtype} {tuple(tensor.shape)} is "
                    "needed; resume with the head.optimizer settings that the checkpoint was written with"
                )
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def _begin(self) -> None:
        """A new step: new random bits for rounding."""
        self.count += 1
        if self._rounds:
            seed = mixed_seed(self.head.seed, int(self.count), _ROUNDING)
            self._noise = Noise(seed, self.head.dimension, self.head.weight.device)

    def step_rows(self, rows: slice | Tensor, gradient_nD: Tensor, lr: float) -> None:
        """Step these rows of this rank: by one kernel, or in blocks."""
        if self._by_kernel:
            self._step_by_kernel(rows, gradient_nD, lr)
            return
        if self.head.uses_kernels and isinstance(rows, Tensor):  # padded
            some = rows >= 0
            rows, gradient_nD = rows[some], gradient_nD[some]
        for block, part in self._blocks(rows):
            self._step_block(block, gradient_nD[part], lr)

    def _step_by_kernel(self, rows: slice | Tensor, gradient_nD: Tensor, lr: float) -> None:
        from trainer.head import kernels

        config, unit = self.config, self.head.unit_rows
        seed = mixed_seed(self.head.seed, int(self.count), _ROUNDING)
        step = kernels.SgdStep(lr, config.momentum, config.weight_decay, unit, seed, self._first_row)
        kernels.step_rows(self.head.weight, gradient_nD, self.first.values_RD, self.first.scale_R1, rows, step)

    def _blocks(self, rows: slice | Tensor) -> Iterator[tuple[slice | Tensor, slice]]:
        """Blocks of rows, and where they are in the gradient; slices end where a block of all ranks' rows does."""
        size = block_size(self.head.weight.device)
        if not isinstance(rows, slice):
            for start in range(0, rows.shape[0], size):
                yield rows[start : start + size], slice(start, start + size)
            return
        start = rows.start
        while start < rows.stop:
            stop = min(start + size - (self._first_row + start) % size, rows.stop)
            yield slice(start, stop), slice(start - rows.start, stop - rows.start)
            start = stop

    def _bits(self, rows: slice | Tensor, use: int) -> Tensor | None:
        if self._noise is None:
            return None
        first = self._first_row
        shifted = slice(rows.start + first, rows.stop + first) if isinstance(rows, slice) else rows + first
        return self._noise(shifted, use)

    def _step_block(self, rows: slice | Tensor, gradient_nD: Tensor, lr: float) -> None:
        weight, config, unit = self.head.weight, self.config, self.head.unit_rows
        w_nD = weight[rows].float()
        if config.name == "sgd":
            if not unit and config.weight_decay:
                gradient_nD = gradient_nD.float().add(w_nD, alpha=config.weight_decay)
            u_nD = self.first.read(rows).mul_(config.momentum).add_(gradient_nD)
            if unit:
                _project(u_nD, w_nD)
            self.first.write(rows, u_nD, self._bits(rows, _FIRST))
        else:
            u_nD = self._adam(rows, _project(gradient_nD.float().clone(), w_nD) if unit else gradient_nD.float())
            if unit:
                _project(u_nD, w_nD)
            elif config.weight_decay:
                u_nD.add_(w_nD, alpha=config.weight_decay)
        w_nD.sub_(u_nD, alpha=lr)
        if unit:
            w_nD.div_(torch.linalg.vector_norm(w_nD, dim=1, keepdim=True))
        if weight.dtype == torch.bfloat16:
            bits = self._bits(rows, _WEIGHT)
            assert bits is not None
            weight[rows] = to_bf16(w_nD, bits)
        elif not isinstance(rows, slice):
            weight[rows] = w_nD

    def _adam(self, rows: slice | Tensor, gradient_nD: Tensor) -> Tensor:
        """AdamW's direction. The second moment is kept as its root, whose range 8 bits can span; where a root is below
        the row's smallest step it counts as that step, so that rounding to 0 cannot blow a step up."""
        assert self.second is not None
        assert self.steps_R1 is not None
        beta1, beta2 = self.config.momentum, self.config.beta2
        steps_n1 = self.steps_R1[rows] + 1
        self.steps_R1[rows] = steps_n1
        m_nD = self.first.read(rows).lerp_(gradient_nD, 1 - beta1)
        self.first.write(rows, m_nD, self._bits(rows, _FIRST))
        root_nD = self.second.read(rows)
        root_nD = (root_nD.square_().mul_(beta2).addcmul_(gradient_nD, gradient_nD, value=1 - beta2)).sqrt_()
        self.second.write(rows, root_nD, self._bits(rows, _SECOND))
        quantum_n1 = self.second.quantum(rows)
        if quantum_n1 is not None:
            root_nD = torch.maximum(root_nD, quantum_n1)
        correction_n1 = (1 - beta1**steps_n1).reciprocal_()
        root_nD = root_nD / (1 - beta2**steps_n1).sqrt_() + EPS
        return m_nD * correction_n1 / root_nD

    def _step_small(self, name: str, parameter: Tensor, lr: float) -> None:
        """A bias or a learnable scalar: fp32 state, no decay."""
        gradient = parameter.grad
        if gradient is None:
            return
        where: Tensor | slice = slice(None)
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            where, gradient = gradient.indices()[0], gradient.values()
        value, first, gradient = parameter.data.view(-1), self.small_first[name].view(-1), gradient.view(-1)
        if self.config.name == "sgd":
            u = first[where] * self.config.momentum + gradient
            first[where] = u
        else:
            beta1, beta2 = self.config.momentum, self.config.beta2
            count: int | Tensor = int(self.count)
            if name == "bias" and self.steps_R1 is not None:
                count = self.steps_R1[where, 0]  # a class' bias is stepped when its row is
            second = self.small_second[name].view(-1)
            m, q = first[where].lerp(gradient, 1 - beta1), second[where].lerp(gradient.square(), 1 - beta2)
            first[where], second[where] = m, q
            u = m / (1 - beta1**count) / ((q / (1 - beta2**count)).sqrt() + EPS)
        value[where] = value[where] - lr * u
        if name.startswith("scalars."):  # a length given to embeddings: outside, the loss would turn or overflow
            value.clamp_(LEAST_SCALE, MAX_SCALE)


class _StepSink(GradientSink):
    """Uses each tile of the rows' gradient up at once; see `HeadOptimizer.prepare`."""

    keeps = False

    def __init__(self, optimizer: HeadOptimizer) -> None:
        super().__init__(optimizer.head.weight)
        self.optimizer = optimizer

    def begin(self, rows: Rows) -> bool:
        if self.optimizer.armed is None:
            raise RuntimeError("a fused head needs HeadOptimizer.prepare(lr) before each backward")
        return False

    def tile(self, start: int, stop: int) -> Tensor:
        if self.gradient_RD.shape[0] < stop - start:
            self.gradient_RD = self.weight.new_empty(stop - start, self.weight.shape[1], dtype=torch.float32)
        return self.gradient_RD[: stop - start]

    def finished(self, places: slice | Tensor, gradient: Tensor) -> None:
        assert self.optimizer.armed is not None
        self.optimizer.step_rows(places, gradient, self.optimizer.armed)

    def end(self, rows: Rows) -> None:
        self.optimizer.armed = None


def _project(values_nD: Tensor, w_nD: Tensor) -> Tensor:
    """In place: without the part along each unit row."""
    return values_nD.sub_(w_nD * (values_nD * w_nD).sum(dim=1, keepdim=True))
