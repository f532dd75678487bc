"""What is told of the hidden states of an answer: their norms, and their projections on directions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from src.common.directions_file import Directions
from src.common.errors import InputError
from src.common.jsonl import round_measured

if TYPE_CHECKING:
    import numpy as np

    from src.models.types import GenerationResult


@dataclass(frozen=True, eq=False)
class Onto:
    """A direction to project on at one layer."""

    name: str
    layer: int
    direction: "np.ndarray"
    """float32 (d_model,), of length 1."""


def projected_onto(places: Sequence[tuple[int, str]], directions: Mapping[str, Directions]) -> tuple[Onto, ...]:
    """
    For each layer that is kept, the vector that each file has there. Raises InputError for directions of another hook
    point, and for those that have no vector at one of the layers.
    """
    found = []
    for name, each in directions.items():
        for layer, hook_point in places:
            if each.metadata.hook_point != hook_point:
                raise InputError(
                    f"capture.directions: {name!r} is of {each.metadata.hook_point}, and {hook_point} is kept"
                )
            found.append(Onto(name, layer, each.vector(layer)))
    return tuple(found)


def summary(result: "GenerationResult", onto: Sequence[Onto]) -> list[dict[str, Any]]:
    """
    By layer and hook point: `n_positions`, `mean_norm` (the mean over positions of ‖h‖, float64) and `mean_projection`
    (direction → the mean over positions of ⟨h, d⟩); numbers None where no position was kept. Hidden states are those
    after interventions there; the last token of an answer was never run.
    """
    rows = []
    for key, states in result.captures.items():
        layer, hook_point = key.split(".")
        wide = states.double()
        means = {each.name: _mean(wide @ wide.new_tensor(each.direction)) for each in onto if each.layer == int(layer)}
        rows.append(
            {
                "layer": int(layer), "hook_point": hook_point, "n_positions": len(wide),
                "mean_norm": _mean(wide.norm(dim=-1)), "mean_projection": means,
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: row["layer"])


def _mean(values: Any) -> float | None:
    return round_measured(values.mean().item()) if len(values) else None
