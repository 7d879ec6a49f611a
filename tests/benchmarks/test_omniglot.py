"""The recognition benchmark: its rows are configs, its trials are right, and the peer's loss is the head's."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from benchmarks import omniglot
from trainer.config import load
from trainer.objective import Objective
from trainer.views import checked

NAMES = [f"{alphabet}/character{number:02}" for alphabet, size in (("A", 25), ("B", 14)) for number in range(size)]
LABELS = np.repeat(np.arange(len(NAMES)), omniglot.DRAWERS)


@pytest.mark.parametrize("row", omniglot.ROWS, ids=lambda row: row.name)
def test_every_row_is_a_config(row: omniglot.Row) -> None:
    config = load(omniglot.DEMO, [*row.overrides, *omniglot.FIXED, f"run.max_steps={row.steps}"])
    assert (config.scaling.workers, config.run.max_steps) == (1, row.steps)


def test_the_views_are_the_eight_turns_and_mirror_images() -> None:
    assert [len(views) for views in omniglot.VIEWS.values()] == [0, 4, 8]
    for views in omniglot.VIEWS.values():
        checked(views)


def test_trials_stay_within_an_alphabet_and_among_twenty_or_all() -> None:
    """Characters that all alphabets share are told apart by none; those of one alphabet are not mixed up."""
    x_ND = np.eye(25, dtype=np.float32)[LABELS % 25]
    wrong, whose = omniglot.one_shot(x_ND, LABELS, NAMES)
    assert wrong.sum() == 0
    assert (whose < 25).sum() == 20 * omniglot.DRAWS
    assert (whose >= 25).sum() == 14 * omniglot.DRAWS


def test_an_embedder_that_takes_one_character_for_another_errs_on_it_alone() -> None:
    x_ND = np.eye(39, dtype=np.float32)[LABELS]
    x_ND[LABELS == 30] = x_ND[LABELS == 31]
    wrong, whose = omniglot.one_shot(x_ND, LABELS, NAMES)
    assert set(whose[wrong > 0]) == {30, 31}  # of two equal scores the first one counts, and their order is random
    rates = omniglot.figures(x_ND, LABELS, NAMES)
    assert rates["error"].value == pytest.approx(1 / 34)
    assert rates["error"].low < 1 / 34 < rates["error"].high


def test_a_paired_difference_is_that_of_the_same_trials_by_character() -> None:
    whose = np.array([0, 0, 1, 1])
    before, after = np.array([1.0, 1, 1, 1]), np.array([1.0, 1, 0, 0])
    assert omniglot.paired(before, before, whose) == "0.0 ± 0.0"
    assert omniglot.paired(before, after, whose) == "50.0 ± 69.3"  # two characters, -1 and +1 about the mean, / 4


def test_another_drawing_is_enrolled_than_is_recognised() -> None:
    random = np.random.default_rng(0)
    x_ND = random.normal(size=(len(LABELS), 8)).astype(np.float32)
    x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
    assert omniglot.one_shot(x_ND, LABELS, NAMES)[0].mean() == pytest.approx(1 - 1 / 17, abs=0.03)


def test_the_peer_computes_the_heads_loss_from_the_same_centres() -> None:
    pytest.importorskip("pytorch_metric_learning", reason="pip install pytorch-metric-learning, for the comparison")
    config = load(None, ["loss=arcface", *omniglot.COMMON, *omniglot.ARCFACE])
    counts, device = torch.full((7,), 20), torch.device("cpu")
    ours, peer = Objective(config, 7, counts, device), omniglot.Peer(config, 7, counts, device)
    x_BD, labels_B = torch.randn(12, 128), torch.arange(12) % 7
    (member,) = ours._members.values()
    peer._loss.W.data = normalize(member.module.weight.detach(), dim=1).T.clone()
    for warmup in (0.0, 0.5, 1.0):
        ours.set_progress(1, warmup)
        peer.set_progress(1, warmup)
        keys = ["a"] * 12
        torch.testing.assert_close(ours(x_BD, labels_B, keys)[0], peer(x_BD, labels_B, keys)[0], rtol=1e-5, atol=1e-5)
