"""Probes are scikit-learn's logistic regressions, whatever the scale, the rank and the number of rows."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from src.ops import probes as module
from src.ops.directions import logistic, mean_difference
from src.ops.probes import C_VALUES, cross_validate, fit, fit_cross_validated, stratified_folds

N_LAYERS = 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(n_target: int = 50, n_control: int = 70, width: int = 20, shift: float = 0.3) -> tuple[Tensor, Tensor]:
    scale = torch.linspace(0.2, 3, width)
    common = 5 * normal(N_LAYERS, width, seed=3)
    target = normal(n_target, N_LAYERS, width) * scale + common + shift * normal(N_LAYERS, width, seed=1)
    return target, normal(n_control, N_LAYERS, width, seed=2) * scale + common


def sklearns(target: Tensor, control: Tensor, layer: int, c: float) -> LogisticRegression:
    rows = torch.cat([target, control])[:, layer].double().numpy()
    labels = np.repeat([1, 0], [len(target), len(control)])
    return LogisticRegression(C=c, tol=1e-9, max_iter=100_000, solver="newton-cholesky").fit(rows, labels)


def scaled(target: Tensor, control: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.cat([target, control]).double()
    rows = rows - rows.mean(dim=0)
    rows = rows / rows.square().sum(dim=-1).mean(dim=0).sqrt()[None, :, None]
    return rows[: len(target)], rows[len(target) :]


@pytest.mark.parametrize("width", [20, 200])
@pytest.mark.parametrize("c", [1e-3, 1.0, 100.0])
def test_weights_and_intercepts_are_scikit_learns(width: int, c: float) -> None:
    target, control = classes(width=width)
    found = fit(target, control, c=c, standardize=False)
    for layer in range(N_LAYERS):
        theirs = sklearns(target, control, layer, c)
        weights = theirs.coef_[0]
        ours = found.weights[layer].numpy()
        assert ours @ weights / np.linalg.norm(ours) / np.linalg.norm(weights) > 1 - 1e-6
        assert np.linalg.norm(ours - weights) < 1e-3 * np.linalg.norm(weights)
        assert abs(float(found.intercepts[layer]) - theirs.intercept_[0]) < 1e-3 * (1 + abs(theirs.intercept_[0]))


def test_standardised_probes_are_scikit_learns_of_scaled_rows_and_take_rows_as_given() -> None:
    target, control = classes()
    found = fit(target, control, c=10.0)
    for layer in range(N_LAYERS):
        theirs = sklearns(*scaled(target, control), layer, 10.0)
        logits = target[:, layer].double() @ found.weights[layer] + found.intercepts[layer]
        expected = theirs.decision_function(scaled(target, control)[0][:, layer].numpy())
        np.testing.assert_allclose(logits.numpy(), expected, atol=2e-3)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_standardised_logits_do_not_depend_on_scale_and_shift(scale: float) -> None:
    target, control = (rows.double() for rows in classes())
    shift = 20 * normal(N_LAYERS, 20, seed=7).double()
    found, moved = fit(target, control), fit(scale * (target + shift), scale * (control + shift))
    torch.testing.assert_close(moved.weights * scale, found.weights, rtol=1e-3, atol=1e-4)


def test_each_layer_has_its_own_c() -> None:
    target, control = classes()
    c = torch.tensor([0.1, 1.0, 100.0])
    mixed = fit(target, control, c=c)
    assert torch.equal(mixed.c, c.double())
    for layer, value in enumerate(c.tolist()):
        torch.testing.assert_close(
            mixed.weights[layer], fit(target, control, c=value).weights[layer], rtol=1e-3, atol=1e-4
        )


def test_separable_rows_keep_finite_weights() -> None:
    target, control = classes(shift=30.0)
    for c in (1.0, 1e6):
        found = fit(target, control, c=c)
        assert found.weights.isfinite().all() and found.intercepts.isfinite().all()
        logits = torch.einsum("nld,ld->nl", target.double(), found.weights) + found.intercepts
        assert (logits > 0).all()


def test_exchanging_the_classes_turns_the_weights_around() -> None:
    target, control = classes()
    found, turned = fit(target, control), fit(control, target)
    torch.testing.assert_close(turned.weights, -found.weights, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(turned.intercepts, -found.intercepts, rtol=1e-3, atol=1e-3)


def test_the_stronger_the_penalty_the_nearer_to_the_mean_difference() -> None:
    target, control = classes(n_target=60, n_control=60, shift=0.6)
    goal = mean_difference(target, control)
    agreement = [(logistic(target, control, c) * goal).sum(dim=-1).min() for c in (1e-6, 1.0, 1000.0)]
    assert agreement[0] > 1 - 1e-5 and agreement[0] > agreement[1] > agreement[2] > 0


def test_rows_that_repeat_or_depend_on_one_another_are_fitted() -> None:
    target, control = classes(n_target=8, n_control=9)
    twice = fit(torch.cat([target] * 2), torch.cat([control] * 2), c=1.0, standardize=False)
    once = fit(target, control, c=2.0, standardize=False)
    torch.testing.assert_close(twice.weights, once.weights, rtol=1e-3, atol=1e-5)


def test_classes_of_the_same_rows_have_no_weights() -> None:
    rows, _ = classes()
    found = fit(rows, rows)
    assert found.weights.norm(dim=-1).max() < 1e-9 and found.intercepts.abs().max() < 1e-9
    torch.testing.assert_close(cross_validate(rows, rows, paired=True).auc, torch.full((N_LAYERS, 5), 0.5).double())


def test_groups_of_layers_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    target, control = classes()
    whole, crossed = fit(target, control), cross_validate(target, control)
    monkeypatch.setattr(module, "MAX_ELEMENTS_AT_ONCE", 1)
    torch.testing.assert_close(fit(target, control).weights, whole.weights, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(cross_validate(target, control).auc, crossed.auc, rtol=0, atol=1e-3)


@pytest.mark.parametrize("width", [20, 200])
def test_held_out_figures_are_scikit_learns(width: int) -> None:
    target, control = classes(width=width)
    found = cross_validate(target, control, seed=4)
    folds = stratified_folds(len(target), len(control), 5, seed=4).numpy()
    rows, labels = torch.cat(scaled(target, control)).numpy(), np.repeat([1, 0], [len(target), len(control)])
    for layer in range(N_LAYERS):
        for i, c in enumerate(C_VALUES):
            areas, losses = [], []
            for fold in range(5):
                held = folds == fold
                probe = LogisticRegression(C=c, tol=1e-8, max_iter=10_000)
                probe.fit(rows[~held, layer], labels[~held])
                areas.append(roc_auc_score(labels[held], probe.decision_function(rows[held, layer])))
                losses.append(log_loss(labels[held], probe.predict_proba(rows[held, layer])))
            assert abs(float(found.auc[layer, i]) - np.mean(areas)) < 0.01
            assert abs(float(found.log_loss[layer, i]) - np.mean(losses)) < 0.01 * np.mean(losses)


def test_five_folds_and_five_penalties_agree_with_scikit_learn() -> None:
    """A small case of scripts/benchmarks/probes.py, which also measures the time."""
    target, control = normal(200, 4, 1024), normal(200, 4, 1024, seed=1) + 0.08 * normal(4, 1024, seed=2)
    rows, labels = torch.cat(scaled(target, control)).float().numpy(), np.repeat([1, 0], 200)
    folds = stratified_folds(200, 200, 5, seed=0).numpy()
    found = cross_validate(target, control).auc
    areas = np.zeros((4, 5))
    for layer in range(4):
        for fold in range(5):
            held = folds == fold
            for i, c in enumerate(C_VALUES):
                probe = LogisticRegression(C=c, max_iter=10_000).fit(rows[~held, layer], labels[~held])
                areas[layer, i] += roc_auc_score(labels[held], probe.decision_function(rows[held, layer])) / 5
    assert np.abs(found.numpy() - areas).max() < 0.01


def test_the_best_c_is_the_best_by_the_criterion_and_of_equals_the_smallest() -> None:
    target, control = classes()
    by_loss = cross_validate(target, control, c_values=(100.0, 0.1, 1.0))
    assert by_loss.c_values.tolist() == [0.1, 1.0, 100.0]
    assert torch.equal(by_loss.best_c, by_loss.c_values[by_loss.log_loss.argmin(dim=1)])
    by_auc = cross_validate(target, control, criterion="auc")
    assert torch.equal(by_auc.best_c, by_auc.c_values[by_auc.auc.argmax(dim=1)])
    easy = cross_validate(*classes(shift=30.0), criterion="auc")
    assert (easy.auc == 1).all() and (easy.best_c == C_VALUES[0]).all()


def test_cross_validated_probes_are_fitted_with_the_chosen_c() -> None:
    target, control = classes()
    found, chosen = fit_cross_validated(target, control, seed=1, standardize=False)
    assert torch.equal(found.c, chosen.best_c)
    expected = fit(target, control, c=chosen.best_c, standardize=False)
    assert torch.equal(found.weights, expected.weights)


def test_noise_has_a_held_out_auc_of_a_half() -> None:
    areas = [cross_validate(normal(60, 4, 30, seed=s), normal(60, 4, 30, seed=s + 100)).auc for s in range(5)]
    assert abs(float(torch.stack(areas).mean()) - 0.5) < 0.05


def test_folds_are_even_seeded_and_keep_pairs_together() -> None:
    folds = stratified_folds(23, 31, 5, seed=2)
    for part in folds.split([23, 31]):
        counts = part.bincount(minlength=5)
        assert counts.max() - counts.min() <= 1
    assert torch.equal(folds, stratified_folds(23, 31, 5, seed=2))
    assert not torch.equal(folds, stratified_folds(23, 31, 5, seed=3))
    first, second = stratified_folds(23, 23, 5, seed=2, paired=True).split(23)
    assert torch.equal(first, second)


@pytest.mark.parametrize("n_folds", [0, 1, 6])
def test_impossible_folds_are_refused(n_folds: int) -> None:
    with pytest.raises(ValueError, match=f"{n_folds} folds of 5 target"):
        cross_validate(*classes(n_target=5), n_folds=n_folds)


def test_bad_settings_and_rows_are_refused() -> None:
    target, control = classes(n_target=10, n_control=11)
    for c in (0.0, -1.0, float("nan"), float("inf"), torch.tensor([1.0, 0.0, 1.0])):
        with pytest.raises(ValueError, match="expected positive numbers"):
            fit(target, control, c=c)
    with pytest.raises(ValueError, match=r"one number or one a layer"):
        fit(target, control, c=torch.ones(2))
    for values in ((), (1.0, 1.0)):
        with pytest.raises(ValueError, match="each once"):
            cross_validate(target, control, c_values=values)
    with pytest.raises(ValueError, match="criterion 'accuracy': expected log_loss or auc"):
        cross_validate(target, control, criterion="accuracy")
    with pytest.raises(ValueError, match="pairs need"):
        cross_validate(target, control, paired=True)
    with pytest.raises(ValueError, match="no control rows"):
        fit(target, control[:0])
    for rows in (target[:1].expand(10, -1, -1), 1000 + 1e-5 * normal(10, N_LAYERS, 20)):
        with pytest.raises(ValueError, match="the rows of layer 0 are equal to float32 precision"):
            fit(rows, rows)
    control[0, 2, 0] = torch.inf
    with pytest.raises(ValueError, match="control rows hold NaN or infinity at layer 2"):
        fit(target, control)
