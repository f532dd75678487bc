"""Every estimator recovers a planted direction, points to the target and turns with the space; project_out is exact."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from src.ops.directions import (
    cones,
    ensemble,
    logistic,
    mean_and_pca,
    mean_difference,
    median_of_means,
    pca,
    project_out,
    winsorize,
)
from src.ops.moments import Moments

N_LAYERS, WIDTH = 3, 24
Estimator = Callable[[Tensor, Tensor], Tensor]
ESTIMATORS: dict[str, Estimator] = {
    "mean_difference": mean_difference,
    "median_of_means": median_of_means,
    "pca paired": lambda t, c: pca(t, c, paired=True, k=2),
    "pca pooled": lambda t, c: pca(t, c, paired=False, k=2),
    "mean_and_pca paired": lambda t, c: mean_and_pca(t, c, paired=True, k=3),
    "mean_and_pca pooled": lambda t, c: mean_and_pca(t, c, paired=False, k=3),
    "cones": lambda t, c: cones(t, c, k=2),
    "logistic": logistic,
}
TURNING = [name for name in ESTIMATORS if name != "median_of_means"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def planted(seed: int = 0, n: int = 200, shift: float = 4.0, width: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    """Target and control rows, noise of standard deviation 1 about a large common mean, and the direction between."""
    direction = unit(normal(N_LAYERS, width, seed=seed))
    common = 10 * normal(N_LAYERS, width, seed=seed + 1)
    target = normal(n, N_LAYERS, width, seed=seed + 2) + common + shift * direction
    return target, normal(n, N_LAYERS, width, seed=seed + 3) + common, direction


def cosines(directions: Tensor, others: Tensor) -> Tensor:
    return (directions[:, 0] * others).sum(dim=-1)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("seed", range(3))
def test_a_planted_direction_is_found_and_points_to_the_target(name: str, seed: int) -> None:
    target, control, direction = planted(seed)
    # A cluster of k-means leans from the whole class's mean by half of the spread that it splits.
    floor = 0.9 if name == "cones" else 0.95
    found = ESTIMATORS[name](target, control)
    assert cosines(found, direction).min() > floor
    assert cosines(ESTIMATORS[name](control, target), -direction).min() > floor


@pytest.mark.parametrize("name", ESTIMATORS)
def test_directions_are_orthonormal_float32(name: str) -> None:
    found = ESTIMATORS[name](*planted()[:2])
    assert found.dtype == torch.float32 and found.shape[::2] == (N_LAYERS, WIDTH)
    eye = torch.eye(found.shape[1]).expand(N_LAYERS, -1, -1)
    torch.testing.assert_close(found @ found.mT, eye, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", TURNING)
def test_directions_turn_with_the_space(name: str) -> None:
    target, control, _ = planted()
    rotation = torch.linalg.qr(normal(WIDTH, WIDTH, seed=9).double())[0].float()
    found, turned = ESTIMATORS[name](target, control), ESTIMATORS[name](target @ rotation, control @ rotation)
    agreement = (turned * (found @ rotation)).sum(dim=-1)
    # The sign of the principal directions beside a mean difference is a matter of coordinates.
    torch.testing.assert_close(agreement.abs(), torch.ones_like(agreement), atol=1e-4, rtol=0)
    assert (agreement[:, 0] > 0).all()


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("scale", [0.25, 1024.0])
def test_scale_and_shift_change_nothing(name: str, scale: float) -> None:
    target, control, _ = planted()
    shift = normal(N_LAYERS, WIDTH, seed=11)
    found, moved = (
        ESTIMATORS[name](*rows) for rows in ((target, control), (scale * (target + shift), scale * (control + shift)))
    )
    torch.testing.assert_close(moved, found, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name not in ("median_of_means", "cones")])
def test_the_order_of_rows_changes_nothing(name: str) -> None:
    target, control, _ = planted()
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(1))
    found, mixed = ESTIMATORS[name](target, control), ESTIMATORS[name](target[order], control[order])
    torch.testing.assert_close(mixed, found, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_layers_do_not_influence_one_another_nor_rows_change(name: str) -> None:
    target, control, _ = planted()
    kept = target.clone(), control.clone()
    whole = ESTIMATORS[name](target, control)
    assert torch.equal(target, kept[0]) and torch.equal(control, kept[1])
    torch.testing.assert_close(ESTIMATORS[name](target[:, 1:2], control[:, 1:2]), whole[1:2], atol=1e-4, rtol=0)
    assert torch.equal(ESTIMATORS[name](target, control), whole)


def test_moments_give_the_mean_difference_of_their_rows() -> None:
    target, control, _ = planted()
    moments = [Moments(N_LAYERS, WIDTH), Moments(N_LAYERS, WIDTH)]
    for each, rows in zip(moments, (target, control), strict=True):
        for part in rows.split(17):
            each.add(part)
    expected = unit(target.double().mean(dim=0) - control.double().mean(dim=0)).float()
    for found in (mean_difference(*moments), mean_difference(target, moments[1]), mean_difference(target, control)):
        torch.testing.assert_close(found[:, 0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(cones(target, moments[1]), cones(target, control), atol=1e-6, rtol=0)


def test_one_block_is_the_mean_difference_and_few_outliers_do_not_carry_medians_away() -> None:
    target, control, direction = planted()
    torch.testing.assert_close(
        median_of_means(target, control, n_blocks=1), mean_difference(target, control), atol=1e-6, rtol=0
    )
    target[:4] += 1e4 * normal(N_LAYERS, WIDTH, seed=5)
    assert cosines(mean_difference(target, control), direction).abs().max() < 0.7
    for n_blocks in (9, 10, 20):
        assert cosines(median_of_means(target, control, n_blocks), direction).min() > 0.9


def test_paired_pca_is_the_principal_direction_of_the_differences_about_zero() -> None:
    target, control, _ = planted(n=30)
    found = pca(target, control, paired=True, k=3)
    for layer in range(N_LAYERS):
        differences = (target - control)[:, layer].double()
        right = torch.linalg.svd(differences, full_matrices=False).Vh[:3]
        torch.testing.assert_close((found[layer] * right).sum(dim=-1).abs(), torch.ones(3).double(), atol=1e-5, rtol=0)
        mean = differences.mean(dim=0)
        assert (found[layer].double() @ mean > 0).all()


def test_pairs_cancel_what_they_share() -> None:
    target, control, direction = planted()
    shared = 20 * normal(len(target), N_LAYERS, WIDTH, seed=8)
    assert cosines(pca(target + shared, control + shared, paired=True), direction).min() > 0.95
    assert cosines(pca(target + shared, control + shared, paired=False), direction).max() < 0.9


def test_pooled_pca_does_not_depend_on_the_classes_sizes() -> None:
    target, control, _ = planted(n=40)
    twice = torch.cat([control] * 3)
    torch.testing.assert_close(
        pca(target, twice, paired=False, k=2), pca(target, control, paired=False, k=2), atol=1e-4, rtol=0
    )


def test_both_ways_of_factoring_find_the_same() -> None:
    target, control, _ = planted(n=20, width=60)
    whole = mean_and_pca(target, control, paired=True, k=3)
    wider = mean_and_pca(*(torch.cat([rows, rows, rows, rows]) for rows in (target, control)), paired=True, k=3)
    torch.testing.assert_close(wider, whole, atol=1e-4, rtol=0)


def test_mean_and_pca_adds_the_strongest_variation_beside_the_mean_difference() -> None:
    target, control, direction = planted(n=400)
    beside = unit(normal(N_LAYERS, WIDTH, seed=21))
    beside = unit(beside - (beside * direction).sum(dim=-1, keepdim=True) * direction)
    spread = 6 * normal(800, N_LAYERS, 1, seed=22)
    target, control = target + spread[:400] * beside, control + spread[400:] * beside
    found = mean_and_pca(target, control, paired=False, k=2)
    assert torch.equal(found[:, 0], mean_difference(target, control)[:, 0])
    assert (found[:, 1] * beside).sum(dim=-1).abs().min() > 0.9
    assert torch.equal(mean_and_pca(target, control, paired=False, k=1), mean_difference(target, control))


def test_cones_span_the_differences_of_separate_clusters_largest_first() -> None:
    _, control, _ = planted(n=100)
    centres = 15 * unit(normal(2, N_LAYERS, WIDTH, seed=31))
    base = control.mean(dim=0)
    target = torch.cat([
        base + centres[0] + normal(30, N_LAYERS, WIDTH, seed=32),
        base + centres[1] + normal(70, N_LAYERS, WIDTH, seed=33),
    ])  # fmt: skip
    found = cones(target, control, k=2)
    assert cosines(found, unit(centres[1])).min() > 0.95
    span = found.mT @ found
    inside = (span @ unit(centres[0])[..., None])[..., 0]
    assert inside.norm(dim=-1).min() > 0.95
    torch.testing.assert_close(cones(target, control, k=1), mean_difference(target, control), atol=1e-6, rtol=0)


def test_an_ensemble_aligns_signs_and_weighs() -> None:
    target, control, _ = planted()
    first, second = mean_difference(target, control), logistic(target, control)
    both = ensemble([first, -second], [2.0, 1.0])
    torch.testing.assert_close(both, unit(2 * first + second), atol=1e-6, rtol=0)
    torch.testing.assert_close(ensemble([first], [0.1]), first, atol=1e-6, rtol=0)
    many = mean_and_pca(target, control, paired=True, k=3)
    torch.testing.assert_close(ensemble([many, -many], [1, 3]), many, atol=1e-5, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_projecting_out_is_idempotent_and_orthogonal(k: int, m: int, rank: int, seed: int) -> None:
    directions = unit(normal(2, k, 16, seed=seed))
    subspace = normal(2, m, rank, seed=seed + 1) @ normal(2, rank, 16, seed=seed + 2)
    once = project_out(directions, subspace)
    torch.testing.assert_close(project_out(once, subspace), once, atol=1e-6, rtol=0)
    assert (once @ unit(subspace).mT).abs().max() < 1e-5
    torch.testing.assert_close(once @ once.mT, torch.eye(k).expand(2, k, k), atol=1e-6, rtol=0)


def test_projecting_out_one_vector_is_the_formula() -> None:
    direction, mean = unit(normal(2, 1, 16)), 30 * normal(2, 1, 16, seed=1)
    along = unit(mean)
    expected = unit(direction - (direction * along).sum(dim=-1, keepdim=True) * along)
    torch.testing.assert_close(project_out(direction, mean.double()), expected, atol=1e-6, rtol=0)


def test_a_direction_within_the_subspace_is_refused() -> None:
    subspace = normal(2, 3, 16)
    inside = unit(subspace.sum(dim=1, keepdim=True))
    inside[0] = unit(normal(1, 16, seed=4))
    with pytest.raises(ValueError, match="layer 1, direction 0: the direction lies in the subspace"):
        project_out(inside, subspace)
    nearly = unit(unit(subspace[:, :1]) + 5e-5 * unit(normal(2, 1, 16, seed=5)))
    with pytest.raises(ValueError, match="lies in the subspace"):
        project_out(nearly, subspace)
    clear = unit(unit(subspace[:, :1]) + 1e-2 * unit(normal(2, 1, 16, seed=5)))
    assert (project_out(clear, subspace) @ unit(subspace).mT).abs().max() < 1e-5
    with pytest.raises(ValueError, match="the subspace"):
        project_out(inside, subspace[:1])
    torch.testing.assert_close(project_out(inside, subspace[:, :0]), inside, atol=1e-6, rtol=0)


def test_winsorizing_clamps_each_row_and_layer_at_its_own_quantile() -> None:
    rows = normal(5, N_LAYERS, 101)
    rows[0, 0, 3] = -1e4
    clamped = winsorize(rows, 0.9)
    limit = rows.abs().sort(dim=-1).values[..., 90:91]
    torch.testing.assert_close(clamped, rows.clamp(-limit, limit))
    assert torch.equal(winsorize(rows, 1.0), rows)
    torch.testing.assert_close(winsorize(rows * 7, 0.9), clamped * 7)
    for quantile in (0.0, 1.01, float("nan")):
        with pytest.raises(ValueError, match="more than 0 and at most 1"):
            winsorize(rows, quantile)


def test_winsorizing_in_groups_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = normal(5, N_LAYERS, 50)
    whole = winsorize(rows, 0.8)
    monkeypatch.setattr("src.ops.directions.MAX_ELEMENTS_AT_ONCE", 99)
    assert torch.equal(winsorize(rows, 0.8), whole)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_bad_rows_are_refused(name: str) -> None:
    target, control, _ = planted(n=20)
    estimate = ESTIMATORS[name]
    with pytest.raises(ValueError, match="no target rows"):
        estimate(target[:0], control)
    with pytest.raises(ValueError, match="no control rows"):
        estimate(target, control[:0])
    with pytest.raises(ValueError, match="must be the same"):
        estimate(target[..., :-1], control)
    same_at_one = control.clone()
    same_at_one[:, [0, 2]] += 1
    with pytest.raises(ValueError, match=r"equal at layer 1 \(1 such"):
        estimate(same_at_one.flip(0), control)
    control[3, 2, 0] = torch.nan
    with pytest.raises(ValueError, match="control rows hold NaN or infinity at layer 2"):
        estimate(target, control)


@pytest.mark.parametrize("estimate", [pca, mean_and_pca])
def test_pairs_and_numbers_of_directions_are_checked(estimate: Callable) -> None:
    target, control, _ = planted(n=6)
    with pytest.raises(ValueError, match="pairs need as many"):
        estimate(target, control[:-1], paired=True)
    for k, paired, most in ((0, True, 6), (7, True, 6), (12, False, 11)):
        with pytest.raises(ValueError, match=f"expected 1 to {most}"):
            estimate(target, control, paired=paired, k=k)
    equal = control + normal(1, N_LAYERS, WIDTH, seed=3)
    with pytest.raises(ValueError, match=r"layer 0: the rows determine \d principal directions"):
        estimate(equal, control, paired=True, k=3)


def test_other_bad_settings_are_refused() -> None:
    target, control, _ = planted(n=6)
    for n_blocks in (0, 7):
        with pytest.raises(ValueError, match="blocks"):
            median_of_means(target, control, n_blocks=n_blocks)
    for k in (0, 7):
        with pytest.raises(ValueError, match="clusters of 6 rows"):
            cones(target, control, k=k)
    with pytest.raises(ValueError, match="2 clusters of 1 distinct rows"):
        cones(target[:1].expand(6, -1, -1), control, k=2)
    direction = mean_difference(target, control)
    for sets, weights in (([], []), ([direction], [1.0, 2.0]), ([direction], [0.0]), ([direction], [float("nan")])):
        with pytest.raises(ValueError, match="expected"):
            ensemble(sets, weights)
    with pytest.raises(ValueError, match="not of length 1"):
        ensemble([direction, 2 * direction], [1.0, 1.0])
    with pytest.raises(ValueError, match="set 1 is"):
        ensemble([direction, direction[:1]], [1.0, 1.0])
