"""The settings of the head and of its optimizer."""

from typing import Annotated, Literal

from trainer.checked import Checked, Within


class HeadOptimizerConfig(Checked):
    """How the class centres, and the few numbers beside them, are stepped."""

    name: Literal["sgd", "adamw"] = "sgd"
    # null: 1 for SGD on unit centres, of which each is the target of few samples; else the backbone's rate.
    lr: Annotated[float, Within(gt=0)] | None = None
    momentum: Annotated[float, Within(ge=0, lt=1)] = 0.9  # of SGD; beta1 of AdamW
    beta2: Annotated[float, Within(ge=0, lt=1)] = 0.999  # of AdamW
    weight_decay: Annotated[float, Within(ge=0)] = 5e-4  # of centres with a length; unit centres have no decay
    state_dtype: Literal["fp32", "bf16", "int8"] = "fp32"


class HeadConfig(Checked):
    """How the class centres are kept and computed."""

    algorithm: Literal["auto", "store", "recompute"] = "auto"  # auto: store when P fits the memory
    # Of the matrix products' operands and of the stored P. tf32: fp32, of which a GPU multiplies the first 10 bits.
    compute_dtype: Literal["fp32", "tf32", "bf16"] = "fp32"
    param_dtype: Literal["fp32", "bf16"] = "fp32"  # of the class centres
    # Centres of margins on the cosine: unit = kept at length 1; free = divided by their length.
    rows: Literal["unit", "free"] = "unit"
    # Relative error that the gradients may have, so that samples which are learned can be left out of the backward
    # (see `head.skipping`); 0: exact. With *store* only. On a GPU the host then waits for the device in each step.
    skip_tolerance: Annotated[float, Within(ge=0, lt=1)] = 0.0
    fused: bool = False  # step the centres inside the backward, so that their gradient is never stored
    # auto: Triton's kernels on a GPU, where they are installed; torch's operations elsewhere.
    kernels: Literal["auto", "torch", "triton"] = "auto"
    tile: Annotated[int, Within(ge=1)] | None = None  # classes a tile; null: as many as suit the device
    sample_rate: Annotated[float, Within(gt=0, le=1)] = 1.0  # share of the negative classes used in a step (PartialFC)
    sample_correction: bool = False  # let the sampled negatives stand for the others, too: see `head.rows`
    optimizer: HeadOptimizerConfig = HeadOptimizerConfig()
