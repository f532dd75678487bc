"""
How well directions tell target from control rows that they were not made from, with two controls.

Directions are (n_layers, k, d_model), rows (n, n_layers, d_model); a row's projection on a direction is their inner
product, in float64.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from src.ops.row_space import NO_DIFFERENCE, check_classes, check_directions, check_rows

NO_VARIATION = 1e-9
"""A standard deviation within the classes below this share of the largest projection is rounding."""
PERCENTILES = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)
Estimator = Callable[[Tensor, Tensor], Tensor]
"""(target rows, control rows) → directions, as every method of `src.ops.directions` with its settings bound."""


class Scores(NamedTuple):
    """All float64 (n_layers, k), on the CPU."""

    auc: Tensor
    """Probability that a target row projects farther than a control row, ties counted half."""
    d_prime: Tensor
    """Difference of the classes' mean projections over their pooled standard deviation."""
    target_mean: Tensor
    control_mean: Tensor
    cosine: Tensor
    """With the mean difference of the scored rows."""


class Control(NamedTuple):
    """AUCs over random repetitions: mean and the 2.5th and 97.5th percentile, all float64 (n_layers, k), on the CPU."""

    mean: Tensor
    low: Tensor
    high: Tensor


def projections(directions: Tensor, rows: Tensor) -> Tensor:
    """⟨row, direction⟩, float64 (n, n_layers, k) on the CPU. ValueError for shapes that disagree, NaN or infinity."""
    check_directions(directions)
    check_rows(rows, "rows")
    if (directions.shape[0], directions.shape[2]) != tuple(rows.shape[1:]):
        raise ValueError(
            f"directions are {tuple(directions.shape)}, rows {tuple(rows.shape)}: layers and width must be the same"
        )
    by_layer = [rows[:, i].double() @ directions[i].to(rows.device).double().T for i in range(len(directions))]
    return torch.stack(by_layer, dim=1).cpu()


def score(directions: Tensor, target: Tensor, control: Tensor) -> Scores:
    """
    Scores of directions on rows of both classes.

    Raises ValueError for what `check_classes` and `projections` refuse, fewer than two rows in a class, a layer where
    the projections do not vary within the classes (d′ has no value), and one where the class means are equal.
    """
    check_classes(target, control)
    if min(len(target), len(control)) < 2:
        raise ValueError(
            f"{len(target)} target and {len(control)} control rows to score on: expected at least two each"
        )
    of_target, of_control = projections(directions, target), projections(directions, control)
    means = of_target.mean(dim=0), of_control.mean(dim=0)
    difference = target.mean(dim=0, dtype=torch.float64) - control.mean(dim=0, dtype=torch.float64)
    length = difference.norm(dim=-1, keepdim=True)
    norms = [rows.norm(dim=-1, dtype=torch.float64).mean(dim=0) for rows in (target, control)]
    _refuse(
        length[..., 0] <= NO_DIFFERENCE * torch.maximum(*norms),
        "the class means of the scored rows are equal: there is no cosine with their difference",
    )
    unit = directions.double() / directions.double().norm(dim=-1, keepdim=True)
    return Scores(
        auc=auc(of_target.movedim(0, -1), of_control.movedim(0, -1)),
        d_prime=(means[0] - means[1]) / _pooled_deviation(of_target, of_control),
        target_mean=means[0],
        control_mean=means[1],
        cosine=(unit.to(difference.device) @ (difference / length)[..., None])[..., 0].cpu(),
    )


def auc(target: Tensor, control: Tensor) -> Tensor:
    """
    Area under the ROC curve of scores (…, n_target) against (…, n_control), exact with ties: float64 (…), on the CPU.

    It is the Mann–Whitney U over n_target·n_control (Hanley and McNeil 1982). Raises ValueError for a class without
    scores and for NaN.
    """
    n_target, n_control = target.shape[-1], control.shape[-1]
    if not n_target or not n_control:
        raise ValueError(f"AUC of {n_target} target and {n_control} control scores: expected at least one each")
    scores = torch.cat([target.double(), control.double()], dim=-1).cpu().numpy()
    if np.isnan(scores).any():
        raise ValueError(f"AUC of scores of which {int(np.isnan(scores).sum())} are NaN")
    rank_sum = rankdata(scores, axis=-1)[..., :n_target].sum(axis=-1)
    return torch.as_tensor((rank_sum - n_target * (n_target + 1) / 2) / (n_target * n_control), dtype=torch.float64)


def percentiles(directions: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """Percentiles of the projections, linear between order statistics: "p0" … "p100" → float64 (n_layers, k)."""
    values = projections(directions, rows)
    if not len(values):
        raise ValueError("percentiles of no rows")
    found = np.percentile(values.numpy(), PERCENTILES, axis=0)
    return {f"p{p}": torch.from_numpy(values) for p, values in zip(PERCENTILES, found, strict=True)}


def best_layer(scores: Scores, k_index: int = 0) -> int:
    """
    The layer at which direction `k_index` has the highest AUC; of equal ones, as many reach 1, the one with the highest
    d′, then the lowest. Scores of rows that the directions were not made from make this an honest choice.
    """
    keys = list(zip(scores.auc[:, k_index].tolist(), scores.d_prime[:, k_index].tolist(), strict=True))
    return max(range(len(keys)), key=lambda layer: (*keys[layer], -layer))


def random_directions(
    fit_target: Tensor, fit_control: Tensor, target: Tensor, control: Tensor, *, n_seeds: int = 100, seed: int = 0
) -> Control:
    """
    AUC on (target, control) of directions uniform on the sphere: what any direction reaches; k is 1.

    The rows that a real direction would be made from, (fit_target, fit_control), decide only which way each one points,
    as they do for the real one. Raises ValueError for no seeds and what `check_classes` refuses.
    """
    _check_controls(n_seeds, fit_target, fit_control, target, control)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n_seeds, target.shape[2], generator=generator, dtype=torch.float64).to(target.device)
    directions = drawn / drawn.norm(dim=-1, keepdim=True)
    difference = fit_target.mean(dim=0, dtype=torch.float64) - fit_control.mean(dim=0, dtype=torch.float64)
    areas = []
    for layer in range(target.shape[1]):
        signed = directions * torch.where(directions @ difference[layer] < 0, -1.0, 1.0)[:, None]
        areas.append(auc(signed @ target[:, layer].double().T, signed @ control[:, layer].double().T))
    return _control(torch.stack(areas, dim=1)[..., None])


def shuffled_labels(
    estimate: Estimator,
    fit_target: Tensor,
    fit_control: Tensor,
    target: Tensor,
    control: Tensor,
    *,
    paired: bool = False,
    n_seeds: int = 20,
    seed: int = 0,
) -> Control:
    """
    AUC of the whole procedure with shuffled labels: those of (fit_target, fit_control), from which `estimate` makes
    directions, and those of (target, control), on which they are scored (Ojala and Garriga 2010). It is what the method
    reaches where there is nothing to find; its mean is 0.5 but for chance. The scored rows' own labels would not do:
    where the classes lie far apart, a direction from any labels lies along their difference, one way or the other.

    paired: labels are swapped within a pair or not, so pairs stay pairs. Raises ValueError for no seeds, what
    `check_classes` refuses and what `estimate` raises.
    """
    _check_controls(n_seeds, fit_target, fit_control, target, control)
    check_classes(fit_target, fit_control, paired)
    check_classes(target, control, paired)
    generator = torch.Generator().manual_seed(seed)
    areas = []
    for _ in range(n_seeds):
        directions = estimate(*_shuffled(fit_target, fit_control, paired, generator))
        scored = [
            projections(directions, rows).movedim(0, -1) for rows in _shuffled(target, control, paired, generator)
        ]
        areas.append(auc(*scored))
    return _control(torch.stack(areas))


def _shuffled(target: Tensor, control: Tensor, paired: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    if paired:
        swap = (torch.rand(len(target), generator=generator) < 0.5)[:, None, None].to(target.device)
        return torch.where(swap, control, target), torch.where(swap, target, control)
    both = torch.cat([target, control])
    both = both[torch.randperm(len(both), generator=generator).to(both.device)]
    return both[: len(target)], both[len(target) :]


def _pooled_deviation(target: Tensor, control: Tensor) -> Tensor:
    squares = sum((each - each.mean(dim=0)).square().sum(dim=0) for each in (target, control))
    deviation = (squares / (len(target) + len(control) - 2)).sqrt()
    largest = torch.cat([target, control]).abs().amax(dim=0)
    _refuse(
        (deviation <= NO_VARIATION * largest).any(dim=1),
        "the projections do not vary within the classes: d′ has no value",
    )
    return deviation


def _refuse(bad: Tensor, what: str) -> None:
    """Raises ValueError for the first True of (n_layers,)."""
    layers = bad.nonzero().flatten().tolist()
    if layers:
        raise ValueError(f"layer {layers[0]} ({len(layers)} such layers): {what}")


def _check_controls(n_seeds: int, fit_target: Tensor, fit_control: Tensor, target: Tensor, control: Tensor) -> None:
    if n_seeds < 1:
        raise ValueError(f"a control of {n_seeds} repetitions: expected at least 1")
    check_classes(fit_target, fit_control)
    check_classes(target, control)
    check_classes(fit_target, target)


def _control(areas: Tensor) -> Control:
    """From AUCs (repetitions, n_layers, k)."""
    low, high = np.percentile(areas.numpy(), [2.5, 97.5], axis=0)
    return Control(areas.mean(dim=0), torch.from_numpy(low), torch.from_numpy(high))
