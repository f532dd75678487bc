"""
Interventions inside a compiled graph: pure tensor arithmetic on tables that stay where they are, so that a graph, a
CUDA graph too, that was recorded once acts on what they hold at each step. Token t is under slot `slots[t]`, 0 for
none.

What may be steered is declared before the model is compiled; each declared location costs every step a little.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from src.common.errors import InputError
from src.common.resolved_interventions import ResolvedCondition, ResolvedOperation, ResolvedSpec
from src.models.hooks import Location
from src.models.steering_plan import intervention_of
from src.models.vllm_plan import Operations, StepPlan
from src.ops.interventions import Intervention, difference, idle, moved

KEY = "tiller"
"""Where a declaration stands in vLLM's additional configuration, which is part of the key of its compile cache."""
REMEDY = "--enforce_eager takes any"


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What a compiled engine can do to hidden states."""

    adding: tuple[tuple[int, str], ...] = ()
    """(layer, hook point) where vectors of fixed length are added, and nothing else is done."""
    acting: tuple[tuple[int, str], ...] = ()
    """Where any operation may act."""
    reading: tuple[tuple[int, str], ...] = ()
    """Where conditions are read."""
    slots: int = 64
    """Specs, each counted as often as its windows of positions differ, that are in use at once."""
    rounds: int = 1
    """Operations of one spec at one location."""
    conditions: int = 4
    """Conditions read at one location."""

    def plain(self) -> dict:
        """As JSON."""
        lists = {name: [list(place) for place in getattr(self, name)] for name in ("adding", "acting", "reading")}
        return lists | {name: getattr(self, name) for name in ("slots", "rounds", "conditions")}

    @classmethod
    def read(cls, plain: dict) -> "Declared":
        """From `plain`."""
        places = {
            name: tuple((layer, point) for layer, point in plain[name]) for name in ("adding", "acting", "reading")
        }
        return cls(**{**plain, **places})

    def refuse(self, spec: ResolvedSpec) -> None:
        """Raises InputError for a spec that was not declared."""
        counts: dict[Location, int] = {}
        for operation in spec.operations:
            place, condition = place_of(operation), operation.condition
            counts[place] = counts.get(place, 0) + 1
            if place not in self.acting and not (place in self.adding and _only_adds(operation)):
                raise InputError(f"{operation.op} at {place}: the model was compiled without it; {REMEDY}")
            if counts[place] > self.rounds:
                raise InputError(f"{counts[place]} operations at {place}: compiled for {self.rounds}; {REMEDY}")
            if condition and place_of(condition) not in self.reading:
                raise InputError(f"a condition at {place_of(condition)}: the model was compiled without it; {REMEDY}")


def declare(specs: Sequence[ResolvedSpec], slots: int = 64) -> Declared:
    """What is needed for these specs, and others that act at the same places in the same ways."""
    operations = [operation for spec in specs for operation in spec.operations]
    conditions = [o.condition for o in operations if o.condition]
    acting = {place_of(o) for o in operations if not _only_adds(o)}
    adding = {place_of(o) for o in operations} - acting
    counts = [sum(place_of(o) == place for o in spec.operations) for spec in specs for place in acting | adding]
    read_at = {place: len({c.key for c in conditions if place_of(c) == place}) for place in map(place_of, conditions)}
    return Declared(
        adding=tuple(sorted(adding)), acting=tuple(sorted(acting)), reading=tuple(sorted(read_at)), slots=slots,
        rounds=max(counts, default=1), conditions=max(read_at.values(), default=1),
    )  # fmt: skip


class CompiledTables:
    """The tables, and the arithmetic that is traced into the graph. Same methods as the eager `Tables`."""

    def __init__(self, declared: Declared, d_model: int, max_tokens: int, device: torch.device) -> None:
        n = declared.slots + 1
        self.declared = declared
        self._device = device
        self._max_tokens = max_tokens
        self._d_model = d_model
        self._at: dict[int, set[Location]] = {}
        self.slots = torch.zeros(max_tokens, dtype=torch.long, device=device)
        self._adding = {Location(*place) for place in declared.adding}
        places = [Location(*place) for place in (*declared.adding, *declared.acting)]
        zeros = lambda dtype: torch.zeros(n, dtype=dtype, device=device)  # noqa: E731
        self._tables = {place: [idle(n, d_model, device) for _ in range(declared.rounds)] for place in places}
        self._has = {place: [zeros(torch.bool) for _ in range(declared.rounds)] for place in places}
        self._gate = {place: [zeros(torch.long) for _ in range(declared.rounds)] for place in places}
        reading = [Location(*place) for place in declared.reading]
        self._channels = {place: 1 + i * declared.conditions for i, place in enumerate(reading)}
        self._asked = {place: idle(declared.conditions, d_model, device) for place in reading}
        self._conditions: list[ResolvedCondition | None] = [None] * (1 + len(reading) * declared.conditions)
        self._users: list[set[int | str]] = [set() for _ in self._conditions]
        """The slots and the specs that need each channel."""
        self.values = torch.zeros(len(self._conditions), max_tokens, dtype=torch.float32, device=device)
        """float32 (channels, tokens), the projections that each condition read in the last step."""
        # Channel 0 holds for every token: that of operations without a condition.
        self.gates = torch.ones(len(self._conditions), max_tokens, dtype=torch.bool, device=device)

    @property
    def hooked(self) -> list[Location]:
        """Every declared location."""
        return list(dict.fromkeys([*self._channels, *self._tables]))

    @torch.inference_mode()
    def fill(self, slot: int, operations: Operations) -> None:
        """Give a slot, that was empty, its operations. Raises InputError when there are not so many slots."""
        if slot > self.declared.slots:
            raise InputError(f"more than {self.declared.slots} interventions at once: compiled for so many; {REMEDY}")
        for place, each in operations.items():
            self._at.setdefault(slot, set()).add(place)
            for number, operation in enumerate(each):
                self._tables[place][number].write(slot, intervention_of(operation).to(self._device))
                self._has[place][number][slot] = True
                self._gate[place][number][slot] = self.channel(operation.condition, slot) if operation.condition else 0

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Make a slot empty."""
        nothing = idle(1, self._d_model, self._device).rows(torch.tensor(0, device=self._device))
        for place in self._at.pop(slot, ()):
            for number in range(self.declared.rounds):
                self._tables[place][number].write(slot, nothing)
                self._has[place][number][slot] = False
                self._gate[place][number][slot] = 0
        for users in self._users:
            users.discard(slot)

    def load(self, plan: StepPlan | None) -> None:
        """Put a step's slots in place; None for a call that is nobody's."""
        self.slots.zero_()
        if plan is not None and plan.present:
            self.slots[: plan.n_tokens].copy_(torch.from_numpy(plan.slots), non_blocking=True)

    def in_graph(self, place: Location, hidden: Tensor, rest: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """
        What a layer passes on at a location, (tokens, d_model) in one part or two that are to be added, under the
        step's interventions. Tokens that none is for stay bit for bit.
        """
        n = hidden.shape[0]
        slots = self.slots[:n]
        h = hidden if rest is None else hidden + rest
        if place in self._channels:
            self._read(place, h)
        if place not in self._tables:
            return hidden, rest
        new = h
        for table, has, gate in zip(self._tables[place], self._has[place], self._gate[place], strict=True):
            acting = has[slots]
            if self._channels:
                tokens = torch.arange(n, device=h.device)
                acting = acting & self.gates.view(-1)[gate[slots] * self._max_tokens + tokens]
            delta = table.v[slots] if place in self._adding else difference(new, _rows(table, slots))
            new = moved(new, delta, acting)
        touched = self._has[place][0][slots][:, None]
        if rest is None:
            return torch.where(touched, new, hidden), None
        return torch.where(touched, 0, hidden), torch.where(touched, new.to(rest.dtype), rest)

    def _read(self, place: Location, h: Tensor) -> None:
        asked, first = self._asked[place], self._channels[place]
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        for channel in range(self.declared.conditions):
            p = (wide * asked.u[channel]).sum(dim=-1)
            self.values[first + channel, : h.shape[0]].copy_(p)
            held = (p >= asked.lo[channel]) & (p <= asked.hi[channel])
            self.gates[first + channel, : h.shape[0]].copy_(held)

    @torch.inference_mode()
    def channel(self, condition: ResolvedCondition, user: int | str) -> int:
        """Where a condition is read, for a slot or a spec. Raises InputError when there are too many at once."""
        first = self._channels[place_of(condition)]
        mine = range(first, first + self.declared.conditions)
        known = [c for c in mine if self._conditions[c] is not None and self._conditions[c].key == condition.key]
        free = known or [c for c in mine if not self._users[c]]
        if not free:
            raise InputError(f"more than {self.declared.conditions} conditions at {place_of(condition)}: {REMEDY}")
        channel = free[0]
        if not known:
            self._conditions[channel] = condition
            asked, row = self._asked[place_of(condition)], channel - first
            asked.u[row] = torch.from_numpy(condition.direction.copy()).to(self._device)
            # Strictly between the bounds, as `holds` says: from the next float above to the next below.
            asked.lo[row] = _beyond(condition.above, torch.inf)
            asked.hi[row] = _beyond(condition.below, -torch.inf)
        self._users[channel].add(user)
        return channel

    def leave(self, fingerprint: str) -> None:
        """A spec needs its conditions no more."""
        for users in self._users:
            users.discard(fingerprint)


def _rows(table: Intervention, slots: Tensor) -> Intervention:
    return Intervention(
        v=table.v[slots], u=table.u[slots], a=table.a[slots], lo=table.lo[slots], hi=table.hi[slots],
        relative=table.relative[slots],
    )  # fmt: skip


def _beyond(bound: float | None, towards: float) -> Tensor:
    if bound is None:
        return torch.tensor(-towards)
    return torch.nextafter(torch.tensor(bound, dtype=torch.float32), torch.tensor(towards))


def place_of(of: ResolvedOperation | ResolvedCondition) -> Location:
    """Where an operation acts or a condition is read."""
    return Location(of.layer, of.hook_point)


def _only_adds(operation: ResolvedOperation) -> bool:
    return operation.op == "add" and not operation.relative
