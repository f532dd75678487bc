"""The settings of every command that steers in several arms: a dose–response grid and its control."""

import math
from dataclasses import dataclass

from src.common.errors import InputError
from src.common.intervention_config import InterventionConfigBase
from src.common.interventions import NAMED_POSITIONS
from src.common.settings import setting

GRID_FLAGS = ("coefficients", "relative", "positions")


@dataclass(kw_only=True)
class DoseConfigBase(InterventionConfigBase):
    """Doses"""

    coefficients: list[float] | None = None
    """A dose–response grid: an arm for each, in place of the coefficient of every --steer. 0 is the unsteered arm,
    which is there anyway."""
    relative: bool = False
    """The coefficients of --steer count in norms of the hidden state they are added to."""
    positions: str = setting("all", choices=NAMED_POSITIONS)
    """Which tokens --steer acts on."""
    random_control: bool = False
    """For each arm one more with random directions in place of its own, of the same lengths and mutual angles. Bounds
    of cap and the value of set stay those of the directions they were given for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_grid()

    def _check_grid(self) -> None:
        for name, default in zip(GRID_FLAGS, (None, False, "all"), strict=True):
            if self.steer is None and getattr(self, name) != default:
                raise InputError(f"--{name} goes with --steer; with --interventions_path write it into the spec")
        if self.coefficients is None:
            return
        for value in self.coefficients:
            if not math.isfinite(value):
                raise InputError(f"--coefficients {value}: expected finite numbers")
        if len(set(self.coefficients)) < len(self.coefficients):
            raise InputError(f"--coefficients {' '.join(map(str, self.coefficients))}: expected each once")
        if not any(self.coefficients):
            raise InputError("--coefficients names no coefficient but 0; expected at least one other")
