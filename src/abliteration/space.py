"""The space that is searched, and the points that are tried first."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import optuna

from src.abliteration.kernel import Kernel, Plan

FIRST_POSITION = 0.2
"""Share of the layers below which no kernel is highest: directions are poor there."""
LONGEST_REACH = 0.6
"""Of the layers."""
SOURCES = ("own", "one")


@dataclass(frozen=True, kw_only=True)
class Space:
    """Ranges of a trial's parameters."""

    n_layers: int
    components: tuple[str, ...]
    min_weight: float
    max_weight: float
    sources: tuple[str, ...] = SOURCES
    """Of `Plan.source`, those that may be drawn."""

    @property
    def _last(self) -> float:
        return max(1.0, self.n_layers - 1.0)

    def draw(self, trial: optuna.Trial) -> Plan:
        """The plan of a trial that Optuna has asked for."""
        first, last = FIRST_POSITION * self._last, float(self.n_layers - 1)
        source = trial.suggest_categorical("source", self.sources)
        source_layer = trial.suggest_float("source_layer", min(first, last), last)
        kernels = {
            name: Kernel(
                high=trial.suggest_float(f"{name}.high", self.min_weight, self.max_weight),
                position=trial.suggest_float(f"{name}.position", min(first, last), last),
                low=trial.suggest_float(f"{name}.low", 0.0, 1.0),
                reach=trial.suggest_float(f"{name}.reach", 0.5, max(1.0, LONGEST_REACH * self._last), log=True),
            )
            for name in self.components
        }
        return Plan(source=source, source_layer=source_layer, kernels=kernels)

    def single_layers(self) -> list[Plan]:
        """One component of one layer edited whole by its own direction, for all of them."""
        layers = [i for i in range(self.n_layers) if i >= FIRST_POSITION * self._last]
        plans = [self._around(name, layer, reach=0.5, high=1.0) for name in self.components for layer in layers]
        return [plan for plan in plans if self._holds(plan)]

    def starts(self, strongest: Sequence[Plan], best_layer: int | None) -> list[Plan]:
        """
        Points tried before any is drawn. strongest: single layers, the best first. best_layer: where the classes are
        told apart best.
        """
        found = list(strongest)
        for plan in strongest[:1]:
            component, kernel = next((name, each) for name, each in plan.kernels.items() if each.high)
            found += [self._around(component, int(kernel.position), reach=reach, high=high)
                      for reach, high in ((0.5, 1.25), (1.5, 1.0), (3.0, 1.0))]  # fmt: skip
        wide = 0.6 * self._last if best_layer is None else float(best_layer)
        found += [self._everywhere(wide, source) for source in self.sources]
        return [plan for plan in found if self._holds(plan)]

    def moved(self, plan: Plan, n_layers: int) -> Plan:
        """A plan of a model of `n_layers` layers at the same depth of this one, within the ranges."""
        first, last = FIRST_POSITION * self._last, float(self.n_layers - 1)
        ratio = last / max(1, n_layers - 1)
        place = lambda layer: min(max(layer * ratio, min(first, last)), last)  # noqa: E731
        longest = max(1.0, LONGEST_REACH * self._last)
        kernels = {
            name: replace(
                kernel, position=place(kernel.position), reach=min(max(kernel.reach * ratio, 0.5), longest),
                high=min(max(kernel.high, self.min_weight), self.max_weight),
            )
            for name, kernel in plan.kernels.items()
        }  # fmt: skip
        return replace(plan, source=self._source(plan.source), source_layer=place(plan.source_layer), kernels=kernels)

    def _around(self, component: str, layer: int, *, reach: float, high: float) -> Plan:
        reach = min(reach, max(1.0, LONGEST_REACH * self._last))
        kernels = {
            name: Kernel(high=high if name == component else 0.0, position=float(layer), low=0.5, reach=reach)
            for name in self.components
        }
        return Plan(source=self._source("one"), source_layer=float(layer), kernels=kernels)

    def _everywhere(self, layer: float, source: str) -> Plan:
        reach = max(1.0, LONGEST_REACH * self._last)
        kernels = {name: Kernel(high=1.0, position=layer, low=0.5, reach=reach) for name in self.components}
        return Plan(source=source, source_layer=layer, kernels=kernels)

    def _source(self, wanted: str) -> str:
        return wanted if wanted in self.sources else self.sources[0]

    def _holds(self, plan: Plan) -> bool:
        """Whether the point is within the ranges: an early layer, or weights below 0, may not be."""
        first, last = FIRST_POSITION * self._last, float(self.n_layers - 1)
        inside = [first <= kernel.position <= last for kernel in plan.kernels.values()]
        weights = [self.min_weight <= kernel.high <= self.max_weight for kernel in plan.kernels.values()]
        return all(inside) and all(weights) and first <= plan.source_layer <= last
