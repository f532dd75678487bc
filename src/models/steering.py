"""
Interventions in a transformers model: each row of a batch under its own spec, each token by its absolute position, so
that left padding, a cache of keys and values, and a prompt given in pieces change nothing.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from src.common.errors import InputError
from src.common.resolved_interventions import ResolvedSpec
from src.models.architectures import decoder_layers
from src.models.hooks import Change, Location, replacing
from src.models.steering_plan import Selection, SteeringPlan
from src.ops.interventions import Intervention, holds, intervene, projection

MAX_ELEMENTS_AT_ONCE = 1 << 24
"""Tokens are changed in groups of at most this many numbers, so that the float32 copies stay small."""


@contextmanager
def steered(
    model: nn.Module, rows: Sequence[ResolvedSpec | None], prompt_lengths: Sequence[int]
) -> Iterator["Steering"]:
    """
    Within the context, row i of every forward call of `model` is under `rows[i]`; None and specs that are empty leave
    their rows bit for bit as without hooks (in a mixture of experts to rounding: its tokens share matrix products).

    prompt_lengths: tokens of each row's prompt, without padding. Positions come from each call's `position_ids`, or
    else from its `attention_mask` or cache; padding, where the mask is 0, is never changed. When rows leave the batch,
    call `keep` on what this yields. No hook stays after the context. Raises InputError for a layer that the model lacks
    and vectors of another width, and RuntimeError when the batch does not fit the specs or a hook did not run once in
    every call: text is never left unsteered in silence.
    """
    plan = SteeringPlan(rows, prompt_lengths)
    steering = Steering(plan)
    if not steering.changes:
        yield steering
        return
    _refuse_other_width(model, plan)
    watcher = model.register_forward_pre_hook(steering.see_call, with_kwargs=True)
    try:
        with replacing(model, steering.changes):
            yield steering
            steering.finish_call()
    finally:
        watcher.remove()


class Steering:
    """The rows' interventions while a batch runs."""

    def __init__(self, plan: SteeringPlan) -> None:
        self._plan = plan
        self._watched = plan.watched
        places = dict.fromkeys([*plan.rounds, *self._watched])
        self.changes: dict[Location, Change] = {place: partial(self._change, place) for place in places}
        """What to do at each location, for `replacing`."""
        self._tables: dict[tuple[Location, torch.device], Intervention] = {}
        self._positions: np.ndarray | None = None
        self._ran: set[Location] = set()
        self._held: dict[int, Tensor] = {}
        self._read: list[dict[int, list[float]]] = [{number: [] for number in each} for each in plan.gates]
        self._on_device: dict[tuple, Tensor] = {}

    def keep(self, indices: Sequence[int]) -> None:
        """From the next forward call on, the batch consists of the rows `indices` of the present one."""
        self.finish_call()
        self._plan.keep(indices)

    def gates(self, index: int) -> tuple[tuple[float, ...], ...]:
        """What the conditions of a row of the present batch have read so far, at each of its positions."""
        row = self._plan.rows[index]
        return tuple(tuple(self._read[row][number]) for number in self._plan.gates[row])

    def step(self, positions: Tensor, mask: Tensor | None = None) -> None:
        """
        Announce a forward call. positions: int64 (rows, columns), each token's absolute position in its row. mask: the
        same shape, 0 on padding. `steered` does this by itself. Raises RuntimeError for another number of rows.
        """
        self.finish_call()
        if positions.dim() != 2 or len(positions) != self._plan.n_rows:
            raise RuntimeError(
                f"positions of shape {tuple(positions.shape)} for interventions on {self._plan.n_rows} rows; "
                "call keep when rows leave the batch"
            )
        if mask is not None:
            positions = positions.masked_fill(mask.to(positions.device) == 0, -1)
        self._positions = positions.cpu().numpy()

    def finish_call(self) -> None:
        """Raises RuntimeError when a hook did not run in the forward call that was announced last."""
        missed = self.changes.keys() - self._ran if self._positions is not None else ()
        if missed:
            raise RuntimeError(f"the hooks at {', '.join(map(str, sorted(missed)))} did not run in a forward call")
        self._positions = None
        self._ran.clear()
        self._held.clear()
        self._on_device.clear()

    def see_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model."""
        self.step(*call_positions(module, args, kwargs))

    def _change(self, place: Location, hidden: Tensor) -> Tensor | None:
        if self._positions is None:
            raise RuntimeError(f"the hook at {place} ran outside a forward call of the steered model")
        if hidden.shape[:2] != self._positions.shape:
            found, expected = tuple(hidden.shape[:2]), self._positions.shape
            raise RuntimeError(f"hidden states of {found} rows and positions at {place}; expected {expected}")
        if place in self._ran:
            raise RuntimeError(f"the hook at {place} ran twice in one forward call")
        self._ran.add(place)
        tokens = hidden.reshape(-1, hidden.shape[-1])
        self._read_conditions(place, tokens)
        changed = None
        for each in self._plan.rounds.get(place, []):
            selection = each.select(self._positions)
            if len(selection.tokens):
                changed = tokens.clone() if changed is None else changed
                self._act(place, changed, selection)
        return None if changed is None else changed.view(hidden.shape)

    def _read_conditions(self, place: Location, tokens: Tensor) -> None:
        for number in self._watched.get(place, ()):
            condition = self._plan.conditions[number - 1]
            direction = torch.from_numpy(condition.direction).to(tokens.device)
            p = projection(tokens, direction)
            self._held[number] = holds(p, condition.above, condition.below)
            self._note(number, p)

    def _note(self, number: int, p: Tensor) -> None:
        """Keep what a condition read, p (tokens,), for the rows that have it."""
        rows = [(i, row) for i, row in enumerate(self._plan.rows) if number in self._read[row]]
        values = p.view(self._positions.shape).cpu() if rows else None
        for i, row in rows:
            self._read[row][number] += values[i, torch.from_numpy(self._positions[i] >= 0)].tolist()

    def _act(self, place: Location, tokens: Tensor, selection: Selection) -> None:
        """Change the selected tokens in place; `tokens` (tokens, d_model) is our own copy."""
        table = self._table(place, tokens.device)
        slots = self._sent(selection.slots, tokens.device)
        index = self._sent(selection.tokens, tokens.device)
        acting = self._acting(selection, tokens.device)
        at_once = max(1, MAX_ELEMENTS_AT_ONCE // tokens.shape[1])
        for start in range(0, len(index), at_once):
            part = slice(start, start + at_once)
            by = table.rows(slots[part]) if len(table.a) > 1 else table
            new = intervene(tokens[index[part]], by, None if acting is None else acting[part])
            tokens.index_copy_(0, index[part], new)

    def _acting(self, selection: Selection, device: torch.device) -> Tensor | None:
        """Whether the condition of each selected token holds, bool (n,); None when none has one."""
        numbers = np.unique(selection.conditions).tolist()
        if numbers == [0]:
            return None
        index = self._sent(selection.tokens, device)
        asked = self._sent(selection.conditions, device)
        acting = asked == 0
        for number in numbers:
            if number:
                acting = acting | ((asked == number) & self._held[number].to(device)[index])
        return acting

    def _table(self, place: Location, device: torch.device) -> Intervention:
        if (place, device) not in self._tables:
            self._tables[place, device] = self._plan.tables[place].to(device)
        return self._tables[place, device]

    def _sent(self, array: np.ndarray, device: torch.device) -> Tensor:
        """An index array on the device; most layers need the same, which is sent once a forward call."""
        key = (array.tobytes(), device)
        if key not in self._on_device:
            self._on_device[key] = torch.from_numpy(array).to(device)
        return self._on_device[key]


def call_positions(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """
    The absolute position of each token of a forward call, int64 (rows, columns), and its mask, 0 on padding, or None.

    From `position_ids`; without them from a 2-dimensional `attention_mask` over cache and call; without either they
    follow the cache. Raises RuntimeError when the call does not tell.
    """
    given = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if tokens is None:
        raise RuntimeError("a forward call with neither input_ids nor inputs_embeds cannot be steered")
    n_rows, n_columns = tokens.shape[:2]
    mask, positions, cache = given.get("attention_mask"), given.get("position_ids"), given.get("past_key_values")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < n_columns):
        raise RuntimeError("the attention mask does not show padding; expected (rows, positions), 0 on padding")
    if positions is not None:
        if positions.dim() != 2:
            raise RuntimeError(f"position_ids of shape {tuple(positions.shape)}; expected (rows, positions)")
        positions = positions.expand(n_rows, n_columns)
    else:
        n_before = cache.get_seq_length() if cache is not None else 0
        if mask is not None and mask.shape[1] != n_before + n_columns:
            raise RuntimeError(
                f"an attention mask over {mask.shape[1]} positions for {n_before} cached and {n_columns} new ones; "
                "expected all of them, or position_ids"
            )
        counted = mask.long().cumsum(dim=-1) - 1 if mask is not None else None
        following = torch.arange(n_before, n_before + n_columns, device=tokens.device).expand(n_rows, n_columns)
        positions = following if counted is None else counted[:, -n_columns:]
    return positions, None if mask is None else mask[:, -n_columns:]


def _refuse_other_width(model: nn.Module, plan: SteeringPlan) -> None:
    d_model = model.config.get_text_config(decoder=True).hidden_size
    n_layers = len(decoder_layers(model))
    for place, table in plan.tables.items():
        if table.u.shape[1] != d_model:
            raise InputError(f"directions of width {table.u.shape[1]} at {place}; the model's hidden states: {d_model}")
        if place.layer >= n_layers:
            raise InputError(f"an intervention at {place}; the model's layers are 0 to {n_layers - 1}")
