"""
Which tokens of a vLLM step fall under which operations, and which are kept: worked out on the host from request ids,
counts and absolute positions alone, whatever chunks, order or recomputation the scheduler chose.

A *slot* stands for one spec with one set of its operations active, 0 for none. A step is then one slot a token, the
same at every layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from src.common.capture_spec import Capture
from src.common.interventions import Window
from src.common.resolved_interventions import ResolvedCondition, ResolvedOperation, ResolvedSpec
from src.models.hooks import Location

Active = frozenset[int]
"""Numbers of a program's windows."""
Operations = dict[Location, list[ResolvedOperation]]
"""What is done at each location, in order."""


class Program:
    """A spec's operations by location, each with the number of the window of positions that it acts in."""

    def __init__(self, spec: ResolvedSpec) -> None:
        assert spec.operations, "a program needs at least one operation"
        self._windows: list[ResolvedOperation] = []
        """One operation of each window, asked for its bounds."""
        self.conditions = spec.conditions
        self.operations: dict[Location, list[tuple[int, ResolvedOperation]]] = {}
        """Location → (window, operation), in the spec's order."""
        numbers: dict[str | Window, int] = {}
        for operation in spec.operations:
            if operation.positions not in numbers:
                numbers[operation.positions] = len(self._windows)
                self._windows.append(operation)
            place = Location(operation.layer, operation.hook_point)
            self.operations.setdefault(place, []).append((numbers[operation.positions], operation))

    def segments(self, prompt_length: int, start: int, end: int) -> Iterator[tuple[int, int, Active]]:
        """The positions start ≤ i < end cut where a window begins or ends: (start, end, active windows), ascending."""
        bounds = [operation.window(prompt_length) for operation in self._windows]
        edges = {edge for bound in bounds for edge in bound if edge is not None and start < edge < end}
        cuts = [start, *sorted(edges), end]
        for low, high in pairwise(cuts):
            yield low, high, frozenset(n for n, (a, b) in enumerate(bounds) if a <= low and (b is None or low < b))

    def active(self, windows: Active) -> Operations:
        """Location → the operations whose windows are among `windows`, in the spec's order."""
        found = {place: [o for number, o in each if number in windows] for place, each in self.operations.items()}
        return {place: operations for place, operations in found.items() if operations}

    def treatments(self, prompt_length: int, n_tokens: int) -> set[Active]:
        """The windows that are active together somewhere in `n_tokens` tokens: each set takes a slot."""
        return {windows for _, _, windows in self.segments(prompt_length, 0, n_tokens) if windows}

    def first_position(self, prompt_length: int) -> int | None:
        """The first position that any operation acts on, None when there is none."""
        bounds = [operation.window(prompt_length) for operation in self._windows]
        return min((a for a, b in bounds if b is None or a < b), default=None)

    @property
    def depends_on_prompt_length(self) -> bool:
        """Whether a token's treatment depends on where the prompt ends, and not on its position alone."""
        return any(_is_relative(operation.positions) for operation in self._windows)


def _is_relative(positions: str | Window) -> bool:
    if isinstance(positions, Window):
        return positions.start < 0 or (positions.end is not None and positions.end < 0)
    return positions != "all"


@dataclass(frozen=True)
class Asked:
    """What a request asked for, as the worker keeps it until the request ends."""

    prompt_length: int
    fingerprint: str | None = None
    capture: Capture | None = None


@dataclass(frozen=True)
class Kept:
    """Rows of the step's tokens start ≤ i < end that a request keeps; `position` is the first one's."""

    request_id: str
    capture: Capture
    start: int
    end: int
    position: int


@dataclass(frozen=True)
class Gated:
    """The step's tokens start ≤ i < end of a request under conditions; `position` is the first one's."""

    request_id: str
    fingerprint: str
    start: int
    end: int
    position: int


@dataclass
class StepPlan:
    """One step of the engine."""

    n_tokens: int
    slots: np.ndarray
    """int64 (n_tokens,)."""
    present: frozenset[int]
    """The slots other than 0 that occur."""
    kept: list[Kept] = field(default_factory=list)
    gated: list[Gated] = field(default_factory=list)


class SlotBook:
    """The specs that are known, and the numbers of their slots; numbers that were given back are used again."""

    def __init__(self, fill: Callable[[int, Operations], None]) -> None:
        """fill: called with a new slot and its operations by location, before the first step that has it."""
        self._fill = fill
        self._programs: dict[str, Program] = {}
        self._numbers: dict[tuple[str, Active], int] = {}
        self._free: list[int] = []
        self.n_slots = 1
        """One more than the greatest number given so far."""

    def __contains__(self, fingerprint: str) -> bool:
        return fingerprint in self._programs

    def __len__(self) -> int:
        return len(self._programs)

    def conditions(self, fingerprint: str) -> tuple[ResolvedCondition, ...]:
        """The conditions of a spec that is known, as it numbers them."""
        return self._programs[fingerprint].conditions

    def add(self, fingerprint: str, spec: ResolvedSpec) -> None:
        """Make a spec known."""
        self._programs.setdefault(fingerprint, Program(spec))

    def remove(self, fingerprint: str) -> list[int]:
        """Forget a spec; returns the slots that it had."""
        self._programs.pop(fingerprint, None)
        return self.release(fingerprint)

    def release(self, fingerprint: str) -> list[int]:
        """Give back the slots of a spec that stays known; returns them."""
        mine = [key for key in self._numbers if key[0] == fingerprint]
        numbers = [self._numbers.pop(key) for key in mine]
        self._free += numbers
        return numbers

    def segments(self, fingerprint: str, prompt_length: int, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(start, end, slot) over the positions start ≤ i < end. Raises RuntimeError for a spec that is not known."""
        if fingerprint not in self._programs:
            raise RuntimeError(f"a request names interventions {fingerprint[:12]} that were never registered")
        program = self._programs[fingerprint]
        for low, high, windows in program.segments(prompt_length, start, end):
            yield low, high, self._slot(fingerprint, program, windows) if windows else 0

    def _slot(self, fingerprint: str, program: Program, windows: Active) -> int:
        key = (fingerprint, windows)
        if key not in self._numbers:
            number = self._free.pop() if self._free else self.n_slots
            self.n_slots = max(self.n_slots, number + 1)
            self._numbers[key] = number
            self._fill(number, program.active(windows))
        return self._numbers[key]


def build_plan(
    request_ids: Sequence[str],
    n_scheduled: Sequence[int],
    n_computed: Sequence[int],
    asked: Mapping[str, Asked],
    book: SlotBook,
) -> StepPlan:
    """
    The plan of one step. request_ids: in the order of the batch's rows of tokens. n_scheduled: tokens of each in this
    step. n_computed: tokens of each that came before. asked: what some of them want.
    """
    n_tokens = int(sum(n_scheduled))
    slots = np.zeros(n_tokens, dtype=np.int64)
    present: set[int] = set()
    kept: list[Kept] = []
    gated: list[Gated] = []
    first = 0
    for request_id, scheduled, computed in zip(request_ids, n_scheduled, n_computed, strict=True):
        n, before = int(scheduled), int(computed)
        mine = asked.get(request_id)
        if mine and mine.fingerprint:
            for low, high, slot in book.segments(mine.fingerprint, mine.prompt_length, before, before + n):
                slots[first + low - before : first + high - before] = slot
                present.add(slot)
            if book.conditions(mine.fingerprint):
                gated.append(Gated(request_id, mine.fingerprint, first, first + n, before))
        if mine and mine.capture:
            low = max(before, mine.capture.start)
            high = before + n if mine.capture.end is None else min(before + n, mine.capture.end)
            if low < high:
                kept.append(Kept(request_id, mine.capture, first + low - before, first + high - before, low))
        first += n
    return StepPlan(n_tokens, slots, frozenset(present - {0}), kept, gated)
