"""How strongly each layer is edited, and by which directions: what a trial of the search chooses."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIELDS = ("high", "position", "low", "reach")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Edit weights over layers: `high` at `position`, going linearly to high·low at a distance of `reach`, then 0."""

    high: float
    """The weight at `position`; 1 removes a direction whole."""
    position: float
    """In layers, from 0."""
    low: float
    """Share of it that is left at a distance of `reach`."""
    reach: float
    """In layers, above 0."""

    def weight(self, layer: int) -> float:
        """The edit weight of a layer."""
        distance = abs(layer - self.position)
        if distance > self.reach:
            return 0.0
        return self.high * (1 + distance / self.reach * (self.low - 1))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One trial: which directions, and a kernel a component."""

    source: str
    """own: each layer is edited by its own directions; one: all by those of `source_layer`."""
    source_layer: float
    """Between two layers a mixture of theirs."""
    kernels: Mapping[str, Kernel]
    """Component → its kernel; components that are not named stay as they are."""

    def weight(self, component: str, layer: int) -> float:
        """The edit weight of one component of a layer, 0 for none."""
        kernel = self.kernels.get(component)
        return kernel.weight(layer) if kernel else 0.0

    def weights(self, n_layers: int) -> dict[str, list[float]]:
        """Component → the edit weight of each layer."""
        return {name: [self.weight(name, i) for i in range(n_layers)] for name in self.kernels}

    def sources(self, layer: int) -> dict[int, float]:
        """Layer of the directions file → its share in the directions that a layer is edited by."""
        if self.source == "own":
            return {layer: 1.0}
        below = math.floor(self.source_layer)
        part = self.source_layer - below
        return {below: 1.0 - part, below + 1: part} if part else {below: 1.0}

    def as_params(self) -> dict[str, Any]:
        """Flat JSON values, from which `plan_of` makes the plan again."""
        found: dict[str, Any] = {"source": self.source, "source_layer": self.source_layer}
        for name, kernel in self.kernels.items():
            found |= {f"{name}.{field}": value for field, value in vars(kernel).items()}
        return found


def plan_of(params: Mapping[str, Any]) -> Plan:
    """The plan of a trial's parameters."""
    names = dict.fromkeys(key.split(".")[0] for key in params if "." in key)
    kernels = {name: Kernel(**{field: params[f"{name}.{field}"] for field in FIELDS}) for name in names}
    return Plan(source=params["source"], source_layer=params["source_layer"], kernels=kernels)
