"""Digits under the losses: they are learned, reproducibly, and what is drawn is what decides."""

import numpy as np
import pytest
import torch

from trainer.errors import UserError
from trainer.figures import digits
from trainer.losses import by_name
from trainer.objective.geometry import ClassCentres

STEPS = 120


@pytest.fixture(scope="module")
def split() -> digits.Digits:
    torch.set_num_threads(1)
    return digits.load(0)


def test_the_split_is_stratified_and_chosen_by_the_seed(split: digits.Digits) -> None:
    train, test = split.train_labels_N, split.test_labels_N
    assert (len(train), len(test)) == (1257, 540)
    share_C = torch.bincount(test) / (torch.bincount(train) + torch.bincount(test))
    assert bool((share_C.sub(0.3).abs() < 0.01).all())
    assert split.train_images_NCHW.min() == -1
    assert split.train_images_NCHW.max() == 1
    torch.testing.assert_close(digits.load(0).test_images_NCHW, split.test_images_NCHW)
    assert not torch.equal(digits.load(1).test_labels_N, test)


@pytest.mark.parametrize("name", ["softmax", "l_softmax", "arcface", "sub_center_arcface", "triplet", "center", "tpe"])
def test_digits_are_learned_in_sixteen_dimensions(name: str, split: digits.Digits) -> None:
    trained = digits.train(digits.settings(name, 16, STEPS), STEPS, 0, split)
    assert trained.name == name
    assert trained.accuracy_by_means() > 0.93
    by_centres = trained.accuracy_by_centres()
    if name in ("triplet", "tpe"):
        assert by_centres is None
    else:
        assert by_centres is not None
        assert by_centres > 0.95
    assert np.mean(trained.losses[-10:]) < np.mean(trained.losses[:10])
    assert trained.angles().intra_mean < 45 < trained.angles().inter_smallest + 45


def test_the_same_seed_gives_the_same_embeddings(split: digits.Digits) -> None:
    config = digits.settings("arcface", 2, 12)
    first, again = (digits.train(config, 12, 3, split) for _ in range(2))
    np.testing.assert_array_equal(first.test_ND, again.test_ND)
    assert first.losses == again.losses
    assert not np.array_equal(first.test_ND, digits.train(config, 12, 4, split).test_ND)


@pytest.mark.parametrize("dimension", [2, 3, 16])
def test_every_loss_has_settings_that_it_accepts(dimension: int) -> None:
    for name in by_name():
        config = digits.settings(name, dimension, STEPS)
        named = config.auxiliary[0] if config.auxiliary else config.loss
        assert named.name == name
        assert config.backbone.dimension == dimension
    with pytest.raises(UserError, match="loss 'arcfaec' is not known; allowed: softmax"):
        digits.settings("arcfaec", 2, STEPS)


def test_scores_of_centres_are_the_logits_of_the_paper() -> None:
    """x . w + b as it is; s max_k cos(theta_k) where embeddings and centres are unit vectors."""
    random = np.random.default_rng(0)
    x_ND, rows_CKD, bias_C = random.normal(size=(5, 3)), random.normal(size=(10, 2, 3)), random.normal(size=10)
    rows_CKD /= np.linalg.norm(rows_CKD, axis=2, keepdims=True)
    angular = ClassCentres(rows_CKD, np.zeros(10), 16.0).scores(x_ND)
    plain = ClassCentres(rows_CKD[:, :1], bias_C, None).scores(x_ND)
    for n in range(5):
        for c in range(10):
            cosines = [float(x_ND[n] @ w_D) / float(np.linalg.norm(x_ND[n])) for w_D in rows_CKD[c]]
            assert angular[n, c] == pytest.approx(16 * max(cosines))
            assert plain[n, c] == pytest.approx(float(x_ND[n] @ rows_CKD[c, 0]) + bias_C[c])


def test_learned_centres_are_those_of_the_centre_loss_not_of_the_softmax(split: digits.Digits) -> None:
    """They lie amid their own class's samples, which the softmax's rows, shorter by far, do not."""
    trained = digits.train(digits.settings("center", 3, STEPS), STEPS, 0, split)
    assert trained.learned_CD is not None
    assert trained.centres is not None
    means_CD = np.stack([trained.train_ND[trained.train_labels_N == label].mean(axis=0) for label in range(10)])
    lengths_C = np.linalg.norm(means_CD, axis=1)
    off_C = np.linalg.norm(trained.learned_CD - means_CD, axis=1)
    assert (off_C / lengths_C).max() < 0.4
    assert (np.linalg.norm(trained.centres.rows_cKD[:, 0] - means_CD, axis=1) / lengths_C).min() > 0.5
    assert digits.train(digits.settings("range", 3, 2), 2, 0, split).learned_CD is None
    assert digits.train(digits.settings("arcface", 3, 2), 2, 0, split).learned_CD is None


def test_center_invariant_makes_the_centres_lengths_more_equal(split: digits.Digits) -> None:
    spreads = {}
    for name in ("center", "center_invariant"):
        learned_CD = digits.train(digits.settings(name, 3, 200), 200, 0, split).learned_CD
        assert learned_CD is not None
        lengths_C = np.linalg.norm(learned_CD, axis=1)
        spreads[name] = float(lengths_C.std() / lengths_C.mean())
    assert spreads["center_invariant"] < 0.07
    assert spreads["center"] > 1.7 * spreads["center_invariant"]


def test_a_run_that_diverges_says_so(split: digits.Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "NETWORK_LR", 1e30)
    with pytest.raises(UserError, match="not finite"):
        digits.train(digits.settings("softmax", 2, 5), 5, 0, split)
