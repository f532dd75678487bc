import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor

from src.ops.direction_scores import (
    PERCENTILES,
    Scores,
    auc,
    best_layer,
    percentiles,
    projections,
    random_directions,
    score,
    shuffled_labels,
)
from src.ops.directions import mean_and_pca, mean_difference, pca

N_LAYERS, WIDTH = 3, 30
SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(n: int = 80, shift: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with noise of standard deviation 1, classes `shift` apart along one direction a layer."""
    direction = torch.nn.functional.normalize(normal(N_LAYERS, WIDTH, seed=seed), dim=-1)
    target = normal(n, N_LAYERS, WIDTH, seed=seed + 1) + shift * direction
    return target, normal(n, N_LAYERS, WIDTH, seed=seed + 2), direction[:, None]


@settings(max_examples=60, deadline=None)
@given(SCORES, SCORES)
def test_auc_counts_pairs_with_ties_as_half(target: list[int], control: list[int]) -> None:
    pairs = [1.0 if t > c else 0.5 if t == c else 0.0 for t in target for c in control]
    found = auc(torch.tensor(target).float(), torch.tensor(control).float())
    assert float(found) == pytest.approx(np.mean(pairs), abs=1e-12)
    labels = [1] * len(target) + [0] * len(control)
    assert float(found) == pytest.approx(roc_auc_score(labels, target + control), abs=1e-12)


def test_auc_is_taken_over_the_last_dimension() -> None:
    target, control = normal(2, 3, 7), normal(2, 3, 9, seed=1)
    found = auc(target, control)
    assert found.shape == (2, 3)
    assert found[1, 2] == auc(target[1, 2], control[1, 2])
    torch.testing.assert_close(auc(control, target), 1 - found)


def test_auc_of_nothing_and_of_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="0 target and 2 control"):
        auc(torch.zeros(0), torch.zeros(2))
    with pytest.raises(ValueError, match="1 are NaN"):
        auc(torch.tensor([torch.nan]), torch.zeros(2))


def test_scores_are_those_of_the_projections() -> None:
    target, control, direction = planted()
    directions = torch.cat([direction, torch.nn.functional.normalize(normal(N_LAYERS, 1, WIDTH, seed=9), dim=-1)], 1)
    found = score(directions, target, control)
    for layer in range(N_LAYERS):
        for k in range(2):
            t, c = (rows[:, layer].double() @ directions[layer, k].double() for rows in (target, control))
            pooled = ((t.var() + c.var()) / 2).sqrt()
            difference = target[:, layer].double().mean(dim=0) - control[:, layer].double().mean(dim=0)
            expected = {
                "auc": roc_auc_score([1] * 80 + [0] * 80, torch.cat([t, c])),
                "d_prime": (t.mean() - c.mean()) / pooled,
                "target_mean": t.mean(),
                "control_mean": c.mean(),
                "cosine": torch.cosine_similarity(directions[layer, k].double(), difference, dim=0),
            }
            for name, value in expected.items():
                assert float(getattr(found, name)[layer, k]) == pytest.approx(float(value), abs=1e-6)
    assert (found.auc[:, 0] > 0.85).all() and (found.d_prime[:, 0] - 2).abs().max() < 0.6


def test_the_other_side_has_the_opposite_scores() -> None:
    target, control, direction = planted()
    one, other = score(direction, target, control), score(-direction, target, control)
    torch.testing.assert_close(other.auc, 1 - one.auc)
    for name in ("d_prime", "target_mean", "control_mean", "cosine"):
        torch.testing.assert_close(getattr(other, name), -getattr(one, name))
    exchanged = score(direction, control, target)
    torch.testing.assert_close(exchanged.auc, 1 - one.auc)
    torch.testing.assert_close(exchanged.d_prime, -one.d_prime)


def test_scores_do_not_depend_on_the_rows_order_and_scale() -> None:
    target, control, direction = planted()
    one, other = score(direction, target, control), score(direction, 4 * target.flip(0), 4 * control)
    for name in ("auc", "d_prime", "cosine"):
        torch.testing.assert_close(getattr(other, name), getattr(one, name))


def test_the_mean_difference_has_cosine_1_with_itself() -> None:
    target, control, _ = planted()
    found = score(mean_difference(target, control), target, control)
    torch.testing.assert_close(found.cosine, torch.ones(N_LAYERS, 1).double(), atol=1e-6, rtol=0)


def test_percentiles_are_numpys_of_the_projections() -> None:
    target, _, direction = planted(n=41)
    found = percentiles(direction, target)
    assert list(found) == [f"p{p}" for p in PERCENTILES]
    values = projections(direction, target)
    for p in PERCENTILES:
        assert found[f"p{p}"].shape == (N_LAYERS, 1)
        assert float(found[f"p{p}"][1, 0]) == pytest.approx(np.percentile(values[:, 1, 0], p))


def test_a_random_direction_tells_less_than_the_planted_one() -> None:
    (target, control, direction), (held, held_control, _) = planted(), planted()
    held = held + 0  # the same rows: what is random is only the direction
    found = random_directions(target, control, held, held_control, n_seeds=200)
    assert (found.low <= found.mean).all() and (found.mean <= found.high).all()
    assert found.mean.shape == (N_LAYERS, 1)
    assert (found.high < score(direction, held, held_control).auc).all()
    again = random_directions(target, control, held, held_control, n_seeds=200)
    assert torch.equal(found.low, again.low)
    other = random_directions(target, control, held, held_control, n_seeds=200, seed=1)
    assert not torch.equal(found.mean, other.mean)
    torch.testing.assert_close(found.mean, other.mean, atol=0.05, rtol=0)


def test_random_directions_are_turned_by_the_rows_for_fitting_only() -> None:
    target, control, _ = planted(shift=8.0)
    right = random_directions(target, control, target, control)
    wrong = random_directions(control, target, target, control)
    assert (right.mean > 0.55).all()
    torch.testing.assert_close(wrong.mean, 1 - right.mean)


@pytest.mark.parametrize("paired", [False, True])
def test_shuffled_labels_find_nothing(paired: bool) -> None:
    target, control, _ = planted(n=120, shift=1.5)
    fitting, held = (target[:60], control[:60]), (target[60:], control[60:])
    found = shuffled_labels(mean_difference, *fitting, *held, paired=paired, n_seeds=100)
    assert (found.mean - 0.5).abs().max() < 0.1
    assert (found.low < 0.5).all() and (found.high > 0.5).all()
    real = score(mean_difference(*fitting), *held)
    assert (real.auc > found.high).all()


def test_shuffled_labels_find_nothing_in_classes_that_lie_far_apart() -> None:
    target, control, _ = planted(n=80, shift=30.0)
    fitting, held = (target[:40], control[:40]), (target[40:], control[40:])
    for paired in (False, True):
        found = shuffled_labels(mean_difference, *fitting, *held, paired=paired, n_seeds=100)
        assert (found.mean - 0.5).abs().max() < 0.05
        assert (found.low > 0.2).all() and (found.high < 0.8).all()


def test_shuffling_keeps_rows_and_pairs() -> None:
    target, control, _ = planted(n=10)
    seen = []

    def estimate(t: Tensor, c: Tensor) -> Tensor:
        seen.append((t, c))
        return pca(t, c, paired=True, k=2)

    found = shuffled_labels(estimate, target, control, target, control, paired=True, n_seeds=3)
    assert found.mean.shape == (N_LAYERS, 2)
    for t, c in seen:
        assert torch.equal(t + c, target + control)
    assert not torch.equal(seen[0][0], seen[1][0])
    seen.clear()
    shuffled_labels(estimate, target, control, target, control, n_seeds=2)
    for t, c in seen:
        rows = torch.cat([t, c])
        assert torch.equal(rows.sort(dim=0).values, torch.cat([target, control]).sort(dim=0).values)
        assert len(t) == len(target)


def test_the_best_layer_has_the_highest_auc_then_d_prime_then_comes_first() -> None:
    def layers(areas: list[float], d_primes: list[float]) -> Scores:
        nothing = torch.zeros(len(areas), 1)
        return Scores(torch.tensor(areas)[:, None], torch.tensor(d_primes)[:, None], nothing, nothing, nothing)

    assert best_layer(layers([0.7, 0.9, 0.8], [9, 1, 5])) == 1
    assert best_layer(layers([0.7, 1.0, 1.0, 1.0], [9, 1, 5, 5])) == 2
    target, control, direction = planted()
    target[:, 2] += 3 * direction[2, 0]
    found = score(mean_and_pca(target, control, paired=True, k=2), target, control)
    assert best_layer(found) == 2
    assert best_layer(found, k_index=1) in range(N_LAYERS)


def test_bad_input_is_refused() -> None:
    target, control, direction = planted(n=10)
    with pytest.raises(ValueError, match="expected at least two each"):
        score(direction, target[:1], control)
    with pytest.raises(ValueError, match="layers and width"):
        score(direction[:2], target, control)
    with pytest.raises(ValueError, match="directions hold NaN"):
        score(direction * torch.nan, target, control)
    with pytest.raises(ValueError, match="no target rows"):
        score(direction, target[:0], control)
    with pytest.raises(ValueError, match=r"layer 0 \(3 such layers\): the class means"):
        score(direction, target, target)
    flat = torch.zeros_like(target), torch.ones_like(target)
    with pytest.raises(ValueError, match="d′ has no value"):
        score(torch.full_like(direction, 0.25), *flat)
    with pytest.raises(ValueError, match="percentiles of no rows"):
        percentiles(direction, target[:0])
    for control_of in (random_directions, lambda *a, **k: shuffled_labels(mean_difference, *a, **k)):
        with pytest.raises(ValueError, match="0 repetitions"):
            control_of(target, control, target, control, n_seeds=0)
        with pytest.raises(ValueError, match="must be the same"):
            control_of(target, control, target[..., 1:], control[..., 1:])
    with pytest.raises(ValueError, match="pairs need"):
        shuffled_labels(mean_difference, target, control[1:], target, control, paired=True)
