"""The head on one rank: every margin in both algorithms against the oracle, numerics at their edges, bad input."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.head.cases import DIMENSION, MARGINS, compare, make_head, problem
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.head.head import Head, Step
from trainer.head.matmul import free_memory
from trainer.head.settings import HeadConfig
from trainer.head.tiles import fixed_shift
from trainer.losses import AdaFace, ArcFace, CosFace, CurricularFace, DynamicMargin, NormFace
from trainer.losses.margins import Margin, Positives, Scale, angle

Algorithm = Literal["store", "recompute"]
ALGORITHMS: tuple[Algorithm, ...] = ("store", "recompute")
UNIT = [name for name, margin in MARGINS.items() if margin.unit_rows]


@pytest.mark.parametrize("name", MARGINS)
def test_equals_the_papers_formula(name: str) -> None:
    compare(name, [HeadConfig(algorithm=algorithm, tile=5) for algorithm in ALGORITHMS], batch=10)


@pytest.mark.parametrize("name", UNIT)
def test_rows_with_a_length_are_divided_by_it(name: str) -> None:
    compare(name, [HeadConfig(algorithm=algorithm, rows="free", tile=5) for algorithm in ALGORITHMS], batch=10)


def dense_arcface(x_BD: torch.Tensor, w_CD: torch.Tensor, labels_B: torch.Tensor, scale: float) -> torch.Tensor:
    """The formula, dense, in float64, through angles; log(1 + exp(N - t)), which is right also where p rounds to 1."""
    cos = torch.nn.functional.normalize(x_BD.double()) @ torch.nn.functional.normalize(w_CD.double()).T
    theta = cos.gather(1, labels_B[:, None])[:, 0].clamp(-1 + 1e-14, 1 - 1e-14).acos() + 0.5
    target = torch.where(theta > math.pi, -2 - theta.cos(), theta.cos())
    others = cos.scatter(1, labels_B[:, None], -math.inf)
    return torch.nn.functional.softplus((scale * others).logsumexp(1) - scale * target, threshold=1000).mean()


def relative(found: torch.Tensor | None, wanted: torch.Tensor | None) -> float:
    assert found is not None
    assert wanted is not None
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("scale", [64.0, 79.0, 86.0, 128.0, 256.0])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("place", ["random", "at the centre", "opposite", "negatives opposite"])
def test_single_precision_at_the_ends_of_the_exponent(scale: float, algorithm: Algorithm, place: str) -> None:
    """fp32 within 2e-4 of float64 (rounding of logits of size s, s 2^-24, times what the exponential makes of it)."""
    generator = torch.Generator().manual_seed(1)
    labels_B = torch.randint(0, 50, (8,), generator=generator)
    head = Head(ArcFace(scale=scale), 50, 16, HeadConfig(algorithm=algorithm, tile=16))
    x_BD = torch.randn(8, 16, generator=generator)
    with torch.no_grad():
        if place == "at the centre":
            x_BD = head.weight[labels_B] + 1e-3 * x_BD
        elif place == "opposite":
            x_BD = -head.weight[labels_B] + 1e-3 * x_BD
        elif place == "negatives opposite":  # every negative at cos = -1: the smallest denominator there is
            x_BD = -head.weight[:1] + 1e-3 * x_BD
            head.weight[1:] = head.weight[:1]
            labels_B = torch.zeros(8, dtype=torch.int64)
            head.weight[0] = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    x_BD.requires_grad_()
    loss = head(x_BD, labels_B)
    loss.backward()
    exact_BD = x_BD.detach().double().requires_grad_()
    w_CD = head.weight.detach().double().requires_grad_()
    expected = dense_arcface(exact_BD, w_CD, labels_B, scale)
    expected.backward()
    found = head.weight.grad
    assert found is not None
    found = (found - head.weight * (found * head.weight).sum(1, keepdim=True)).detach()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-30)
    if float(expected.detach()) > 1e-30:  # below, the gradients are subnormal numbers
        assert relative(x_BD.grad, exact_BD.grad) < 2e-4
        assert relative(found, w_CD.grad) < 2e-4
    assert bool(torch.isfinite(found).all())


def test_the_shift_is_fixed_up_to_the_documented_bound() -> None:
    assert fixed_shift(-64.0, 64.0, 10_000_000, torch.float32) == 0.0  # needs no subtraction
    assert fixed_shift(-79.0, 79.0, 10_000_000, torch.float32) is not None
    assert fixed_shift(-81.0, 81.0, 10_000_000, torch.float32) is None
    assert fixed_shift(-128.0, 128.0, 50, torch.float32) is None
    assert fixed_shift(-600.0, 600.0, 50, torch.float64) is not None


@pytest.mark.parametrize("scale", [64.0, 79.0])
def test_the_fixed_shift_neither_overflows_nor_loses_a_row(scale: float) -> None:
    classes = 10_000_000
    shift = fixed_shift(-scale, scale, classes, torch.float32)
    assert shift is not None
    tiny = torch.finfo(torch.float32).tiny
    highest = torch.tensor(scale - shift).exp() * classes
    lowest = torch.tensor(-scale - shift).exp()
    assert bool(torch.isfinite(highest))
    assert float(lowest) >= tiny
    assert bool(torch.isfinite(16 * scale / (lowest * (classes - 1))))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", ["arcface", "curricularface", "softmax", "sub_center_arcface", "arcface unbounded"])
def test_bf16_products_within_the_stated_error(name: str, algorithm: Algorithm) -> None:
    """Loss within 1e-3 and gradients within 1 % of fp32 (a bf16 number has 8 bits)."""
    generator = torch.Generator().manual_seed(0)
    x_BD = torch.randn(32, 64, generator=generator)
    labels_B = torch.randint(0, 300, (32,), generator=generator)
    found = []
    for dtype in ("fp32", "bf16"):
        head = Head(MARGINS[name], 300, 64, HeadConfig(algorithm=algorithm, compute_dtype=dtype, tile=64))
        x = x_BD.clone().requires_grad_()
        loss = head(x, labels_B)
        loss.backward()
        found.append((loss.detach(), x.grad, head.weight.grad))
    exact, rounded = found
    assert relative(rounded[0], exact[0].double()) < 1e-3
    assert relative(rounded[1], exact[1]) < 1e-2
    assert relative(rounded[2], exact[2]) < 1e-2


def test_gradcheck_of_embeddings_and_scalars() -> None:
    for name in ("normface learnable", "l2_softmax learnable", "combined times 1.35", "magface", "curricularface"):
        one = problem(6)
        head = make_head(MARGINS[name], HeadConfig(algorithm="recompute", tile=7), one.counts)
        head.eval()  # running statistics stand still
        scalars = list(head.scalars.values())

        def loss(x_BD: torch.Tensor, *_: torch.Tensor, head: Head = head, labels: torch.Tensor = one.labels_B) -> Any:
            return head(x_BD, labels)

        assert torch.autograd.gradcheck(loss, (one.x_BD.clone().requires_grad_(), *scalars))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradient_of_rows_by_finite_differences(algorithm: Algorithm) -> None:
    one = problem(6)
    head = make_head(MARGINS["l_softmax 3"], HeadConfig(algorithm=algorithm, tile=7), one.counts)
    head(one.x_BD, one.labels_B).backward()
    assert head.weight.grad is not None
    found = head.weight.grad.clone()
    for row, column in ((0, 0), (int(one.labels_B[0]), 3), (12, 5)):
        with torch.no_grad():
            values = []
            for step in (1e-6, -2e-6):
                head.weight[row, column] += step
                values.append(float(head(one.x_BD, one.labels_B)))
            head.weight[row, column] += 1e-6
        assert float(found[row, column]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-8)


@given(
    classes=st.integers(2, 60),
    batch=st.integers(1, 12),
    tile=st.integers(1, 70),
    ranks=st.integers(1, 5),
    algorithm=st.sampled_from(ALGORITHMS),
    name=st.sampled_from(["arcface", "arcface unbounded", "softmax", "sub_center_arcface"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_sharding_never_changes_the_loss(
    classes: int, batch: int, tile: int, ranks: int, algorithm: Algorithm, name: str, seed: int
) -> None:
    """Every rank's part, computed one after another and joined as the ranks would, gives the loss of one rank."""
    generator = torch.Generator().manual_seed(seed)
    x_BD = torch.randn(batch, DIMENSION, generator=generator, dtype=torch.float64)
    labels_B = torch.randint(-1, classes, (batch,), generator=generator)
    config = HeadConfig(algorithm=algorithm, tile=tile)
    whole = Head(MARGINS[name], classes, DIMENSION, config, seed=seed).double()
    parts = [Head(MARGINS[name], classes, DIMENSION, config, seed=seed, group=Group(r, ranks)) for r in range(ranks)]
    assert torch.equal(torch.cat([part.weight for part in parts]).double(), whole.weight)
    expected = whole(x_BD, labels_B)
    found = torch.stack([pieces(part.double(), x_BD, labels_B) for part in parts])
    bounded = whole.plan(whole.margin, batch, classes, torch.float64).shift is not None
    sums_B = found[:, :, 0].sum(0).log() if bounded else found[:, :, 0].logsumexp(0)
    losses_B = torch.nn.functional.softplus(sums_B - found[:, :, 1].sum(0))
    total = torch.where(labels_B >= 0, losses_B, 0).sum() / (labels_B >= 0).sum().clamp_min(1)
    assert float(total) == pytest.approx(float(expected.detach()), rel=1e-9, abs=1e-12)


@torch.no_grad()
def pieces(head: Head, x_BD: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """What one rank would send: its denominators and its targets' logits."""
    step = Step(head, head.margin, x_BD, labels_B, {})
    sums_B, targets_B, _ = step.parts()
    return torch.stack([sums_B, targets_B], dim=1)


def test_buffers_are_used_again_and_second_backwards_are_refused() -> None:
    head = Head(ArcFace(), 50, DIMENSION, HeadConfig(algorithm="store"))
    x_BD, labels_B = torch.randn(4, DIMENSION, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    head(x_BD, labels_B).backward()
    assert head.weight.grad is not None
    first, place = head.weight.grad.clone(), head.weight.grad.data_ptr()
    head.weight.grad = None
    head(x_BD, labels_B).backward()
    assert head.weight.grad is not None
    assert head.weight.grad.data_ptr() == place
    assert torch.equal(head.weight.grad, first)
    loss = head(x_BD, labels_B)  # a second loss while the first has its P: both right, and the gradients add up
    (loss + head(x_BD, labels_B)).backward()
    torch.testing.assert_close(head.weight.grad, 3 * first)
    loss = head(x_BD, labels_B)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_without_gradient_nothing_is_kept() -> None:
    head = Head(ArcFace(), 50, DIMENSION, HeadConfig(algorithm="store"))
    x_BD, labels_B = torch.randn(4, DIMENSION, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    with torch.no_grad():
        loss = head(x_BD, labels_B)
    assert head._memory.spares == {}
    kept: list[tuple[int, int]] = []
    take = head._memory.take

    def spy(name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        kept.append(shape)
        return take(name, shape, dtype, device)

    head._memory = SimpleNamespace(take=spy, scratch=head._memory.scratch)  # type: ignore[assignment]
    with torch.no_grad():
        head(x_BD, labels_B)
    assert kept == []
    assert float(loss) == pytest.approx(float(head(x_BD, labels_B).detach()))
    assert kept == [(50, 4)]


class LinearAngle(Margin):
    """An author's own margin, as the documentation of margins shows it."""

    formula: ClassVar[str] = "s (cos theta - m theta)"
    source: ClassVar[str] = "this test"
    name: Literal["linear_angle"] = "linear_angle"
    scale: Scale = 20.0
    margin: float = 0.1

    def target(self, positives: Positives) -> torch.Tensor:
        return self.scale * (positives.cos_B - self.margin * angle(positives.cos_B))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_margin_of_ones_own_is_one_small_class(algorithm: Algorithm) -> None:
    """Value and gradients of the dense formula, and finite gradients where the angle is 0 or pi."""
    generator = torch.Generator().manual_seed(0)
    head = Head(LinearAngle(), 40, 8, HeadConfig(algorithm=algorithm, tile=7))
    x_BD = torch.randn(6, 8, generator=generator, requires_grad=True)
    labels_B = torch.randint(0, 40, (6,), generator=generator)
    head(x_BD, labels_B).backward()
    y_BD, w_CD = x_BD.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    cos = torch.nn.functional.normalize(y_BD) @ torch.nn.functional.normalize(w_CD).T
    own = torch.nn.functional.one_hot(labels_B, 40)
    loss = torch.nn.functional.cross_entropy(20 * (cos - 0.1 * own * cos.acos()), labels_B)
    loss.backward()
    assert relative(x_BD.grad, y_BD.grad) < 1e-5
    for sign in (1, -1):
        x_BD = (sign * head.weight.detach()[labels_B]).requires_grad_()
        head(x_BD, labels_B).backward()
        assert x_BD.grad is not None
        assert bool(x_BD.grad.isfinite().all())


@pytest.mark.parametrize("margin", [AdaFace(), CurricularFace()], ids=lambda margin: margin.name)
@pytest.mark.parametrize(("value", "label"), [(math.nan, 1), (1.0, 50)])
def test_a_bad_sample_leaves_no_trace_in_running_statistics(margin: Margin, value: float, label: int) -> None:
    head = Head(margin, 50, 8)
    before = {name: buffer.clone() for name, buffer in head.named_buffers()}
    x_BD = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    x_BD[2, 3] = value
    with pytest.raises(UserError):
        head(x_BD, torch.tensor([0, 1, 2, label]))
    assert {name: float(buffer) for name, buffer in head.named_buffers()} == {k: float(v) for k, v in before.items()}
    head(torch.randn(4, 8), torch.arange(4))
    assert any(float(buffer) != float(before[name]) for name, buffer in head.named_buffers())


def test_what_a_batch_and_counts_must_be() -> None:
    with pytest.raises(UserError, match="got no embedding"):
        Head(ArcFace(), 50, 8)(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(UserError, match="class_counts has 3 numbers for 50 classes"):
        Head(ArcFace(), 50, 8, class_counts=[1, 2, 3])
    x_BD = torch.ones(2, 8)
    x_BD[1, 4] = math.inf
    with pytest.raises(UserError, match=r"sample 'b' has an embedding that is not finite \(1 of 8 .* first is inf\)"):
        Head(ArcFace(), 50, 8)(x_BD, torch.tensor([0, 1]), ["a", "b"])


def test_free_memory_counts_what_the_page_cache_gives_back() -> None:
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    assert 0 < free_memory(torch.device("cpu")) <= int(available.split()[1]) * 1024 * 1.1


def test_a_null_embedding_counts_and_gets_no_gradient() -> None:
    head = Head(CosFace(), 50, DIMENSION)
    x_BD = torch.zeros(2, DIMENSION, requires_grad=True)
    loss = head(x_BD, torch.tensor([1, 2]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(math.exp(64 * 0.35) * 49 + 1), rel=1e-4)
    assert x_BD.grad is not None
    assert not x_BD.grad.any()


def test_the_first_rows_do_not_depend_on_where_they_lie() -> None:
    whole = Head(ArcFace(), 2500, DIMENSION, seed=7)
    parts = [Head(ArcFace(), 2500, DIMENSION, seed=7, group=Group(rank, 4)) for rank in range(4)]
    assert torch.equal(torch.cat([part.weight for part in parts]), whole.weight)
    assert not torch.equal(Head(ArcFace(), 2500, DIMENSION, seed=8).weight, whole.weight)
    torch.testing.assert_close(whole.weight.norm(dim=1), torch.ones(2500))


@pytest.mark.parametrize(("free", "stores"), [(10**9, True), (10**5, False)])
def test_auto_keeps_p_where_it_fits_and_decides_once(free: int, stores: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head(ArcFace(), 1000, DIMENSION)
    for now in (free, 10**12, 0):  # what others allocate later changes nothing
        monkeypatch.setattr("trainer.head.head.free_memory", lambda device, now=now: now)
        assert head.plan(head.margin, 256, 1000, torch.float32).store is stores


def test_auto_leaves_room_for_the_gradient_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 256 * 1000 * 4
    for fused, stores in ((False, False), (True, True)):
        head = Head(ArcFace(), 1000, 512, HeadConfig(fused=fused))  # whose gradient is twice as large as P
        monkeypatch.setattr("trainer.head.head.free_memory", lambda device: 4 * size)
        assert head.plan(head.margin, 256, 1000, torch.float32).store is stores


def test_the_margin_grows_during_the_warmup() -> None:
    x_BD, labels_B = torch.randn(4, DIMENSION, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    eased, plain = Head(ArcFace(), 50, DIMENSION), Head(NormFace(scale=64.0), 50, DIMENSION)
    eased.set_progress(0, 0.0)
    assert float(eased(x_BD, labels_B).detach()) == pytest.approx(float(plain(x_BD, labels_B).detach()))
    eased.set_progress(0, 0.5)
    half = float(eased(x_BD, labels_B).detach())
    eased.set_progress(0, 1.0)
    assert float(plain(x_BD, labels_B).detach()) < half < float(eased(x_BD, labels_B).detach())


def test_bad_input() -> None:
    with pytest.raises(UserError, match="1 class"):
        Head(ArcFace(), 1, DIMENSION)
    with pytest.raises(UserError, match="give class_counts"):
        Head(DynamicMargin(), 10, DIMENSION)
    with pytest.raises(UserError, match="3 numbers for 10 classes"):
        Head(DynamicMargin(), 10, DIMENSION, class_counts=[1, 2, 3])
    with pytest.raises(UserError, match=r"margin 1\.2 of the cosine is more than 1, "):
        Head(CosFace(margin=1.2), 10, DIMENSION)
    head = Head(ArcFace(), 10, DIMENSION)
    x_BD, labels_B = torch.ones(2, DIMENSION), torch.tensor([1, 2])
    with pytest.raises(UserError, match=r"embeddings of shape \(2, 5\)"):
        head(x_BD[:, :5], labels_B)
    with pytest.raises(UserError, match="one int64 label each"):
        head(x_BD, labels_B.float())
    with pytest.raises(UserError, match="sample 'q' has label 10, but the head has the classes 0 to 9"):
        head(x_BD, torch.tensor([1, 10]), ["p", "q"])
    with pytest.raises(UserError, match="sample 'q' has label -2"):
        head(x_BD, torch.tensor([1, -2]), ["p", "q"])
    x_BD[0, 0] = float("inf")
    with pytest.raises(UserError, match="slot 0 of rank 0 has an embedding that is not finite"):
        head(x_BD, labels_B)
