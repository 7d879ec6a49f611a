"""The Config: one frozen tree of pydantic models, read from one YAML file and dotted overrides.

Unknown keys are errors. The resolved tree is stored with every run (`Config.to_yaml`).
"""

import difflib
import operator
import re
from collections.abc import Sequence
from dataclasses import fields
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from trainer.data.augment import AugmentConfig
from trainer.data.remote import shown
from trainer.data.store import Address
from trainer.data.stream import DataConfig
from trainer.errors import UserError
from trainer.head.settings import HeadConfig
from trainer.losses import LOSSES, by_name
from trainer.losses.base import LossSpec
from trainer.losses.margins.cosine import ArcFace
from trainer.scaling import ScalingConfig
from trainer.schedule import ScheduleConfig
from trainer.storage import Folder
from trainer.strict import Strict
from trainer.tracking import TrackingConfig

if TYPE_CHECKING:
    Loss = LossSpec
else:  # the one whose name is given
    Loss = Annotated[reduce(operator.or_, LOSSES), Field(discriminator="name")]

# Keys that have another name now.
RENAMED = {
    "head.dtype": "head.compute_dtype",
    "head.weights": "head.param_dtype",
    "optimizer.head_name": "head.optimizer.name",
    "optimizer.head_lr": "head.optimizer.lr",
    "optimizer.head_momentum": "head.optimizer.momentum",
    "optimizer.head_beta2": "head.optimizer.beta2",
    "optimizer.head_weight_decay": "head.optimizer.weight_decay",
    "optimizer.head_state": "head.optimizer.state_dtype",
    "loss.selection": "loss.mining",
}


class BackboneConfig(Strict):
    """The network from samples to the embedding."""

    name: str = Field(
        "iresnet50", description="convnet, resnet14/20, iresnet18/34/50/100, mobilefacenet, vit, mlp, or timm:<name>"
    )
    dimension: int = Field(512, ge=2, le=8192, description="D of the embedding")
    width: int = Field(
        64,
        ge=4,
        le=1024,
        description="channels of the first stage (convnet, resnet14/20), units of a hidden layer (mlp)",
    )
    dropout: float = Field(0.0, ge=0, lt=1)
    norm_group: int = Field(
        32, ge=0, description="samples that a batch norm takes together, on any number of workers; 0: the global batch"
    )
    recompute: bool = Field(False, description="activations inside the blocks again in the backward: less memory")
    channels_last: bool = Field(False, description="images and weights in NHWC order: faster convolutions on GPUs")
    compile: bool = Field(False, description="by torch.compile; the first steps take minutes")

    @field_validator("norm_group")
    @classmethod
    def _more_than_one(cls, value: int) -> int:
        if value == 1:
            raise ValueError("1 sample is its own mean, so that a batch norm forgets it; take 0 or 2 and more")
        return value


class InitConfig(Strict):
    """What a training begins with; a run that goes on from its checkpoint has that."""

    weights: Path | None = Field(
        None,
        description="folder of a run, a checkpoint or an embedder whose backbone's weights are taken; null: random",
    )
    which: Literal["trained", "ema"] = Field("trained", description="of a run or checkpoint: or the moving average")
    centres: Literal["means", "random"] = Field("means", description="new class centres, where weights are taken")
    samples: int = Field(8, ge=1, le=1024, description="of an identity at most, for the mean of its class")


class OptimizerConfig(Strict):
    """Steps of the backbone, inside DeepSpeed; those of the head are `head.optimizer`."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    layer_decay: float = Field(1.0, gt=0, le=1, description="the learning rate of a layer is so much of the next one's")
    rates: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description="factors of the learning rate by pattern of parameter names, such as {'stem.*': 0.1}; 0: frozen"
    )


class EngineConfig(Strict):
    """DeepSpeed around the backbone."""

    zero_stage: Literal[0, 1, 2] = 0
    bf16: bool = False
    gradient_clipping: float = Field(0.0, ge=0, description="of the backbone's gradient norm; 0: off")
    accumulate: int = Field(
        1,
        ge=1,
        description="parts of a worker's batch that go through the backbone one by one: less memory, a third more work",
    )
    offload: bool = Field(False, description="the optimizer's state and steps on the CPU; with ZeRO 1 or 2")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="of a moving average of the weights; 0: none")
    ema_evaluated: bool = Field(True, description="whether evaluations take the moving average, where there is one")

    @model_validator(mode="after")
    def _offloads_a_share(self) -> "EngineConfig":
        if self.offload and not self.zero_stage:
            raise ValueError(
                "offload=true needs zero_stage 1 or 2, whose ranks hold a share of the state each; set one"
            )
        return self


class RunConfig(Strict):
    """Length of the run, and what is written when."""

    out: Address = Field(
        Path("runs/default"),
        description="folder of checkpoints and of the resolved config, or an address such as s3://bucket/run",
    )
    epochs: int = Field(20, ge=1)
    max_steps: int | None = Field(None, ge=1, description="stop earlier, after so many steps; the schedules end there")
    seed: int = Field(0, ge=0, lt=2**63)
    log_every: int = Field(10, ge=1, description="steps")
    eval_every: int = Field(1, ge=0, description="epochs between evaluations on the validation split; 0: never")
    collapse: bool = Field(False, description="neural collapse at each evaluation, on up to 512 training identities")
    checkpoint_every: int = Field(1000, ge=0, description="steps; 0: only at the end")
    keep_checkpoints: int = Field(2, ge=1, description="the newest so many stay, besides known-good ones")
    keep_best: str | None = Field(
        None, description="metric of the evaluation, such as val/rank1, whose best checkpoint stays, too"
    )
    on_divergence: Literal["stop", "skip", "back_off"] = Field(
        "stop",
        description="when a loss is not finite: skip leaves the batch out, and has to wait for a GPU in each step; "
        "back_off goes back to the trusted checkpoint and lowers the learning rate",
    )
    back_off: float = Field(0.5, gt=0, lt=1, description="factor of the learning rate whenever it goes back")

    @field_validator("out", mode="after")
    @classmethod
    def _a_folder(cls, value: Path | str) -> Path | str:
        if isinstance(value, str) and (value.startswith("http") or re.search(r"\?|://[^/@]*:[^/@]*@", value)):
            raise ValueError(
                f"'{shown(value)}' cannot be written to, or was given with a password; name a folder, or s3:// or "
                "gs://, and give credentials as the storage's own tools take them (environment or files)"
            )
        return Folder.at(value).address

    @property
    def torch_seed(self) -> int:
        """The seed for torch, whose generator on the CPU takes the lower 32 bits only: the upper ones are mixed in.

        A seed below 2**32 is itself.
        """
        return self.seed + (self.seed >> 32) * 0x9E3779B1


class Config(Strict):
    """Everything that decides a training run."""

    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    backbone: BackboneConfig = BackboneConfig()
    init: InitConfig = InitConfig()
    loss: Loss = ArcFace()
    auxiliary: tuple[Loss, ...] = Field((), description="further losses, each times its weight")
    head: HeadConfig = HeadConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig()
    run: RunConfig = RunConfig()

    @field_validator("loss", mode="before")
    @classmethod
    def _loss_by_name(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        return {"name": "arcface", **value} if isinstance(value, dict) else value

    @field_validator("auxiliary", mode="before")
    @classmethod
    def _losses_by_name(cls, value: Any) -> Any:
        return [{"name": item} if isinstance(item, str) else item for item in value]

    @model_validator(mode="after")
    def _enough_samples_for_the_ranks(self) -> "Config":
        if not self.world_sizes():
            workers, key = self.scaling.workers, "scaling.workers"
            what = f"{key} {workers}" if isinstance(workers, int) else f"any number in {key} {list(workers)}"
            raise ValueError(
                f"data.batch_size {self.data.batch_size} is not a multiple of {what}; "
                "every worker takes an equal part of the batch: change one of them"
            )
        return self

    def world_sizes(self) -> tuple[int, ...]:
        """The numbers of workers that `scaling.workers` allows and the batch can be shared by."""
        sizes = range(self.scaling.least, self.scaling.most + 1)
        return tuple(size for size in sizes if self.data.batch_size % size == 0)

    def head_lr(self) -> float:
        """`head.optimizer.lr`, or what null stands for.

        A unit row turns by an angle, whatever the backbone's weights are: its rate is not a multiple of theirs. Rows
        of 512 numbers that start with deviation 0.01 and are divided by their length turn alike at the rate 0.05.
        """
        optimizer = self.head.optimizer
        if optimizer.lr is not None:
            return optimizer.lr
        unit = self.loss.unit_rows and self.head.rows == "unit"
        return 1.0 if unit and optimizer.name == "sgd" else self.optimizer.lr

    def to_yaml(self) -> str:
        """The resolved tree, as YAML that `load` reads back to an equal tree."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load(path: Path | None, overrides: list[str] | None = None) -> Config:
    """Read a Config from a YAML file (None: all defaults) and `section.key=value` overrides, values in YAML.

    Raises:
        UserError: the file cannot be read, or a key or value is not allowed.
    """
    tree: Any = {}
    if path is not None:
        try:
            tree = yaml.safe_load(path.read_text()) or {}
        except OSError as error:
            raise UserError(f"cannot read the config '{path}': {error.strerror}; --config takes a YAML file") from error
        except yaml.YAMLError as error:
            raise UserError(f"the config '{path}' is not YAML: {error}") from error
        if not isinstance(tree, dict):
            raise UserError(f"the config '{path}' is a {type(tree).__name__}; it must be sections with keys")
    for override in overrides or []:
        _apply(tree, override)
    return from_tree(tree)


def from_tree(tree: dict[str, Any]) -> Config:
    """Validate a tree of plain values.

    Raises:
        UserError: one line per fault, each with the key, the value and what is allowed.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(fault) for fault in _leading(error.errors()))) from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override '{override}' has no value; write section.key=value, for example run.epochs=5")
    *parents, last = key.split(".")
    node: Any = tree
    for parent in parents:
        place = _place(node, parent, key)
        child = node[place] if isinstance(node, list) else node.get(place)
        if not isinstance(child, dict | list):
            child = node[place] = {"name": child} if isinstance(child, str) else {}
        node = child
    try:
        node[_place(node, last, key)] = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise UserError(f"the value of override '{override}' is not YAML: {error}") from error


def _place(node: Any, text: str, key: str) -> Any:
    """A word of an override as the key of a section, or as the position in a list."""
    if not isinstance(node, list):
        return text
    if not text.isdigit() or int(text) >= len(node):
        raise UserError(f"'{text}' in override '{key}' is not a position of a list of {len(node)}; count from 0")
    return int(text)


_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")


def _leading(faults: Sequence[Any]) -> list[Any]:
    """Without the second half of "neither a number nor 'auto'", where the number itself was wrong."""
    numbers = {tuple(fault["loc"][:-1]) for fault in faults if fault["type"] in _BOUNDS}
    return [fault for fault in faults if fault["type"] != "literal_error" or tuple(fault["loc"][:-1]) not in numbers]


def _explain(fault: Any) -> str:
    """One fault of pydantic's as one sentence: where, the value, what is allowed."""
    location = [str(part) for part in fault["loc"] if part != "constrained-float"]
    key = ".".join(location)
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):  # of a model, of a dataclass
        old = ".".join(part for part in location if part not in by_name())  # without the tag of a loss
        new = RENAMED.get(old)
        if location[0] == "auxiliary" and location[-1] == "selection":
            new = old.removesuffix("selection") + "mining"
        if new:
            return f"config: '{old}' is called '{new}' now; rename it"
        allowed = _keys_at(location[:-1])
        close = difflib.get_close_matches(location[-1], allowed, 1)
        hint = f"did you mean '{close[0]}'?" if close else f"allowed: {', '.join(allowed)}"
        return f"config: unknown key '{key}'; {hint}"
    words = str(fault["msg"]).removeprefix("Value error, ")
    message = words[:1].lower() + words[1:]
    if fault["type"] == "value_error":
        return f"config: {key + ': ' if key else ''}{message}"
    remedy = "; choose a value within this bound" if fault["type"] in _BOUNDS else ""
    return f"config: {key}={fault['input']!r}: {message}{remedy}"


def _keys_at(location: list[str]) -> list[str]:
    """The keys allowed in a section; through a tagged union the location names the tag after the field."""
    section: type = Config
    for part in location:
        found = _types(section).get(part)
        section = found if isinstance(found, type) else by_name().get(part, section)
    return list(_types(section))


def _types(section: Any) -> dict[str, Any]:
    """What the keys of a section hold."""
    if issubclass(section, BaseModel):
        return {name: field.annotation for name, field in section.model_fields.items()}
    return {field.name: field.type for field in fields(section)}
