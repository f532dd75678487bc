"""From the settings to an estimator: rows of one layer in, its directions out, with everything that is taken out."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from src.directions.settings import DirectionSettings
from src.ops import directions, probes
from src.ops.direction_scores import Estimator

N_BLOCKS = 9


class Plan(NamedTuple):
    """What one layer's directions are made by."""

    estimate: Estimator
    """(target rows, control rows), each (n, 1, d_model) → float32 (1, k, d_model)."""
    c: float | None
    """The C of logistic; None where it takes no part."""


def plan(config: DirectionSettings, target: Tensor, control: Tensor, paired: bool, preserved: Tensor | None) -> Plan:
    """
    The estimator of one layer; (target, control), its rows to fit on, decide the C of `--logistic_c none` and nothing
    else. preserved: (1, m, d_model), taken out of what the method gives. Raises ValueError as `src.ops.probes`.
    """
    uses_c = config.method == "logistic" or (config.method == "ensemble" and "logistic" in config.ensemble_methods)
    c = _c(config, target, control, paired) if uses_c else None
    method = _ensemble(config, paired, c) if config.method == "ensemble" else _method(config, config.method, paired, c)

    def estimate(target: Tensor, control: Tensor) -> Tensor:
        target, control = (directions.winsorize(rows, config.winsorize_quantile) for rows in (target, control))
        found = method(target, control)
        subspace = [] if preserved is None else [preserved]
        if config.project_out == "control_mean":
            subspace.append(control.mean(dim=0, dtype=torch.float64)[:, None])
        return directions.project_out(found, torch.cat([each.double() for each in subspace], 1)) if subspace else found

    return Plan(estimate, c)


def preserved_directions(config: DirectionSettings, preserve: Tensor, against: Tensor) -> Tensor:
    """
    What is to be preserved at one layer, (1, n_preserve, d_model): the mean difference of the two sets, rows
    (n, 1, d_model), and the principal directions of both. Raises ValueError when the rows determine fewer.
    """
    return directions.mean_and_pca(preserve, against, paired=False, k=config.n_preserve)


def _method(config: DirectionSettings, name: str, paired: bool, c: float | None) -> Callable[[Tensor, Tensor], Tensor]:
    match name:
        case "mean_difference":
            return directions.mean_difference
        case "median_of_means":
            return lambda target, control: directions.median_of_means(
                target, control, n_blocks=min(N_BLOCKS, len(target), len(control)), seed=config.seed
            )
        case "pca":
            return partial(directions.pca, paired=paired, k=config.n_directions)
        case "mean_and_pca":
            return partial(directions.mean_and_pca, paired=paired, k=config.n_directions)
        case "cones":
            return partial(directions.cones, k=config.n_directions, seed=config.seed)
        case "logistic":
            return partial(directions.logistic, c=c)
    raise AssertionError(f"no method {name}")


def _ensemble(config: DirectionSettings, paired: bool, c: float | None) -> Callable[[Tensor, Tensor], Tensor]:
    methods = [_method(config, name, paired, c) for name in config.ensemble_methods]
    weights = config.ensemble_weights or [1.0] * len(methods)
    return lambda target, control: directions.ensemble([each(target, control) for each in methods], weights)


def _c(config: DirectionSettings, target: Tensor, control: Tensor, paired: bool) -> float:
    if config.logistic_c is not None:
        return config.logistic_c
    n_folds = min(5, len(target), len(control))
    return float(probes.cross_validate(target, control, n_folds=n_folds, seed=config.seed, paired=paired).best_c)
