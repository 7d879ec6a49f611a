"""The table of all losses is what the config accepts, in the order of the literature."""

import json
from dataclasses import asdict

import pytest
import torch

from trainer.config import load
from trainer.errors import UserError
from trainer.losses import LossSpec, by_name, table
from trainer.losses.elementary import ELEMENTARY
from trainer.objective import Objective

NAMES = [
    *["softmax", "weighted_softmax", "focal", "modified_softmax", "l_softmax", "a_softmax", "l2_softmax", "normface"],
    *["coco", "cosface", "arcface", "combined", "sub_center_arcface", "adaface", "magface", "elasticface", "dynamic"],
    *["curricularface", "mv_softmax", "contrastive", "marginal", "triplet", "tse", "tpe", "center"],
    *["center_invariant", "range"],
]


def test_names_and_order() -> None:
    assert [row["name"] for row in table()] == [*NAMES, *(one.name for one in ELEMENTARY)]
    assert list(by_name()) == NAMES


@pytest.mark.parametrize("row", table()[: len(NAMES)], ids=NAMES)
def test_a_row_says_everything_and_is_what_the_config_makes(row: dict[str, object]) -> None:
    assert list(row) == ["name", "family", "formula", "defaults", "source"]
    assert json.loads(json.dumps(row)) == row
    assert all(row[key] for key in ("name", "family", "formula", "source"))
    assert by_name()[str(row["name"])].title
    spec = load(None, [f"loss={row['name']}"]).loss
    assert isinstance(spec, LossSpec)
    assert asdict(spec) == {"name": row["name"], "weight": 1.0, **row["defaults"]}  # type: ignore[dict-item]


def test_the_elementary_losses_end_the_table_and_are_no_names_of_the_config() -> None:
    rows = table()[len(NAMES) :]
    assert {row["family"] for row in rows} == {"elementary"}
    assert all(one.gradient in row["formula"] and row["source"] for one, row in zip(ELEMENTARY, rows, strict=True))
    assert not {row["name"] for row in rows} & set(by_name())


def test_the_config_accepts_no_other_name() -> None:
    with pytest.raises(UserError) as error:
        load(None, ["loss=nonsense"])
    assert all(f"'{name}'" in str(error.value) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_name_alone_makes_an_objective_that_learns(name: str) -> None:
    """A step against the gradient lowers the loss of the same batch."""
    # The mean over semi-hard triplets may rise: the step also changes which ones they are.
    choice = ["loss.mining=all"] if name == "triplet" else []
    sizes = ["backbone.dimension=8", "data.batch_size=16", "data.identities_per_batch=4", "scaling.workers=1"]
    config = load(None, [f"loss={name}", *choice, *sizes])
    objective = Objective(config, 6, [4] * 6, torch.device("cpu"))
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    labels, keys = torch.arange(16) % 4, [f"k{i}" for i in range(16)]
    objective.set_progress(0, 1.0)
    x.requires_grad_()
    first, parts = objective(x, labels, keys)
    first.backward()
    assert parts["loss"] == first.detach()
    assert x.grad is not None
    assert x.grad.any()
    with torch.no_grad():
        moved = x - 0.05 * x.grad / x.grad.norm()
    assert objective(moved, labels, keys)[0] < first
    objective.step(0.01)
