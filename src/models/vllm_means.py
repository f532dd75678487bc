"""Running means of hidden states in a vLLM worker, of all requests that take one at a location in a few operations."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from src.models.hooks import Location
from src.models.vllm_hidden import Hidden
from src.models.vllm_plan import Kept

FIRST_CAPACITY = 16


class Group:
    """The requests of one step that take means at the same locations, each with a row of every table."""

    def __init__(self, members: Sequence[Kept], rows: Sequence[int], device: torch.device) -> None:
        self.members = members
        self.rows = np.array(rows)
        self.positions = np.array([each.position for each in members])
        self.is_single = all(each.end == each.start + 1 for each in members)
        """Whether every request has one token in this step, as when all are decoded."""
        self.where = _index(self.rows, device)
        self.tokens = _index(np.array([each.start for each in members]), device)


def _index(numbers: np.ndarray, device: torch.device) -> Tensor | slice:
    """A slice where they follow one another, which costs much less."""
    first, n = int(numbers[0]), len(numbers)
    in_order = (numbers == np.arange(first, first + n)).all()
    return slice(first, first + n) if in_order else torch.from_numpy(numbers).to(device)


class MeanTable:
    """Sums at one location, a row a request."""

    def __init__(self, place: Location, hidden: Hidden) -> None:
        self._place = place
        self._next = np.zeros(FIRST_CAPACITY, dtype=np.int64)
        """Up to here positions are counted; what is computed again after a preemption is not counted twice."""
        self._n = np.zeros(FIRST_CAPACITY, dtype=np.int64)
        like = hidden[:1].new_zeros(FIRST_CAPACITY, hidden.width)
        self._total = like.double()
        self._last = like
        """The last position of each, kept apart: it may be of a step too many, begun before the end was known."""

    def begin(self, row: int, position: int) -> None:
        """A request's mean begins at a position, in a row that nobody has."""
        while row >= len(self._n):
            self._next, self._n = np.concatenate([self._next] * 2), np.concatenate([self._n] * 2)
            self._total, self._last = torch.cat([self._total] * 2), torch.cat([self._last] * 2)
        self._next[row], self._n[row] = position, 0
        self._total[row] = 0
        self._last[row] = 0

    def add(self, group: Group, hidden: Hidden) -> None:
        """Count the step's tokens of a group. Raises RuntimeError when positions before them are missing."""
        n_known = self._next[group.rows] - group.positions
        if n_known.min() < 0:
            i = int(n_known.argmin())
            raise RuntimeError(
                f"a capture of {group.members[i].request_id} at {self._place} lacks positions "
                f"{self._next[group.rows[i]]} to {group.positions[i]}"
            )
        if group.is_single and not n_known.any():
            self._total[group.where] += self._last[group.where]
            self._last[group.where] = hidden[group.tokens]
            self._next[group.rows] += 1
            self._n[group.rows] += 1
            return
        for row, each, n in zip(group.rows.tolist(), group.members, n_known.tolist(), strict=True):
            if each.start + n < each.end:
                new = hidden[each.start + n : each.end]
                self._total[row] += self._last[row] + new[:-1].sum(dim=0, dtype=torch.float64)
                self._last[row] = new[-1]
                self._next[row] += len(new)
                self._n[row] += len(new)

    def n_positions(self, row: int) -> int:
        """Positions that are counted."""
        return int(self._n[row])

    def mean(self, row: int, n_positions: int) -> Tensor | None:
        """Of the first `n_positions`, float32 (1, d_model); None when there are not so many, or too many."""
        extra = self.n_positions(row) - n_positions
        if extra not in (0, 1) or not n_positions:
            return None
        total = self._total[row] if extra else self._total[row] + self._last[row].double()
        return total.div(n_positions).float()[None]


class Means:
    """Means by request and location."""

    def __init__(self) -> None:
        self._tables: dict[Location, MeanTable] = {}
        self._rows: dict[str, int] = {}
        self._places: dict[str, set[Location]] = {}
        self._free: list[int] = []
        self._kept: Sequence[Kept] | None = None
        self._groups: list[tuple[frozenset, Group]] = []

    def keep(self, place: Location, kept: Sequence[Kept], hidden: Hidden) -> None:
        """As `CaptureStore.keep`, of those that take a mean."""
        if kept is not self._kept:
            self._kept, self._groups = kept, self._grouped(kept, hidden.device)
        for places, group in self._groups:
            if place in places:
                self._table(place, group, hidden).add(group, hidden)

    def look(self, request_id: str, n_positions: int) -> dict[Location, Tensor]:
        """The means of a request. Raises RuntimeError when positions are missing."""
        row, found = self._rows.get(request_id), {}
        for place in sorted(self._places.get(request_id, ())):
            mean = self._tables[place].mean(row, n_positions)
            if mean is None:
                n_counted = self._tables[place].n_positions(row)
                raise RuntimeError(
                    f"a capture of {request_id} at {place} has {n_counted} positions; expected {n_positions}"
                )
            found[place] = mean
        return found

    def drop(self, request_id: str) -> None:
        """Forget a request."""
        if request_id in self._rows:
            self._free.append(self._rows.pop(request_id))
            del self._places[request_id]
            # The groups have its row.
            self._kept = None

    @property
    def request_ids(self) -> list[str]:
        """The requests of which something is kept."""
        return list(self._rows)

    def _grouped(self, kept: Sequence[Kept], device: torch.device) -> list[tuple[frozenset, Group]]:
        members: dict[frozenset, list[Kept]] = {}
        for each in kept:
            if each.capture.mean:
                members.setdefault(frozenset(each.capture.places), []).append(each)
        rows = {places: [self._row(each.request_id) for each in some] for places, some in members.items()}
        return [(places, Group(some, rows[places], device)) for places, some in members.items()]

    def _row(self, request_id: str) -> int:
        if request_id not in self._rows:
            self._rows[request_id] = self._free.pop() if self._free else len(self._rows)
            self._places[request_id] = set()
        return self._rows[request_id]

    def _table(self, place: Location, group: Group, hidden: Hidden) -> MeanTable:
        if place not in self._tables:
            self._tables[place] = MeanTable(place, hidden)
        for row, each in zip(group.rows.tolist(), group.members, strict=True):
            if place not in self._places[each.request_id]:
                self._places[each.request_id].add(place)
                self._tables[place].begin(row, each.capture.start)
        return self._tables[place]
