"""What each slot does at each location, as tables on the device, and how a step's tokens go through them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from src.common.resolved_interventions import ResolvedCondition, ResolvedOperation
from src.models.hooks import Location
from src.models.steering_plan import intervention_of
from src.models.vllm_plan import Operations, StepPlan
from src.ops.interventions import difference, holds, idle, moved, projection

FIRST_CAPACITY = 16
MAX_ELEMENTS_AT_ONCE = 1 << 24
"""Tokens are changed in groups of at most this many numbers, so that the float32 copies stay small."""
Read = Callable[[Tensor | slice], Tensor]
"""int64 (n,) of token numbers, or a slice of n → their hidden states (n, d_model)."""
Write = Callable[[Tensor | slice, Tensor], None]
"""Puts hidden states (n, d_model) in the place of those of n tokens."""


@dataclass(frozen=True)
class Tokens:
    """Some tokens of a step."""

    slots: np.ndarray
    """int64 (n,)."""
    index: Tensor
    """int64 (n,), their numbers within the step."""
    slot_index: Tensor
    """`slots` on the device."""


class Step:
    """One step of the engine while it runs through the layers."""

    def __init__(self, plan: StepPlan, device: torch.device) -> None:
        self.plan = plan
        self.held: dict[int, Tensor] = {}
        """Number of a condition → bool (n_tokens,), whether it holds."""
        self._device = device
        self._tokens: dict[frozenset[int], Tokens] = {}

    def tokens(self, slots: frozenset[int]) -> Tokens | None:
        """The tokens whose slot is one of `slots`, None when there are none."""
        wanted = slots & self.plan.present
        if not wanted:
            return None
        # Most layers act on the same slots: what they share is worked out and sent once a step.
        if wanted not in self._tokens:
            chosen = self.plan.slots > 0 if wanted == self.plan.present else np.isin(self.plan.slots, list(wanted))
            index = np.flatnonzero(chosen)
            mine = self.plan.slots[index]
            send = lambda array: torch.from_numpy(array).to(self._device, non_blocking=True)  # noqa: E731
            self._tokens[wanted] = Tokens(mine, send(index), send(mine))
        return self._tokens[wanted]


class Round:
    """At most one operation a slot: a table with one entry a slot, idle where a slot has none."""

    def __init__(self, capacity: int, d_model: int, device: torch.device) -> None:
        self.table = idle(capacity, d_model, device)
        self.has = np.zeros(capacity, dtype=bool)
        self.conditions = np.zeros(capacity, dtype=np.int64)
        """Number of each slot's condition, 0 for none."""
        self.more = np.zeros(capacity, dtype=bool)
        """Whether a slot's operation does more than add a fixed vector."""

    def change(self, hidden: Tensor, slots: Tensor, tokens: Tokens) -> Tensor:
        """What is added to `hidden` (n, d_model) of tokens with these slots int64 (n,), some or all of `tokens`."""
        if self.more[tokens.slots].any():
            return difference(hidden, self.table.rows(slots))
        return self.table.v[slots]

    def acting(self, tokens: Tokens, held: dict[int, Tensor]) -> Tensor | bool:
        """Which of the tokens this round changes: all (True), none (False) or bool (n,)."""
        has, conditions = self.has[tokens.slots], self.conditions[tokens.slots]
        if not has.any():
            return False
        if has.all() and not conditions.any():
            return True
        acting = torch.from_numpy(has & (conditions == 0)).to(tokens.index.device)
        for number in np.unique(conditions[has & (conditions > 0)]).tolist():
            asks = torch.from_numpy(has & (conditions == number)).to(tokens.index.device)
            acting = acting | (asks & held[number][tokens.index])
        return acting


class Tables:
    """The tables of all locations; one slot number means the same at each."""

    def __init__(self, d_model: int, device: torch.device, capacity: int = FIRST_CAPACITY) -> None:
        self._d_model = d_model
        self._device = device
        self._capacity = capacity
        self._rounds: dict[Location, list[Round]] = {}
        self._slots: dict[Location, frozenset[int]] = {}
        self._conditions: list[ResolvedCondition] = []
        self._users: list[frozenset[int]] = []
        """The slots that each condition gates."""

    # Tables made within a step, which vLLM runs in inference mode, can be written to in that mode only.
    @torch.inference_mode()
    def fill(self, slot: int, operations: Operations) -> None:
        """Give a slot, that was empty, its operations."""
        while slot >= self._capacity:
            self._grow()
        for place, each in operations.items():
            rounds = self._rounds.setdefault(place, [])
            self._slots[place] = self._slots.get(place, frozenset()) | {slot}
            for number, operation in enumerate(each):
                if number == len(rounds):
                    rounds.append(Round(self._capacity, self._d_model, self._device))
                intervention = intervention_of(operation)
                rounds[number].table.write(slot, intervention.to(self._device))
                rounds[number].has[slot] = True
                rounds[number].more[slot] = bool(intervention.relative or intervention.u.any())
                rounds[number].conditions[slot] = self._condition_number(operation, slot)

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Make a slot empty."""
        nothing = idle(1, self._d_model, self._device).rows(torch.tensor(0, device=self._device))
        for place in [place for place, slots in self._slots.items() if slot in slots]:
            self._slots[place] -= {slot}
            for each in self._rounds[place]:
                each.table.write(slot, nothing)
                each.has[slot], each.conditions[slot], each.more[slot] = False, 0, False
        self._users = [slots - {slot} for slots in self._users]

    def places(self, present: frozenset[int]) -> set[Location]:
        """Where something is read or changed for tokens of these slots."""
        acting = {place for place, slots in self._slots.items() if slots & present}
        asking = zip(self._conditions, self._users, strict=True)
        return acting | {Location(c.layer, c.hook_point) for c, slots in asking if slots & present}

    def act(self, place: Location, step: Step, read: Read, write: Write) -> None:
        """Read the conditions that are asked at a location, then change what is to be changed there."""
        self._read_conditions(place, step, read)
        tokens = step.tokens(self._slots.get(place, frozenset()))
        if tokens is None:
            return
        rounds = [(each, each.acting(tokens, step.held)) for each in self._rounds[place]]
        at_once = max(1, MAX_ELEMENTS_AT_ONCE // self._d_model)
        for start in range(0, len(tokens.slots), at_once):
            part = slice(start, min(start + at_once, len(tokens.slots)))
            # A slice of all tokens costs much less than the same as an index.
            whole = len(tokens.slots) == step.plan.n_tokens
            index, slots = part if whole else tokens.index[part], tokens.slot_index[part]
            hidden = read(index)
            for each, acting in rounds:
                if acting is not False:
                    rows = None if acting is True else acting[part]
                    hidden = moved(hidden, each.change(hidden, slots, tokens), rows)
            write(index, hidden)

    def _read_conditions(self, place: Location, step: Step, read: Read) -> None:
        for number, (condition, users) in enumerate(zip(self._conditions, self._users, strict=True), start=1):
            if place != (condition.layer, condition.hook_point):
                continue
            tokens = step.tokens(users)
            if tokens is not None:
                direction = torch.from_numpy(np.array(condition.direction)).to(self._device)
                held = torch.zeros(step.plan.n_tokens, dtype=torch.bool, device=self._device)
                p = projection(read(tokens.index), direction)
                held[tokens.index] = holds(p, condition.above, condition.below)
                step.held[number] = held

    def _condition_number(self, operation: ResolvedOperation, slot: int) -> int:
        if operation.condition is None:
            return 0
        keys = [condition.key for condition in self._conditions]
        if operation.condition.key in keys:
            number = keys.index(operation.condition.key)
            self._users[number] |= {slot}
        else:
            # In the place of one that no slot asks any more, so that a long run does not gather them.
            number = next((i for i, users in enumerate(self._users) if not users), len(keys))
            self._conditions[number : number + 1] = [operation.condition]
            self._users[number : number + 1] = [frozenset({slot})]
        return number + 1

    def _grow(self) -> None:
        for each in (each for rounds in self._rounds.values() for each in rounds):
            larger = Round(2 * self._capacity, self._d_model, self._device)
            larger.table.write(slice(0, self._capacity), each.table)
            for name in ("has", "conditions", "more"):
                getattr(larger, name)[: self._capacity] = getattr(each, name)
                setattr(each, name, getattr(larger, name))
            each.table = larger.table
        self._capacity *= 2
