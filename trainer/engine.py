"""DeepSpeed around the backbone: the only door to it.

The engine averages the backbone's gradients over the ranks, clips them and steps its optimizer. The head's centres stay
outside: its parameters are never given to the engine, so neither the average nor the clipping touches them.

The state is read and written as full fp32 tensors by parameter name, never as DeepSpeed's own files: those are pickles,
and refuse another number of ranks.
"""

import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from trainer.config import Config, OptimizerConfig
from trainer.distributed import Group
from trainer.errors import UserError

# Optimizer states of a parameter that have its shape, by torch's names.
_MOMENTS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}
_STEP_KEY = "optimizer.step"


class Engine:
    """A DeepSpeed engine that trains `module` and nothing else.

    Args:
        module: the backbone, float pixels BCHW to embeddings x_BD.
        config: `engine`, `optimizer` (the learning rate comes with each `step`), and the batch over all ranks.
        device: where this rank computes.

    Raises:
        UserError: bf16 on a device that cannot compute it.
    """

    def __init__(self, module: nn.Module, config: Config, device: torch.device) -> None:
        if device.type == "cuda" and config.engine.bf16 and not torch.cuda.is_bf16_supported():
            raise UserError("engine.bf16=true: this GPU does not compute in bfloat16; set engine.bf16=false")
        self.module = module  # with this rank's buffers
        self._moments = _MOMENTS[config.optimizer.name]
        self._engine = _initialize(module, config, device)
        self._create_moments()

    def __call__(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Embeddings x_BD, always fp32, of float pixels; with bf16 the products run in bf16 over fp32 weights."""
        x_BD: torch.Tensor = self._engine(images_BCHW)
        return x_BD.float()

    def backward(self, loss: torch.Tensor) -> None:
        """Back-propagate; the backbone's gradients are averaged over the ranks, the head's are left alone."""
        self._engine.backward(loss)

    def step(self, lr: float) -> None:
        """Clip, update the backbone with learning rate `lr`, and clear its gradients."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()

    def gradient_norm(self) -> float | None:
        """Norm of the backbone's gradient before the last step's clipping; None where DeepSpeed does not compute it."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

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


def _optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """No decay on biases, norms and PReLU."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)
    return torch.optim.AdamW(groups, lr=config.lr)


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
    zero = {"stage": config.engine.zero_stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    settings = {
        "train_batch_size": config.data.batch_size,
        "train_micro_batch_size_per_gpu": config.data.batch_size // Group.current().size,
        "gradient_clipping": config.engine.gradient_clipping,
        # Autocast keeps the weights, the moments and the batch norms in fp32. ZeRO would send the gradients of the
        # modules in the list in bf16; with none there, every stage adds gradients up in fp32, as stage 0 always does.
        "torch_autocast": {"enabled": config.engine.bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "steps_per_print": 2**31 - 1,
    }
    optimizer = _optimizer(module, config.optimizer)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)[0]
