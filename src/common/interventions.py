"""
The interventions spec: a JSON list of entries, each one operation on the hidden states of some layers.

    [{"directions_path": "experiments/french/directions.safetensors", "layers": "8-12", "op": "add", "coefficient": 4},
     {"directions_path": "axis.safetensors", "layers": "14", "op": "cap", "lo": "p25", "positions": "generated"}]

| op | the projection p = ⟨h, d⟩ | fields |
|---|---|---|
| `add` | h ← h + c·d, with `relative` h + c·‖h‖·d | `coefficient`, `relative` |
| `ablate` | p ← (1 − c)·p | `coefficient`, 1 unless given |
| `scale` | p ← (1 + c)·p | `coefficient` |
| `set` | p ← value | `value` |
| `cap` | p ← clamp(p, lo, hi) | `lo`, `hi` or both |

Entries on one layer and hook point act in the order of the list. Paths are relative to the folder the command runs in.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from src.common.errors import InputError
from src.common.intervention_fields import (
    Bound,
    FilePath,
    Flag,
    HookPointName,
    Index,
    Layers,
    Number,
    Position,
    SameOrIndex,
    meant,
    shown,
    word,
)
from src.common.json_rows import json_rows

OPERATIONS = ("add", "ablate", "scale", "set", "cap")
NAMED_POSITIONS = ("all", "prompt", "generated", "last_prompt")
FIELDS_OF = {
    "add": ("coefficient", "relative"), "ablate": ("coefficient",), "scale": ("coefficient",), "set": ("value",),
    "cap": ("lo", "hi"),
}  # fmt: skip
"""The fields that belong to some operations only."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_null(cls, value: Any) -> Any:
        """null is as good as no field, so that what `model_dump` gives can be read again."""
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class Window(_Strict):
    """Positions start ≤ i < end; negative numbers count from the prompt's end, −1 being its last token."""

    start: Position
    end: Position | None = None
    """None for no end."""

    @model_validator(mode="after")
    def _refuse_empty(self) -> Self:
        same_side = self.end is not None and (self.start < 0) == (self.end < 0)
        if self.end == 0 or (same_side and self.start >= self.end):
            raise ValueError(f"start {self.start} and end {self.end} hold no position; expected start < end")
        return self


def _check_positions(value: object) -> object:
    if isinstance(value, dict):
        return _part(Window, value)
    if isinstance(value, Window):
        return value
    if value not in NAMED_POSITIONS:
        words = ", ".join(NAMED_POSITIONS)
        raise ValueError(f'{shown(value)}{meant(value, NAMED_POSITIONS)}; expected {words} or {{"start": a, "end": b}}')
    return value


class Condition(_Strict):
    """Act only on tokens whose projection on another direction lies above or below a threshold, or between two."""

    directions_path: FilePath
    k_index: Index = 0
    source_layer: SameOrIndex = "same"
    """The layer whose vector is taken; "same": that at which the projection is read."""
    layer: SameOrIndex = "same"
    """Where the projection is read, before any intervention there; "same": the layer acted on; else an earlier one."""
    above: Bound | None = None
    below: Bound | None = None

    @model_validator(mode="after")
    def _require_threshold(self) -> Self:
        if self.above is None and self.below is None:
            raise ValueError("has neither above nor below; expected a number or a percentile in one of them")
        if isinstance(self.above, float) and isinstance(self.below, float) and self.above >= self.below:
            raise ValueError(f"above {self.above} and below {self.below} hold no number; expected above < below")
        return self


def _check_condition(value: object) -> object:
    return value if isinstance(value, Condition) else _part(Condition, value)


class Entry(_Strict):
    """One operation with one direction on some layers."""

    directions_path: FilePath
    k_index: Index = 0
    source_layer: SameOrIndex = "same"
    """The layer whose vector is taken; "same": the layer acted on."""
    layers: Layers
    """`14`, `8-12`, `8,12`; `all`: those the file has, or for a fixed source_layer the model's; `best`: the file's."""
    hook_point: HookPointName | None = None
    """None: the directions file's."""
    op: Annotated[str, word(OPERATIONS, "one of")]
    coefficient: Number | None = None
    relative: Flag = False
    """For add: the coefficient counts in norms of the hidden state."""
    value: Bound | None = None
    lo: Bound | None = None
    hi: Bound | None = None
    when: Annotated[Condition, BeforeValidator(_check_condition)] | None = None
    positions: Annotated[str | Window, BeforeValidator(_check_positions)] = "all"

    @model_validator(mode="after")
    def _check_fields_of_op(self) -> Self:
        for field in ("coefficient", "relative", "value", "lo", "hi"):
            given = getattr(self, field)
            # Not `in (None, False)`: a bound of 0 is equal to False.
            if given is not None and given is not False and field not in FIELDS_OF[self.op]:
                takes = " and ".join(FIELDS_OF[self.op])
                raise ValueError(f"{field} is not for op {self.op}; expected {takes}")
        if self.op in ("add", "scale") and self.coefficient is None:
            raise ValueError(f"op {self.op} has no coefficient; expected a number")
        if self.op == "set" and self.value is None:
            raise ValueError("op set has no value; expected the projection to set")
        if self.op == "cap" and self.lo is None and self.hi is None:
            raise ValueError("op cap has neither lo nor hi; expected one or both")
        if isinstance(self.lo, float) and isinstance(self.hi, float) and self.lo > self.hi:
            raise ValueError(f"lo {self.lo} is above hi {self.hi}; expected lo ≤ hi")
        return self


def read_interventions(path: str | Path) -> list[Entry]:
    """
    The entries of a spec file. Raises InputError, which names the file, the line, the entry, the field, what it holds
    and what was expected: no such file, not a JSON list, empty, an unknown, missing or misplaced field, a bad value.
    """
    entries = [entry(value, f"{place}: entry {i}") for i, (place, value) in enumerate(json_rows(Path(path)), start=1)]
    if not entries:
        raise InputError(f"{path}:1: no entries in it; expected at least one")
    return entries


def entry(value: object, place: str) -> Entry:
    """One entry from a JSON value. Raises InputError that begins with `place`."""
    if not isinstance(value, dict):
        raise InputError(f"{place}: {shown(value)}; expected an object")
    try:
        return Entry.model_validate(value)
    except ValidationError as error:
        raise InputError(f"{place}: {_complaint(error, Entry)}") from None


def parse_steer(text: str, place: str | None = None) -> Entry:
    """
    The entry of `--steer FILE:LAYERS:COEFFICIENT`: an `add` at all positions. FILE may itself hold colons. place: where
    the text stands in a request, whose files have names. Raises InputError for another form and for what an entry
    refuses.
    """
    form, example = ("NAME", "french") if place else ("FILE", "directions.safetensors")
    place, form = place or f"--steer {text}", f"{form}:LAYERS:COEFFICIENT"
    parts = text.rsplit(":", 2)
    if len(parts) < 3:
        raise InputError(f"{place}: expected {form}, for example {example}:14:4")
    try:
        coefficient = float(parts[2])
    except ValueError:
        coefficient = math.nan
    if not math.isfinite(coefficient):
        raise InputError(f"{place}: coefficient {parts[2]!r}; expected {form} with a finite number")
    return entry({"directions_path": parts[0], "layers": parts[1], "op": "add", "coefficient": coefficient}, place)


def _part(model: type[_Strict], value: object) -> _Strict:
    """A part of an entry. Raises ValueError with our own words for what is wrong."""
    if not isinstance(value, dict):
        raise ValueError(f"{shown(value)}; expected an object with {', '.join(model.model_fields)}")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise ValueError(_complaint(error, model)) from None


def _complaint(error: ValidationError, model: type[_Strict]) -> str:
    # A misspelt field is the likelier cause of a missing one.
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    field = first["loc"][0] if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        known = ", ".join(model.model_fields)
        return f"unknown field {field!r}{meant(field, model.model_fields)}; expected {known}"
    if first["type"] == "missing":
        return f"no field {field!r}; expected it"
    message = first["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message
