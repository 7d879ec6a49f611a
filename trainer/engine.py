"""DeepSpeed around the backbone: the only door to it.

The backbone's gradients are averaged over the ranks (by DeepSpeed where ZeRO partitions them), clipped and stepped. The
head's centres stay outside: its parameters are never given to the engine, so neither average nor clipping touches them.

The state is read and written as full fp32 tensors by parameter name, never as DeepSpeed's own files: those are pickles,
and refuse another number of ranks.
"""

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from trainer.backbones.average import Average
from trainer.backbones.blocks import rate_factors, recompute
from trainer.backbones.norms import leave_across_uncompiled
from trainer.backbones.places import Layout, Places, place
from trainer.config import Config, OptimizerConfig
from trainer.distributed import Group, average_buffers
from trainer.errors import UserError
from trainer.gradients import Gradients
from trainer.head.head import mixed_seed

# Optimizer states of a parameter that have its shape, by torch's names.
_MOMENTS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}
_STEP_KEY = "optimizer.step"
_DROPOUT = 5  # see `mixed_seed`


class Engine:
    """A DeepSpeed engine that trains `module` and nothing else.

    A sample's place in the global batch decides what batch norm and dropout do with it (`backbones.places`).

    With `engine.accumulate` a forward keeps no activations: the backward sends the parts of the batch through the
    backbone again, one by one, each with its part of the embeddings' gradient (Gao et al. 2021, arXiv 2101.06983).
    Every loss sees the whole batch, so that losses and gradients are those of the whole batch, too.

    Args:
        module: the backbone, float pixels BCHW to embeddings x_BD; its batch norms and dropouts are exchanged.
        config: `engine`, `optimizer` (the learning rate comes with each `step`), and the batch over all ranks.
        device: where this rank computes.

    Raises:
        UserError: bf16 on a device that cannot compute it, a batch that cannot be cut as the config says, a pattern of
            `optimizer.rates` that fits nothing, or no compiler where one is needed.
    """

    def __init__(self, module: nn.Module, config: Config, device: torch.device) -> None:
        if device.type == "cuda" and config.engine.bf16 and not torch.cuda.is_bf16_supported():
            raise UserError("engine.bf16=true: this GPU does not compute in bfloat16; set engine.bf16=false")
        self.module = module  # with this rank's buffers
        self._config, self._group = config, Group.current()
        _check_parts(config, self._group)
        key, first = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self._places = Places(self._group, config.backbone.norm_group, key, first)
        place(module, self._places)
        if config.backbone.recompute:
            recompute(module)
        if config.backbone.compile:
            _check_compiler()
            leave_across_uncompiled()
            module.compile()
        self._moments = _MOMENTS[config.optimizer.name]
        self._engine = _initialize(module, config, device)
        if config.backbone.channels_last and not self._partitioned:  # ZeRO lays weights out itself, one behind another
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        together = self._group.size > 1 and not self._partitioned  # one rank alone needs no buffer
        self._gradients = Gradients(module.parameters(), self._group) if together else None
        self._engine.enable_backward_allreduce = self._partitioned
        self._create_moments()
        self._average = Average(module, config.engine.ema_decay) if config.engine.ema_decay else None
        self._held: tuple[torch.Tensor, torch.Tensor] | None = None
        # Entered for each forward of the backbone.
        self.around_forward: AbstractContextManager[object, bool | None] = nullcontext()

    def __call__(self, images_BCHW: torch.Tensor, step: int = 0) -> torch.Tensor:
        """Embeddings x_BD, always fp32, of float pixels; with bf16 the products run in bf16 over fp32 weights.

        Args:
            images_BCHW: this rank's share of the global batch of the run's `step`.
        """
        self._places.key.fill_(mixed_seed(self._config.run.torch_seed, step, _DROPOUT))
        self._places.observes = True
        if self._config.backbone.channels_last and images_BCHW.ndim == 4:
            images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        if self._config.engine.accumulate == 1:
            return self._forward(images_BCHW, 0)
        with torch.no_grad():
            x_BD = torch.cat([self._forward(part, index) for index, part in enumerate(self._parts(images_BCHW))])
        self._held = images_BCHW, x_BD.requires_grad_()
        return x_BD

    def _parts(self, values_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return values_B.chunk(self._config.engine.accumulate)

    def _forward(self, images_bCHW: torch.Tensor, index: int) -> torch.Tensor:
        """Embeddings of one part of this rank's share."""
        samples, parts = len(images_bCHW), self._config.engine.accumulate
        self._places.begins = index == 0
        self._places.at((self._group.rank * parts + index) * samples, samples, self._group.size * parts * samples)
        with self.around_forward:
            x_bD: torch.Tensor = self._engine(images_bCHW)
        return x_bD.float()

    def backward(self, loss: torch.Tensor) -> None:
        """Back-propagate; the backbone's gradients are averaged over the ranks, the head's are left alone."""
        self._places.observes = False  # what goes through the backbone from here on has done so before
        self._backward(loss)
        if self._gradients is not None:
            self._gradients.average()

    def _backward(self, loss: torch.Tensor) -> None:
        if self._held is None:
            self._engine.backward(loss)
            return
        (images_BCHW, x_BD), self._held = self._held, None
        loss.backward()  # type: ignore[no-untyped-call]
        assert x_BD.grad is not None
        for index, (part, d_part) in enumerate(zip(self._parts(images_BCHW), self._parts(x_BD.grad), strict=True)):
            if index:
                self._engine.step()  # counts the part before; the last one's is `step`
            self._engine.backward((self._forward(part, index) * d_part).sum(), scale_wrt_gas=False)

    def step(self, lr: float) -> None:
        """Clip, update the backbone with learning rate `lr`, and clear its gradients."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        self._engine.step()
        if self._average is not None:
            self._average.update()

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """The backbone as evaluations see it while the block runs: statistics of all ranks, and where the config wants
        it the average of the weights. A collective."""
        average_buffers(self.module, self._group)
        averaged = self._average is not None and self._config.engine.ema_evaluated
        with self._average.in_place(self._group) if averaged and self._average else nullcontext():
            yield self.module

    def gradient_norm(self) -> float | None:
        """Norm of the backbone's gradient before the last step's clipping; None where DeepSpeed does not compute it."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def memory(self) -> dict[str, int]:
        """Bytes that this rank holds from its first step on, by what they are for."""
        optimizer, parameters = self._engine.basic_optimizer, list(self.module.parameters())
        weights = sum(tensor.nbytes for tensor in (*parameters, *self.module.buffers()))
        sharded = self._group.size if self._config.engine.zero_stage == 2 else 1
        stepped = [own for group in optimizer.param_groups for own in group["params"]]
        masters = sum(own.nbytes for own in stepped) if self._partitioned else 0
        moments = sum(value.nbytes for own in optimizer.state.values() for value in own.values())
        average = 0 if self._average is None else self._average.nbytes
        parts = {"weights": weights, "gradients": sum(p.numel() for p in parameters) * 4 // sharded, "moments": moments}
        return parts | {"master weights": masters, "moving average": average}

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of `tensors`."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Master weights, moments and buffers in full, by name; what ZeRO has partitioned is put together one tensor at
        a time. A collective: every rank takes all of them, and gets the same."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        yield from ((f"buffer.{name}", buffer) for name, buffer in self.module.named_buffers())
        for name, parameter in self.module.named_parameters():
            if self._partitioned:
                yield f"weight.{name}", safe_get_full_fp32_param(parameter)
                yield from ((f"{key}.{name}", safe_get_full_optimizer_state(parameter, key)) for key in self._moments)
            else:
                yield f"weight.{name}", parameter
                own = self._engine.optimizer.state[parameter]
                yield from ((f"{key}.{name}", own[key]) for key in self._moments)
        if self._average is not None:
            yield from ((f"ema.{name}", value) for name, value in self._average.state(self._group).items())
        steps = [int(own["step"]) for own in self._engine.basic_optimizer.state.values() if "step" in own]
        yield _STEP_KEY, torch.tensor(max(steps, default=0))

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from what `state` returned, at any number of ranks.

        Raises:
            UserError: a tensor is missing or has another shape, so the checkpoint is of another backbone.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        device = self._engine.device
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                weight = _take(state, f"weight.{name}", parameter.shape).to(device)
                moments = {key: _take(state, f"{key}.{name}", parameter.shape).to(device) for key in self._moments}
                parameter.copy_(weight)
                if self._partitioned:
                    safe_set_full_fp32_param(parameter, weight)
                    for key, value in moments.items():
                        safe_set_full_optimizer_state(parameter, value, key)
                else:
                    self._engine.optimizer.state[parameter].update(moments)
            for name, buffer in self.module.named_buffers():
                buffer.copy_(_take(state, f"buffer.{name}", buffer.shape))
            for own in self._engine.basic_optimizer.state.values():
                if "step" in own:  # AdamW's bias correction counts the steps beside the moments
                    own["step"] = torch.tensor(float(state[_STEP_KEY]))
        if self._average is not None:
            prefix = "ema."
            average = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            self._average.load(average)

    @property
    def _partitioned(self) -> bool:
        """Whether DeepSpeed keeps the weights and moments of a rank's share in flat partitions (ZeRO 1 and 2)."""
        return self._engine.optimizer is not self._engine.basic_optimizer

    def _create_moments(self) -> None:
        """Give every parameter its moments before the first step; zeros are what the first step would start from.

        ZeRO ties parameters to their moments after the first group's first step, when the later groups have none yet;
        tied here instead, every moment can be read and written from the start.
        """
        optimizer = self._engine.basic_optimizer
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter] = {key: torch.zeros_like(parameter) for key in self._moments}
                if "exp_avg" in self._moments:
                    optimizer.state[parameter]["step"] = torch.tensor(0.0)
        if self._partitioned:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def _take(state: dict[str, torch.Tensor], name: str, shape: torch.Size) -> torch.Tensor:
    if name not in state or state[name].shape != shape:
        found = "missing" if name not in state else f"of shape {tuple(state[name].shape)}"
        raise UserError(
            f"the checkpoint's '{name}' is {found}, the backbone wants {tuple(shape)}: "
            "resume with the config that the checkpoint was made with"
        )
    return state[name]


def _check_parts(config: Config, group: Group) -> None:
    """Refuse, with a UserError, a share that cannot be cut into parts, or parts that cut groups of batch norm."""
    parts, share = config.engine.accumulate, config.data.batch_size // group.size
    norm_group = config.backbone.norm_group
    if parts == 1:
        return
    if share % parts:
        raise UserError(
            f"engine.accumulate={parts} does not divide the {share} samples of a worker; choose a divisor of them"
        )
    if Layout.of(0, share // parts, config.data.batch_size, norm_group).across:
        raise UserError(
            f"engine.accumulate={parts} sends {share // parts} samples at once through the backbone, which cuts the "
            f"groups of backbone.norm_group={norm_group}; choose a norm_group that divides {share // parts}"
        )


def _check_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"backbone.compile=true needs a C++ compiler, and there is no '{compiler}' here; install one, name it in "
            "CXX, or set backbone.compile=false"
        )


def _optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """No decay on biases, norms and PReLU. Parameters with the same factor of the learning rate are one group."""
    factors = rate_factors(module, config.layer_decay, config.rates)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((decay, factors[name]), []).append(parameter)
    settings = [
        {"params": parameters, "weight_decay": decay, "factor": factor}
        for (decay, factor), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
    if config.name == "sgd":
        return torch.optim.SGD(settings, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)
    return torch.optim.AdamW(settings, lr=config.lr)


def import_deepspeed(device: str) -> Any:
    """DeepSpeed for this type of device."""
    # DeepSpeed picks its accelerator from this variable when it is first imported, hence before the import.
    os.environ.setdefault("DS_ACCELERATOR", device)
    # Its autotuner wants MLflow if that is there. Nobody tunes here, and the import would take longer than DeepSpeed's.
    absent = "mlflow" not in sys.modules
    if absent:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed
    finally:
        if absent:
            del sys.modules["mlflow"]
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    # On the CPU, DeepSpeed compiles a shared-memory collective at its first use (20 s, and a C++ compiler). Only
    # inference_all_reduce calls it, which training never does: declare it unavailable.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def _initialize(module: nn.Module, config: Config, device: torch.device) -> Any:
    deepspeed = import_deepspeed(device.type)
    # The default bucket reserves 2 GB; none needs to be larger than the backbone.
    bucket = min(sum(p.numel() for p in module.parameters()), 500_000_000)
    stage: int = config.engine.zero_stage
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if config.engine.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    settings = {
        "train_batch_size": config.data.batch_size,
        "train_micro_batch_size_per_gpu": config.data.batch_size // Group.current().size // config.engine.accumulate,
        "gradient_accumulation_steps": config.engine.accumulate,
        "gradient_clipping": config.engine.gradient_clipping,
        # Autocast keeps the weights, the moments and the batch norms in fp32. ZeRO would send the gradients of the
        # modules in the list in bf16; with none there, every stage adds gradients up in fp32, as stage 0 always does.
        "torch_autocast": {"enabled": config.engine.bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's own steps on the CPU, too; DeepSpeed's need a compiler
        "zero_optimization": zero,
        "steps_per_print": 2**31 - 1,
    }
    optimizer = _optimizer(module, config.optimizer)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)[0]
