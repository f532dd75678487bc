"""Estimators from settings, layers without a direction or a score, and the choice of the best."""

from functools import partial
from pathlib import Path

import pytest
import torch

from src.directions.estimation import plan, preserved_directions
from src.directions.scoring import LayerResult, LayerRows, best_of, measure, score_rows
from src.directions.settings import METHODS, DirectionSettings
from src.ops import directions

D = 24


def config(**settings) -> DirectionSettings:
    return DirectionSettings(model_id="m", output_dir=Path("o"), pairs_path=Path("p"), **settings)


def classes(gap: float = 3.0, n: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (n, 1, D) of noise, those of target moved by `gap` along the first coordinate."""
    generator = torch.Generator().manual_seed(seed)
    target, control = (torch.randn(n, 1, D, generator=generator) for _ in range(2))
    target[..., 0] += gap
    return target, control


def rows_of(target: torch.Tensor, control: torch.Tensor, layer: int = 7) -> LayerRows:
    held = torch.arange(len(target)) % 4 == 0
    return LayerRows(layer=layer, target=target, control=control, target_held=held, control_held=held)


def measured(rows: LayerRows, settings: DirectionSettings, paired: bool = False) -> LayerResult:
    return measure(rows, partial(plan, settings, paired=paired, preserved=None), paired, seed=0)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_what_parts_the_classes(method: str, paired: bool) -> None:
    k = 2 if method in ("mean_and_pca", "cones") else 1
    result = measured(rows_of(*classes(gap=6.0)), config(method=method, n_directions=k), paired)
    assert result.problem is None and result.directions.shape == (k, D)
    basis = result.directions.double()
    assert torch.allclose(basis @ basis.T, torch.eye(k, dtype=torch.float64), atol=1e-5)
    # In the span: cones share the difference out over their directions.
    assert basis[:, 0].norm() > 0.9
    assert float(result.scores.auc[0, 0]) > 0.95 and float(result.shuffled.mean[0, 0]) < 0.75
    assert (result.c is not None) == (method in ("logistic", "ensemble"))


def test_scores_are_of_the_held_out_rows_only() -> None:
    target, control = classes(gap=0.0)
    rows = rows_of(target, control)
    # Only the fitted rows differ: a direction that is scored on them would look perfect.
    target[~rows.target_held, :, 0] += 10
    result = measured(rows, config())
    assert result.cosine_fitted[0] == pytest.approx(1) and float(result.scores.auc[0, 0]) < 0.8
    assert result.percentiles["target"][0][-1] < 4


def test_what_is_taken_out_is_orthogonal_to_what_is_left() -> None:
    target, control = classes()
    control[..., 1] += 5
    target[..., 1] += 5
    plain, projected = (
        measured(rows_of(target, control), config(project_out=name)) for name in ("none", "control_mean")
    )
    mean = rows_of(target, control).fitted[1].double().mean(0)[0]
    assert abs(float(projected.directions[0].double() @ mean)) < 1e-5 * float(mean.norm())
    assert abs(float(plain.directions[0].double() @ mean)) > 1e-3

    preserve, against = classes(seed=1)
    preserve[..., 2] += 4
    preserved = preserved_directions(config(n_preserve=3), preserve, against)
    assert preserved.shape == (1, 3, D)
    made = plan(config(), target, control, False, preserved).estimate(target, control)
    assert (made[0].double() @ preserved[0].double().T).abs().max() < 1e-5


def test_winsorizing_changes_what_is_fitted_and_nothing_that_is_scored() -> None:
    target, control = classes()
    target[1, 0, 5] = 1e4
    plain = measured(rows_of(target, control), config())
    clamped = measured(rows_of(target, control), config(winsorize_quantile=0.9))
    assert abs(plain.directions[0, 5]) > 0.9 and abs(clamped.directions[0, 0]) > 0.8
    assert clamped.activation_norm == plain.activation_norm > 100


def test_the_penalty_chosen_by_folds_is_used_and_told() -> None:
    rows = rows_of(*classes(gap=1.0))
    chosen = measured(rows, config(method="logistic", logistic_c=None))
    fixed = measured(rows, config(method="logistic", logistic_c=chosen.c))
    assert torch.equal(chosen.directions, fixed.directions)
    assert torch.equal(fixed.directions, directions.logistic(*rows.fitted, c=chosen.c)[0])


def test_a_layer_where_nothing_differs_has_no_direction_and_says_why() -> None:
    same = torch.ones(40, 1, D)
    result = measured(rows_of(same, same.clone()), config())
    assert result.directions is None and result.scores is None
    assert "no direction" in result.problem and "layer 7" in result.problem and "layer 0" not in result.problem
    row = score_rows([result], 1)[0]
    assert row["auc"] is None and row["random_auc"] is None and row["problem"] == result.problem
    assert row["activation_norm"] == pytest.approx(D**0.5, abs=1e-4)


def test_a_layer_whose_projections_do_not_vary_keeps_its_direction_without_scores() -> None:
    target, control = torch.zeros(40, 1, D), torch.zeros(40, 1, D)
    target[..., 0], control[..., 1] = 1, 1
    result = measured(rows_of(target, control), config())
    assert result.directions is not None and result.scores is None and "no scores" in result.problem
    assert best_of([result]) is None


def test_the_best_layer_is_the_one_that_parts_the_held_out_rows_best() -> None:
    results = [measured(rows_of(*classes(gap), layer), config()) for layer, gap in ((3, 0.5), (5, 6.0), (8, 1.0))]
    assert best_of(results).layer == 5
    rows = score_rows(results, 1)
    assert [row["id"] for row in rows] == ["layer-3-k-0", "layer-5-k-0", "layer-8-k-0"]
    assert rows[1]["target_mean"] - rows[1]["control_mean"] == pytest.approx(rows[1]["difference_norm"], rel=0.3)
