"""The Triton kernels against torch: on a GPU where there is one, else in Triton's interpreter (see `conftest`)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.head.cases import DIMENSION, MARGINS, make_head, problem
from trainer.errors import UserError
from trainer.head.head import Head
from trainer.head.optimizer import HeadOptimizer
from trainer.head.settings import HeadConfig, HeadOptimizerConfig
from trainer.head.softening import uses_kernels
from trainer.losses import ArcFace, CosFace

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter takes bf16 operands for integers: there the product's kernel multiplies in fp32.
PRODUCTS = ("bf16", 1e-2) if DEVICE == "cuda" else ("fp32", 2e-5)
# The interpreter computes lanes, too, that a mask leaves out.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
    pytest.mark.skipif(not uses_kernels("auto", torch.device("cuda")), reason="Triton is not installed"),
]


def relative(found: Tensor | None, wanted: Tensor | None) -> float:
    assert found is not None
    assert wanted is not None
    return float((found.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())


def two_heads(name: str, **config: Any) -> tuple[Head, Head]:
    """The same head in float64 with torch, and in float32 with the kernels."""
    counts = problem(10).counts
    exact = make_head(MARGINS[name], HeadConfig(kernels="torch", tile=5, **config), counts)
    head = make_head(MARGINS[name], HeadConfig(kernels="triton", tile=5, **config), counts)
    return exact.to(DEVICE), head.float().to(DEVICE)


@pytest.mark.parametrize(
    ("name", "rows"), [(name, rows) for name in MARGINS for rows in ("unit", "free")[: 1 + MARGINS[name].unit_rows]]
)
def test_every_margin(name: str, rows: str) -> None:
    given = problem(10)
    for algorithm in ("store", "recompute"):
        found = []
        for head in two_heads(name, algorithm=algorithm, rows=rows):
            x = given.x_BD.to(head.weight).detach().requires_grad_()
            loss = head(x, given.labels_B.to(DEVICE))
            loss.backward()
            bias = [] if head.bias is None else [head.bias.grad]
            found.append([loss, x.grad, head.weight.grad, *bias, *(scalar.grad for scalar in head.scalars.values())])
        tolerance = 2e-3 if name == "arcface unbounded" else 2e-5  # rounding of z, 1000 x 2^-24, is multiplied by s
        for wanted, mine in zip(*found, strict=True):
            assert relative(mine, wanted) < tolerance


@pytest.mark.parametrize("batch", [8, 136])
@pytest.mark.parametrize("name", ["arcface", "curricularface", "sub_center_arcface", "arcface unbounded", "softmax"])
def test_blocks_that_are_not_full(name: str, batch: int) -> None:
    """In either direction, a target in the last one, and padding; on a GPU within 1 % of fp32, in bf16."""
    generator = torch.Generator().manual_seed(0)
    x_BD = torch.randn(batch, 24, generator=generator).to(DEVICE)
    labels_B = torch.randint(0, 300, (batch,), generator=generator)
    labels_B[:3] = torch.tensor([299, -1, 0])
    for algorithm in ("store", "recompute"):
        found = []
        for kernels, dtype in (("torch", "fp32"), ("triton", PRODUCTS[0])):
            config = HeadConfig(algorithm=algorithm, compute_dtype=dtype, kernels=kernels, tile=192)
            head = Head(MARGINS[name], 300, 24, config, device=DEVICE)
            x = x_BD.clone().requires_grad_()
            loss = head(x, labels_B.to(DEVICE))
            loss.backward()
            found.append((loss, x.grad, head.weight.grad))
        for wanted, mine in zip(*found, strict=True):
            assert relative(mine, wanted) < PRODUCTS[1] * (100 if name == "arcface unbounded" else 1)


def test_the_product_to_the_last_digits() -> None:
    """With the operands' own rounding taken out: sums to 1e-5, P to its rounding, targets exactly 0."""
    from trainer.head import kernels

    generator, dtype = torch.Generator().manual_seed(1), torch.bfloat16 if DEVICE == "cuda" else torch.float32
    w_RD = torch.randn(200, 72, generator=generator).to(DEVICE, dtype)
    e_BD = (torch.randn(136, 72, generator=generator) * 0.3).to(DEVICE, dtype)
    own_B = torch.randint(-1, 400, (136,), generator=generator).int().to(DEVICE)
    own_B[0] = 1000 + 199
    whole_RB = torch.exp(w_RD.double() @ e_BD.double().T - 1.5)
    for start in (0, 1000):
        own = own_B - start
        here = (own >= 0) & (own < 200)
        p_RB = whole_RB.clone()
        p_RB[own[here].long(), here.nonzero()[:, 0]] = 0
        out_RB = torch.full((200, 136), float("nan"), dtype=dtype, device=DEVICE)
        for out in (out_RB, None):
            sums_B = kernels.product(w_RD, e_BD, out, kernels.Epilogue(own_B, start=start, shift=1.5))
            torch.testing.assert_close(sums_B, p_RB.sum(0), rtol=1e-5, atol=0)
        assert relative(out_RB, p_RB) < (3e-3 if DEVICE == "cuda" else 5e-6)
        assert bool((out_RB[p_RB == 0] == 0).all())


def test_a_rank_without_classes_and_class_sampling() -> None:
    for rate in (1.0, 0.3):
        found = []
        for kernels in ("torch", "triton"):
            head = Head(CosFace(), 300, DIMENSION, HeadConfig(sample_rate=rate, kernels=kernels, tile=64), seed=1)
            head = head.to(DEVICE)
            x = torch.randn(6, DIMENSION, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
            loss = head(x, torch.tensor([0, 299, -1, 7, 7, 100], device=DEVICE))
            loss.backward()
            gradient = head.weight.grad
            assert gradient is not None
            found.append((loss, x.grad, gradient.to_dense() if gradient.is_sparse else gradient))
        for wanted, mine in zip(*found, strict=True):
            assert relative(mine, wanted) < 1e-5


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("param", ["fp32", "bf16"])
def test_a_step_of_the_rows(param: str, state: str, unit: bool, rate: float) -> None:
    """Two steps on given gradients, fused and not: within the rounding of the narrowest type."""
    settings = HeadOptimizerConfig(name="sgd", state_dtype=state)
    config: dict[str, Any] = {
        "param_dtype": param,
        "sample_rate": rate,
        "rows": "unit",
        "tile": 50,
        "optimizer": settings,
    }
    margin = ArcFace() if unit else MARGINS["l_softmax 2"]
    for fused in (False, True):
        found = []
        for kernels in ("torch", "triton"):
            head = Head(margin, 130, 12, HeadConfig(kernels=kernels, fused=fused, **config), seed=1, device=DEVICE)
            optimizer = HeadOptimizer(head)
            for step in range(2):
                head.set_progress(step)
                generator = torch.Generator().manual_seed(step)
                x = torch.randn(8, 12, generator=generator).to(DEVICE).requires_grad_()
                optimizer.prepare(0.1)
                head(x, torch.randint(0, 130, (8,), generator=generator).to(DEVICE)).backward()
                optimizer.step(0.1)
                optimizer.zero_grad()
            found.append((head.weight.detach().float(), optimizer.first.read(slice(0, 130))))
        (weight, momentum), (mine, my_momentum) = found
        # A row in bf16 is off by up to 2^-8 of 1, and with it the gradient and what is taken out along the row.
        coarse = {"fp32": 1e-5, "bf16": 2**-7, "int8": 2 / 127}[state] + (0.02 if param == "bf16" else 0)
        tolerance = 2 * coarse * float(momentum.abs().max())
        assert float((my_momentum - momentum).abs().max()) <= tolerance
        assert float((mine - weight).abs().max()) <= 0.2 * tolerance + (2**-6 if param == "bf16" else 1e-5)
        if rate < 1:  # rows that took no part were not touched
            still = (momentum.abs().sum(1) == 0) & (my_momentum.abs().sum(1) == 0)
            assert bool(still.any())
            assert torch.equal(mine[still], weight[still])


def test_rounding_is_unbiased_and_the_same_on_any_number_of_ranks() -> None:
    from trainer.head import kernels

    gradient = torch.full((4, 1024), 1 + 2**-9, device=DEVICE)

    def rounded(first_row: int, rows: slice, seed: int) -> Tensor:
        weight = torch.ones(4, 1024, dtype=torch.bfloat16, device=DEVICE)
        momentum = torch.zeros(4, 1024, dtype=torch.bfloat16, device=DEVICE)
        step = kernels.SgdStep(lr=0.0, momentum=0.9, decay=0.0, unit=False, seed=seed, first_row=first_row)
        kernels.step_rows(weight, gradient[rows], momentum, None, rows, step)
        return momentum[rows].float()

    mean = torch.stack([rounded(0, slice(0, 4), seed) for seed in range(0, 10**9, 10**8)]).double().mean()
    deviation = 2**-7 * 0.5 / (10 * 4 * 1024) ** 0.5  # of the mean of so many numbers that are 1 or 1 + 2^-7
    assert abs(float(mean) - (1 + 2**-9)) < 4 * deviation
    assert torch.equal(rounded(0, slice(0, 4), 7)[2:], rounded(2, slice(0, 2), 7))
    assert torch.equal(rounded(5, slice(0, 4), 7)[3:], rounded(5, slice(3, 4), 7))


@pytest.mark.skipif(DEVICE == "cpu", reason="TF32 is a GPU's")
def test_tf32_is_this_heads_choice_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x_BD = torch.randn(64, 128, generator=generator).to(DEVICE)
    labels_B = torch.randint(0, 3000, (64,), generator=generator).to(DEVICE)
    before = torch.backends.cuda.matmul.fp32_precision
    found = []
    for dtype in ("fp32", "tf32"):
        head = Head(ArcFace(), 3000, 128, HeadConfig(compute_dtype=dtype), device=DEVICE)
        x = x_BD.clone().requires_grad_()
        head(x, labels_B).backward()
        found.append(x.grad)
        assert torch.backends.cuda.matmul.fp32_precision == before
    assert 1e-6 < relative(found[1], found[0]) < 1e-2


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has nothing to wait for")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_no_step_waits_for_the_device(rate: float, fused: bool) -> None:
    settings = HeadOptimizerConfig(state_dtype="int8")
    config = HeadConfig(compute_dtype="bf16", param_dtype="bf16", fused=fused, sample_rate=rate, optimizer=settings)
    head = Head(ArcFace(), 100_000, 64, config, device=DEVICE)
    optimizer = HeadOptimizer(head)
    x = torch.randn(64, 64, device=DEVICE).requires_grad_()
    labels_B = torch.randint(0, 100_000, (64,), device=DEVICE)
    before = head.weight.detach().clone()
    try:
        for step in range(3):
            head.set_progress(step)
            optimizer.prepare(0.1)
            head(x, labels_B).backward()
            optimizer.step(0.1)
            optimizer.zero_grad()
            torch.cuda.set_sync_debug_mode("error")  # all that is made once is there
    finally:
        torch.cuda.set_sync_debug_mode("default")
    changed = (head.weight != before).any(dim=1)
    assert bool(changed[labels_B].all())
    assert 0.8 * min(1.0, 2.5 * rate) < float(changed.float().mean()) <= min(1.0, 3.1 * rate)


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs CUDA")
@pytest.mark.parametrize("name", ["arcface", "curricularface", "adaface", "softmax"])  # none that draws noise
def test_a_step_can_be_captured(name: str) -> None:
    """It asks nothing of the host: replayed on other embeddings it gives their gradient."""
    with torch.cuda.stream(torch.cuda.Stream()):
        head = Head(MARGINS[name], 3000, 64, HeadConfig(compute_dtype="bf16"), device=DEVICE)
        head.eval()  # running statistics stand still
        x = torch.randn(64, 64, device=DEVICE).requires_grad_()
        labels_B = torch.randint(0, 3000, (64,), device=DEVICE)

        def step() -> Tensor:
            head.weight.grad = x.grad = None
            head(x, labels_B).backward()
            assert x.grad is not None
            return x.grad

        for _ in range(2):
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            captured = step()
        with torch.no_grad():
            x.copy_(torch.randn(64, 64, device=DEVICE))
        graph.replay()
        assert relative(captured.clone(), step()) < 1e-6


def test_kernels_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not uses_kernels("auto", torch.device("cpu"))
    assert not uses_kernels("torch", torch.device("cuda"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    head = Head(ArcFace(), 10, 8, HeadConfig(kernels="triton"))
    x_BD, labels_B = torch.randn(2, 8), torch.tensor([0, 1])
    with pytest.raises(UserError, match="cannot run on cpu"):
        head(x_BD, labels_B)
    monkeypatch.setattr("trainer.head.softening._installed", lambda: False)
    with pytest.raises(UserError, match="not installed"):
        head(x_BD, labels_B)
    assert not uses_kernels("auto", torch.device("cuda"))
