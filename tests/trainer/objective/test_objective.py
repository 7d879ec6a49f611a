"""The weighted sum of losses: what each part learns is stepped, stored and restored; what is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import run_on_ranks
from trainer import checkpoint
from trainer.checkpoint import CheckpointManifest
from trainer.config import Config, from_tree, load
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.losses import Triplet
from trainer.objective import Objective, embedder_of
from trainer.objective.geometry import Projected
from trainer.storage import Folder

CLASSES, DIMENSION, SLOTS = 7, 6, 12
COUNTS = [5] * CLASSES


def config(*losses: object, **changes: object) -> Config:
    loss, *auxiliary = losses
    tree: dict[str, object] = {
        "loss": loss,
        "auxiliary": auxiliary,
        "backbone": {"dimension": DIMENSION},
        "data": {"batch_size": SLOTS},
        "scaling": {"workers": 1},
    }
    for name, value in changes.items():
        section = tree.setdefault(name, {})
        assert isinstance(section, dict)
        section |= value  # type: ignore[operator]
    return from_tree(tree)


def batch(step: int, slots: int = SLOTS) -> tuple[Tensor, Tensor, list[str]]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(slots, DIMENSION, generator=generator)
    labels = torch.randint(-1, CLASSES, (slots,), generator=generator)
    return x, labels, [f"key{i}" for i in range(slots)]


def step(objective: Objective, number: int, group: Group | None = None) -> dict[str, Tensor]:
    x, labels, keys = batch(number)
    if group is not None:
        b = SLOTS // group.size
        own = slice(group.rank * b, (group.rank + 1) * b)
        x, labels, keys = x[own], labels[own], keys[own]
    objective.set_progress(number, 1.0)
    total, parts = objective(x.requires_grad_(), labels, keys)
    total.backward()
    objective.step(0.1)
    return parts


def test_weighted_sum_and_its_parts() -> None:
    objective = Objective(
        config("softmax", {"name": "center", "weight": 0.003}, {"name": "triplet", "weight": 2.0, "mining": "all"}),
        CLASSES,
        COUNTS,
        torch.device("cpu"),
    )
    parts = step(objective, 0)
    assert set(parts) == {"loss", "loss/softmax", "loss/center", "loss/triplet", "empty_steps/triplet"}
    expected = parts["loss/softmax"] + 0.003 * parts["loss/center"] + 2 * parts["loss/triplet"]
    torch.testing.assert_close(parts["loss"], expected)
    assert not parts["loss"].requires_grad


def test_center_follows_the_papers_rule_and_not_the_learning_rate() -> None:
    objective = Objective(config({"name": "center", "alpha": 0.25}), CLASSES, COUNTS, torch.device("cpu"))
    x, labels, keys = batch(0)
    objective(x, labels, keys)
    objective.step(1e9)
    (state,) = objective.files().values()
    for c in range(CLASSES):
        own = x[labels == c]
        torch.testing.assert_close(state["centres"][c], 0.25 * own.sum(dim=0) / (1 + len(own)))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_projection_is_stepped_by_the_heads_optimizer(name: str) -> None:
    changes = {"optimizer": {"name": name, "momentum": 0.5, "weight_decay": 0.01}}
    objective = Objective(
        config({"name": "tse", "alpha": 5.0, "init": "orthogonal"}, head=changes),
        CLASSES,
        COUNTS,
        torch.device("cpu"),
    )
    t = nn.Parameter(objective.files()["tse.safetensors"]["loss.values.projection"].detach().clone())
    reference = Objective(
        config({"name": "tse", "alpha": 5.0, "init": "orthogonal"}), CLASSES, COUNTS, torch.device("cpu")
    )
    make = torch.optim.SGD if name == "sgd" else torch.optim.AdamW
    options = {"momentum": 0.5} if name == "sgd" else {"betas": (0.5, 0.999)}
    optimizer = make([t], lr=0.1, weight_decay=0.01, **options)
    for number in range(3):
        reference._members["tse"].module.values["projection"].data.copy_(t)  # type: ignore[attr-defined]
        reference._members["tse"].module.values["projection"].grad = None  # type: ignore[attr-defined]
        x, labels, keys = batch(number)
        reference(x, labels, keys)[0].backward()
        t.grad = reference._members["tse"].module.values["projection"].grad  # type: ignore[attr-defined]
        optimizer.step()
        step(objective, number)
    torch.testing.assert_close(objective.files()["tse.safetensors"]["loss.values.projection"], t.data)


CHOICES: list[tuple[object, ...]] = [
    ("arcface", {"name": "center_invariant", "weight": 0.01, "gamma": 0.01}, {"name": "tpe", "frozen": True}),
    ({"name": "tse", "dimension": 3, "alpha": 3.0}, "center", "range"),
    ("triplet", "contrastive", "marginal", "coco"),
]


@pytest.mark.parametrize("size", [2])
def test_a_checkpoint_restores_every_part(size: int, tmp_path: Path) -> None:
    run_on_ranks(size, restore, tmp_path)


def restore(rank: int, folder: Path) -> None:
    """Steps after a restored checkpoint give the losses of steps without one; files are named by what they hold."""
    group = Group.current()
    for number, losses in enumerate(CHOICES):
        for optimizer in ("sgd", "adamw"):
            chosen = config(*losses, head={"optimizer": {"name": optimizer}}, scaling={"workers": 2})
            first = Objective(chosen, CLASSES, COUNTS, torch.device("cpu"))
            for i in range(3):
                step(first, i, group)
            parent = folder / f"{number}-{optimizer}"
            manifest = CheckpointManifest(
                step=3,
                world_size=group.size,
                classes=CLASSES,
                class_digest="",
                config=chosen.model_dump(mode="json"),
                files={},
            )
            checkpoint.save(Folder(parent), manifest, first.files(), 1, group)
            second = Objective(chosen, CLASSES, COUNTS, torch.device("cpu"))
            found = checkpoint.latest(Folder(parent))
            assert found is not None
            second.load(found)
            for i in range(3, 6):
                expected, again = step(first, i, group), step(second, i, group)
                assert expected == again, (losses, i)
            check_names(losses, sorted(found.manifest.files))


def check_names(losses: tuple[object, ...], files: list[str]) -> None:
    names = [loss if isinstance(loss, str) else loss["name"] for loss in losses]  # type: ignore[index]
    rows = {"arcface", "center", "center_invariant"}
    expected = []
    for name in names:
        if name in rows:
            expected += [f"{name}-rows-{a:010d}-{b:010d}.safetensors" for a, b in ((0, 4), (4, 7))]
        else:
            expected.append(f"{name}.safetensors")
    assert files == sorted(expected)


def test_empty_steps_are_told_when_they_happen_and_when_they_double() -> None:
    objective = Objective(config("triplet"), CLASSES, COUNTS, torch.device("cpu"))
    x, _, keys = batch(0)
    alone = torch.full((SLOTS,), 3)
    told = []
    for _ in range(9):
        loss, parts = objective(x, alone, keys)
        assert loss == 0
        told.append(objective.notes({name: float(value) for name, value in parts.items()}))
    assert [bool(notes) for notes in told] == [True, True, False, True, False, False, False, True, False]
    assert "triplet lacked a kind of pair or triplet in 8 step(s) so far" in told[7][0]
    assert objective.notes({"loss": 3.0, "empty_steps/triplet": 9.0}) == []


def test_the_embedder_ends_with_the_learned_projection(tmp_path: Path) -> None:
    backbone = nn.Linear(4, DIMENSION)
    chosen = config("arcface", {"name": "tpe", "dimension": 3, "frozen": True})
    objective = Objective(chosen, CLASSES, COUNTS, torch.device("cpu"))
    step(objective, 0)
    embedder = objective.geometry().embedder(backbone)
    assert isinstance(embedder, Projected)
    images = torch.randn(5, 4)
    x, t = backbone(images), objective.files()["tpe.safetensors"]["loss.values.projection"]
    torch.testing.assert_close(embedder(images), (x / x.norm(dim=1, keepdim=True)) @ t.T)
    manifest = CheckpointManifest(step=1, world_size=1, classes=CLASSES, class_digest="", config={}, files={})
    checkpoint.save(Folder(tmp_path), manifest, objective.files(), 1, Group())
    found = checkpoint.latest(Folder(tmp_path))
    assert found is not None
    torch.testing.assert_close(embedder_of(chosen, found, backbone)(images), embedder(images))
    plain = config("arcface", "triplet")
    assert Objective(plain, CLASSES, COUNTS, torch.device("cpu")).geometry().embedder(backbone) is backbone
    assert embedder_of(plain, found, backbone) is backbone


def test_losses_without_pairs_in_the_data_are_refused() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="triplet needs two samples of an identity, but every identity"):
        Objective(config("triplet"), CLASSES, [1] * CLASSES, cpu)
    with pytest.raises(UserError, match=r"contrastive needs two .* data.identities_per_batch=12 .* gives one"):
        Objective(config("contrastive", data={"identities_per_batch": 12}), CLASSES, COUNTS, cpu)
    with pytest.raises(UserError, match=r"tpe needs two .* a shuffled batch of 12 has 0.00053 such pairs on average"):
        Objective(config("arcface", "tpe"), 100_000, [5] * 100_000, cpu)
    Objective(config("tpe", data={"identities_per_batch": 6}), 100_000, [5] * 100_000, cpu)
    Objective(config("coco"), 100_000, [5] * 100_000, cpu)


def test_two_of_a_kind_are_refused() -> None:
    with pytest.raises(UserError, match=r"the losses \['center'\] are named twice"):
        Objective(config("arcface", "center", "center"), CLASSES, COUNTS, torch.device("cpu"))
    with pytest.raises(UserError, match="tse and tpe each learn a projection, but an embedder has one"):
        Objective(config("arcface", "tse", "tpe"), CLASSES, COUNTS, torch.device("cpu"))


@pytest.mark.parametrize("name", ["tse", "tpe"])
def test_a_frozen_projection_stands_beside_a_loss_that_trains_the_network(name: str) -> None:
    cpu, frozen = torch.device("cpu"), {"name": name, "frozen": True}
    with pytest.raises(UserError, match=f"^loss={name} with loss.frozen=true .* put {name} under auxiliary, or set"):
        Objective(config(frozen), CLASSES, COUNTS, cpu)
    for losses in (("softmax", frozen), (frozen, "softmax"), ("triplet", frozen), (name,)):
        x, labels, keys = batch(0)
        Objective(config(*losses), CLASSES, COUNTS, cpu)(x.requires_grad_(), labels, keys)[0].backward()
        assert x.grad is not None
        assert x.grad.any(), losses


def test_losses_are_chosen_by_config_alone() -> None:
    chosen = load(None, ["loss=triplet", "loss.mining=batch-hard", "auxiliary=[{name: center, weight: 0.003}]"])
    assert chosen.loss.name == "triplet"
    assert chosen.loss == Triplet(mining="batch_hard")
    assert [(loss.name, loss.weight) for loss in chosen.auxiliary] == [("center", 0.003)]
    with pytest.raises(UserError, match=r"unknown key 'loss.triplet.margin'; .*alpha"):
        load(None, ["loss=triplet", "loss.margin=0.2"])
