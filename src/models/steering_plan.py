"""
Which tokens of a batch fall under which operation: the rows' specs as arrays, worked out on the host.

Operations that one row has at one layer and hook point go into successive rounds; a round holds at most one operation
a row, so that all rows of a round can be changed together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from src.common.resolved_interventions import ResolvedCondition, ResolvedOperation, ResolvedSpec
from src.models.hooks import Location
from src.ops.interventions import Intervention, ablate, add, cap, scale, set_to, stacked

NO_END = np.iinfo(np.int64).max


class Selection(NamedTuple):
    """The tokens that a round acts on; all int64 (n,)."""

    tokens: np.ndarray
    """Index into the batch's tokens, row after row."""
    slots: np.ndarray
    """Which entry of the location's table acts on each."""
    conditions: np.ndarray
    """Number of the condition of each, 0 for none."""


@dataclass
class Round:
    """At most one operation a row; arrays int64 (rows,). A row without one has the empty window 0 ≤ i < 0."""

    slots: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    conditions: np.ndarray

    def keep(self, indices: np.ndarray) -> "Round":
        return Round(self.slots[indices], self.starts[indices], self.ends[indices], self.conditions[indices])

    def select(self, positions: np.ndarray) -> Selection:
        """The tokens to act on among those of absolute `positions` int64 (rows, columns), negative for padding."""
        acting = (positions >= self.starts[:, None]) & (positions < self.ends[:, None])
        tokens = np.flatnonzero(acting)
        rows = tokens // positions.shape[1]
        return Selection(tokens, self.slots[rows], self.conditions[rows])


class SteeringPlan:
    """The specs of a batch's rows. `prompt_lengths` in tokens, without padding."""

    def __init__(self, rows: Sequence[ResolvedSpec | None], prompt_lengths: Sequence[int]) -> None:
        assert len(rows) == len(prompt_lengths), f"{len(rows)} specs for {len(prompt_lengths)} prompts"
        assert all(length > 0 for length in prompt_lengths), f"prompts of lengths {list(prompt_lengths)}"
        self.n_rows = len(rows)
        self.tables: dict[Location, Intervention] = {}
        self.rounds: dict[Location, list[Round]] = {}
        self.conditions: list[ResolvedCondition] = []
        self.rows = list(range(len(rows)))
        """Which of the rows given at first each row is."""
        self._condition_numbers: dict[tuple, int] = {}
        for place, per_row in _by_location(rows).items():
            self._add_location(place, per_row, prompt_lengths)
        self.gates = [[self._condition_number(c) for c in spec.conditions] if spec else [] for spec in rows]
        """The numbers of the conditions of each row given at first."""

    @property
    def watched(self) -> dict[Location, list[int]]:
        """Where conditions are read: the numbers, from 1, of those at each location."""
        places: dict[Location, list[int]] = {}
        for number, condition in enumerate(self.conditions, start=1):
            places.setdefault(Location(condition.layer, condition.hook_point), []).append(number)
        return places

    def keep(self, indices: Sequence[int]) -> None:
        """Only the rows `indices` go on, in that order."""
        kept = np.asarray(indices, dtype=np.int64)
        self.n_rows = len(kept)
        self.rows = [self.rows[i] for i in indices]
        self.rounds = {place: [r.keep(kept) for r in rounds] for place, rounds in self.rounds.items()}

    def _add_location(
        self, place: Location, per_row: list[list[ResolvedOperation]], prompt_lengths: Sequence[int]
    ) -> None:
        # Rows under one spec share its operations, hence also the entries of the table.
        distinct = list({id(operation): operation for operations in per_row for operation in operations}.values())
        slot_of = {id(operation): slot for slot, operation in enumerate(distinct)}
        self.tables[place] = stacked([intervention_of(operation) for operation in distinct])
        self.rounds[place] = []
        for number in range(max(map(len, per_row))):
            new = Round(*(np.zeros(self.n_rows, dtype=np.int64) for _ in range(4)))
            for row, operations in enumerate(per_row):
                if number < len(operations):
                    operation = operations[number]
                    start, end = operation.window(prompt_lengths[row])
                    new.slots[row], new.starts[row] = slot_of[id(operation)], start
                    new.ends[row] = NO_END if end is None else end
                    new.conditions[row] = self._condition_number(operation.condition)
            self.rounds[place].append(new)

    def _condition_number(self, condition: ResolvedCondition | None) -> int:
        if condition is None:
            return 0
        if condition.key not in self._condition_numbers:
            self.conditions.append(condition)
            self._condition_numbers[condition.key] = len(self.conditions)
        return self._condition_numbers[condition.key]


def _by_location(rows: Sequence[ResolvedSpec | None]) -> dict[Location, list[list[ResolvedOperation]]]:
    """Location → row → its operations there, in the spec's order."""
    places: dict[Location, list[list[ResolvedOperation]]] = {}
    for row, spec in enumerate(rows):
        for operation in spec.operations if spec else ():
            place = Location(operation.layer, operation.hook_point)
            places.setdefault(place, [[] for _ in rows])[row].append(operation)
    return places


def intervention_of(operation: ResolvedOperation) -> Intervention:
    """The formula's parameters of one operation, on the CPU."""
    direction = torch.from_numpy(np.array(operation.direction, dtype=np.float32))
    match operation.op:
        case "add":
            return add(direction, operation.coefficient, operation.relative)
        case "ablate":
            return ablate(direction, operation.coefficient)
        case "scale":
            return scale(direction, operation.coefficient)
        case "set":
            return set_to(direction, operation.value)
        case "cap":
            return cap(direction, operation.lo, operation.hi)
    raise AssertionError(f"operation {operation.op!r}")
