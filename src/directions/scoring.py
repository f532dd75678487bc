"""One layer at a time: its directions, how they do on held-out examples, and what two controls reach there."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.common.jsonl import round_fields
from src.directions.estimation import Plan
from src.directions.examples import Contrast
from src.ops.direction_scores import (
    PERCENTILES,
    Control,
    Scores,
    best_layer,
    percentiles,
    projections,
    random_directions,
    score,
    shuffled_labels,
)

N_RANDOM, N_SHUFFLES = 100, 20
MEASURED = (
    "auc", "d_prime", "target_mean", "control_mean", "cosine_held_out", "cosine_fitted", "difference_norm",
    "activation_norm", "logistic_c", "random_auc", "random_auc_low", "random_auc_high", "shuffled_auc",
    "shuffled_auc_low", "shuffled_auc_high",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LayerRows:
    """float32 rows of one layer, (n, 1, d_model), and which of them are held out."""

    layer: int
    target: Tensor
    control: Tensor
    target_held: Tensor
    """bool (n,)."""
    control_held: Tensor

    @property
    def fitted(self) -> tuple[Tensor, Tensor]:
        return self.target[~self.target_held], self.control[~self.control_held]

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        return self.target[self.target_held], self.control[self.control_held]

    @property
    def activation_norm(self) -> float:
        """Mean Euclidean norm over both classes."""
        return float(torch.cat([self.target, self.control]).norm(dim=-1, dtype=torch.float64).mean())


def layer_rows(
    layer: int, contrast: Contrast, held: frozenset[str], read: Callable[[Sequence[str]], Tensor]
) -> LayerRows:
    """The rows of one layer; read(ids) → float32 (n, 1, d_model)."""
    sides = {"target": contrast.target, "control": contrast.control}
    rows = {side: read([example.id for example in examples]) for side, examples in sides.items()}
    masks = {
        f"{side}_held": torch.tensor([example.id in held for example in examples]) for side, examples in sides.items()
    }
    return LayerRows(layer=layer, **rows, **masks)


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """What is known of one layer; what could not be computed is None, and `problem` says why."""

    layer: int
    activation_norm: float
    directions: Tensor | None = None
    """float32 (k, d_model)."""
    difference_norm: float | None = None
    """‖mean of target − mean of control‖ of the fitted rows: how far the classes lie apart."""
    cosine_fitted: Tensor | None = None
    """(k,): with the mean difference of the fitted rows."""
    c: float | None = None
    scores: Scores | None = None
    random: Control | None = None
    shuffled: Control | None = None
    percentiles: dict[str, list[list[float]]] | None = None
    """Class → k → percentiles of the held-out projections."""
    projections: tuple[Tensor, Tensor] | None = None
    """float64 (n_target,) and (n_control,) on the first direction, all rows."""
    problem: str | None = None


def measure(rows: LayerRows, make_plan: Callable[[Tensor, Tensor], Plan], paired: bool, seed: int) -> LayerResult:
    """
    The result of one layer. make_plan(target, control) → Plan, from the fitted rows.

    A ValueError of an estimator or a score makes the layer one without it, with its text as `problem`.
    """
    fitted, held = rows.fitted, rows.held
    known: dict[str, Any] = {"layer": rows.layer, "activation_norm": rows.activation_norm}
    try:
        plan = make_plan(*fitted)
        found = plan.estimate(*fitted)
    except ValueError as error:
        return LayerResult(**known, problem=f"no direction: {_of_layer(error, rows.layer)}")
    difference = fitted[0].mean(dim=0, dtype=torch.float64) - fitted[1].mean(dim=0, dtype=torch.float64)
    known |= {
        "directions": found[0],
        "difference_norm": float(difference.norm()),
        "cosine_fitted": (found[0].double() @ difference[0]) / difference.norm(),
        "c": plan.c,
        "projections": tuple(projections(found, each)[:, 0, 0] for each in (rows.target, rows.control)),
        "percentiles": {
            name: _percentiles(found, each) for name, each in zip(("target", "control"), held, strict=True)
        },
    }
    try:
        known["scores"] = score(found, *held)
        known["random"] = random_directions(*fitted, *held, n_seeds=N_RANDOM, seed=seed)
        known["shuffled"] = shuffled_labels(plan.estimate, *fitted, *held, paired=paired, n_seeds=N_SHUFFLES, seed=seed)
    except ValueError as error:
        what = "no scores" if "scores" not in known else "no controls"
        known["problem"] = f"{what}: {_of_layer(error, rows.layer)}"
    return LayerResult(**known)


def _of_layer(error: ValueError, layer: int) -> str:
    # The functions see one layer, their 0, whichever it is.
    text = re.sub(r" \((1 such layers|1 layers in all)\)", "", str(error))
    return re.sub(r"\blayer 0\b", f"layer {layer}", text)


def _percentiles(directions: Tensor, rows: Tensor) -> list[list[float]]:
    found = percentiles(directions, rows)
    return torch.stack([found[f"p{p}"][0] for p in PERCENTILES], dim=-1).tolist()


def best_of(results: Sequence[LayerResult]) -> LayerResult | None:
    """The layer with the best scores of the first direction, as `best_layer` says; None when none has scores."""
    scored = [result for result in results if result.scores is not None]
    if not scored:
        return None
    together = Scores(*(torch.cat(values) for values in zip(*(result.scores for result in scored), strict=True)))
    return scored[best_layer(together)]


def score_rows(results: Sequence[LayerResult], n_directions: int) -> list[dict[str, Any]]:
    """The rows of scores.jsonl, one a layer and direction; None where there is no number."""
    return [_row(result, k) for result in results for k in range(n_directions)]


def _row(result: LayerResult, k: int) -> dict[str, Any]:
    scores = result.scores
    row = {
        "id": f"layer-{result.layer}-k-{k}",
        "layer": result.layer,
        "k": k,
        "auc": scores and float(scores.auc[0, k]),
        "d_prime": scores and float(scores.d_prime[0, k]),
        "target_mean": scores and float(scores.target_mean[0, k]),
        "control_mean": scores and float(scores.control_mean[0, k]),
        "cosine_held_out": scores and float(scores.cosine[0, k]),
        "cosine_fitted": None if result.cosine_fitted is None else float(result.cosine_fitted[k]),
        "difference_norm": result.difference_norm,
        "activation_norm": result.activation_norm,
        "logistic_c": result.c,
    }
    # Random directions have no k: what any direction reaches is the same for each of ours.
    for name, control, index in (("random", result.random, 0), ("shuffled", result.shuffled, k)):
        row[f"{name}_auc"] = control and float(control.mean[0, index])
        row[f"{name}_auc_low"] = control and float(control.low[0, index])
        row[f"{name}_auc_high"] = control and float(control.high[0, index])
    return round_fields(row | {"problem": result.problem}, MEASURED)
