"""
L2 logistic regression of target against control rows at every layer at once, with folds and penalties side by side.

The objective is scikit-learn's LogisticRegression(C): ½‖w‖² + C·Σ log(1 + exp(−y·(w·x + b))), b not penalised. The
optimal w lies in the span of the rows, so rows are replaced by their coordinates in it: with the n × n Gram matrix
X·Xᵀ = U·S²·Uᵀ they are U·S, and w = Xᵀ·U·S⁻¹·β has the length of β. One factorisation a layer serves all folds and
penalties, and nothing is ever d_model × d_model. Rows are centred first, which changes nothing but the intercept.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from src.ops.direction_scores import auc
from src.ops.logistic_solver import Problems, solve
from src.ops.row_space import RANK_TOLERANCE, check_classes, left_factor

C_VALUES = (0.1, 1.0, 10.0, 100.0, 1000.0)
HELD_OUT_TOLERANCE = 1e-3
"""Of the solver, in cross-validation: weights within a thousandth of their length from the optimum."""
CRITERIA = ("log_loss", "auc")
MAX_ELEMENTS_AT_ONCE = 1 << 25
"""Layers are taken in groups whose coordinates have at most this many numbers (256 MiB)."""


class Probes(NamedTuple):
    """Logit of target = ⟨weights[layer], row⟩ + intercepts[layer], rows as they were given (not scaled)."""

    weights: Tensor
    """Float64 (n_layers, d_model), on the rows' device."""
    intercepts: Tensor
    """Float64 (n_layers,)."""
    c: Tensor
    """Float64 (n_layers,): the C of each layer, for the rows as they were fitted (scaled if standardised)."""


class CrossValidation(NamedTuple):
    """Means over folds of what is measured on the rows that the fold's probe has not seen."""

    c_values: Tensor
    """Float64 (n_values,), ascending."""
    log_loss: Tensor
    """Nats a row, float64 (n_layers, n_values)."""
    auc: Tensor
    """Float64 (n_layers, n_values)."""
    best_c: Tensor
    """Float64 (n_layers,): the best by the criterion; of equal ones the smallest, which shrinks most."""


class _Coordinates(NamedTuple):
    design: Tensor
    """(L, n, r + 1): coordinates U·S in the span of the layer's rows, 0 beyond their rank; the last column is 1."""
    back: Tensor
    """(L, n, r): U·S⁻¹ / scale, so that w = (centred rows)ᵀ · back · β."""
    means: Tensor
    """(L, d_model)."""


def fit(target: Tensor, control: Tensor, *, c: float | Tensor = 1.0, standardize: bool = True) -> Probes:
    """
    One probe a layer from rows (n, n_layers, d_model) of any float dtype, label 1 for target.

    c: scikit-learn's C, one number or one a layer. standardize: divide the rows of each layer by one number, the root
    mean square of their distance from their mean over both classes, so that a C means the same at every layer (and
    model); weights are given back for the rows as they came. Weights are within 1e-4 of their length from the optimum.
    Raises ValueError for a class without rows, disagreeing shapes, NaN or infinity, C not positive, and a layer whose
    rows are all equal; RuntimeError when L-BFGS does not converge.
    """
    check_classes(target, control)
    c_of_layer = _c_of_layers(c, target.shape[1])
    rows, labels = _pooled(target, control)
    everything = torch.full((len(labels), 1), 1 / len(labels), dtype=torch.float64, device=rows.device)
    weights, intercepts = [], []
    for layers in _layer_groups(rows):
        span = _coordinates(rows, layers, standardize)
        penalty = (1 / (c_of_layer[list(layers)] * len(labels))).to(rows.device)[:, None]
        found, _ = solve(Problems(span.design, labels, everything, penalty), first_layer=layers.start)
        in_span = (span.back @ found[:, :-1])[..., 0]
        for i, layer in enumerate(layers):
            weight = (rows[:, layer].double() - span.means[i]).T @ in_span[i]
            weights.append(weight)
            intercepts.append(found[i, -1, 0] - weight @ span.means[i])
    return Probes(torch.stack(weights), torch.stack(intercepts), c_of_layer)


def cross_validate(
    target: Tensor,
    control: Tensor,
    *,
    c_values: Sequence[float] = C_VALUES,
    n_folds: int = 5,
    seed: int = 0,
    paired: bool = False,
    standardize: bool = True,
    criterion: str = "log_loss",
) -> CrossValidation:
    """
    Held-out log-loss and AUC of every layer and C, from one set of stratified folds drawn from `seed`.

    paired: target i and control i go to the same fold. criterion: `log_loss` or `auc`, by which `best_c` is chosen.
    standardize: as in `fit`; the one number a layer is that of all rows, the held-out ones too. Raises what `fit`
    raises, and ValueError for C values that are not distinct, an unknown criterion, and folds that are fewer than 2 or
    more than the rows of the smaller class.
    """
    check_classes(target, control, paired)
    values = torch.tensor(sorted(c_values), dtype=torch.float64)
    if not len(values) or len(values.unique()) < len(values):
        raise ValueError(f"C values {list(c_values)}: expected at least one, each once")
    _check_c(values)
    if criterion not in CRITERIA:
        raise ValueError(f"criterion {criterion!r}: expected {' or '.join(CRITERIA)}")
    folds = stratified_folds(len(target), len(control), n_folds, seed, paired)
    rows, labels = _pooled(target, control)
    parts = [
        _held_out(_coordinates(rows, group, standardize), labels, folds, values, group.start)
        for group in _layer_groups(rows)
    ]
    log_loss, area = (torch.cat(part) for part in zip(*parts, strict=True))
    best = log_loss.argmin(dim=1) if criterion == "log_loss" else area.argmax(dim=1)
    return CrossValidation(values, log_loss, area, values[best])


def fit_cross_validated(target: Tensor, control: Tensor, **settings: object) -> tuple[Probes, CrossValidation]:
    """`cross_validate` with `settings`, then `fit` on all rows with every layer's best C."""
    chosen = cross_validate(target, control, **settings)
    return fit(target, control, c=chosen.best_c, standardize=settings.get("standardize", True)), chosen


def stratified_folds(n_target: int, n_control: int, n_folds: int, seed: int, paired: bool = False) -> Tensor:
    """
    The fold 0 … n_folds − 1 of each row, targets first: int64 (n_target + n_control,). Each class is spread evenly.

    paired: row i of both classes is in the same fold. Raises ValueError unless 2 ≤ n_folds ≤ the smaller class.
    """
    if not 2 <= n_folds <= min(n_target, n_control):
        raise ValueError(
            f"{n_folds} folds of {n_target} target and {n_control} control rows: expected 2 to the size of the smaller"
        )
    generator = torch.Generator().manual_seed(seed)
    of_target = torch.randperm(n_target, generator=generator) % n_folds
    return torch.cat([of_target, of_target if paired else torch.randperm(n_control, generator=generator) % n_folds])


def _held_out(
    span: _Coordinates, labels: Tensor, folds: Tensor, c_values: Tensor, first_layer: int
) -> tuple[Tensor, Tensor]:
    """Mean log-loss and AUC over folds, each float64 (L, n_values) on the CPU."""
    n_folds, device = int(folds.max()) + 1, labels.device
    training = (folds[:, None] != torch.arange(n_folds)).double()
    counts = training.sum(dim=0)
    # Problems in the order (fold, C).
    row_weights = (training / counts).repeat_interleave(len(c_values), dim=1).to(device)
    penalty = (1 / (counts[:, None] * c_values)).flatten().to(device).expand(len(span.design), -1)
    found, _ = solve(Problems(span.design, labels, row_weights, penalty), HELD_OUT_TOLERANCE, first_layer=first_layer)
    logits = (span.design @ found).unflatten(-1, (n_folds, len(c_values))).cpu()
    labels = labels.cpu()
    losses, areas = [], []
    for fold in range(n_folds):
        held, is_target = logits[:, folds == fold, fold], labels[folds == fold] == 1
        losses.append(torch.where(is_target[:, None], softplus(-held), softplus(held)).mean(dim=1))
        areas.append(auc(held[:, is_target].mT, held[:, ~is_target].mT))
    return torch.stack(losses).mean(dim=0), torch.stack(areas).mean(dim=0)


def _pooled(target: Tensor, control: Tensor) -> tuple[Tensor, Tensor]:
    labels = torch.cat([torch.ones(len(target)), torch.zeros(len(control))]).double()
    return torch.cat([target, control]), labels.to(target.device)


def _layer_groups(rows: Tensor) -> list[range]:
    n, n_layers, width = rows.shape
    at_once = max(1, MAX_ELEMENTS_AT_ONCE // (n * (min(n, width) + 1)))
    return [range(start, min(start + at_once, n_layers)) for start in range(0, n_layers, at_once)]


def _coordinates(rows: Tensor, layers: range, standardize: bool) -> _Coordinates:
    means, factors, scales = [], [], []
    for layer in layers:
        at_layer = rows[:, layer].double()
        means.append(at_layer.mean(dim=0))
        factor = left_factor(at_layer - means[-1], least=RANK_TOLERANCE * float(at_layer.norm()))
        if not len(factor.s):
            raise ValueError(
                f"the rows of layer {layer} are equal to float32 precision: there is nothing to tell the classes by"
            )
        factors.append(factor)
        # Σ s² is the sum of the centred rows' squared lengths.
        scales.append(float(factor.s.square().sum() / len(rows)) ** 0.5 if standardize else 1.0)
    rank = max(len(factor.s) for factor in factors)
    design = torch.zeros(len(layers), len(rows), rank + 1, dtype=torch.float64, device=rows.device)
    back = torch.zeros_like(design[..., :-1])
    design[..., -1] = 1
    for i, (factor, scale) in enumerate(zip(factors, scales, strict=True)):
        design[i, :, : len(factor.s)] = factor.u * (factor.s / scale)
        # The weights of scaled rows, in the span's orthonormal basis, then divided by the scale for rows as given.
        back[i, :, : len(factor.s)] = factor.u / (factor.s * scale)
    return _Coordinates(design, back, torch.stack(means))


def _c_of_layers(c: float | Tensor, n_layers: int) -> Tensor:
    values = torch.as_tensor(c, dtype=torch.float64).cpu()
    if values.dim() > 1 or (values.dim() == 1 and len(values) != n_layers):
        raise ValueError(f"C of shape {tuple(values.shape)} for {n_layers} layers: expected one number or one a layer")
    _check_c(values)
    return values.expand(n_layers).clone()


def _check_c(values: Tensor) -> None:
    if not ((values > 0) & values.isfinite()).all():
        raise ValueError(f"C = {values.tolist()}: expected positive numbers")
