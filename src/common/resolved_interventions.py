"""
An interventions spec made concrete for one model: every operation with its layer, numbers and vector.

Nothing of a file's place is left in it, so that its fingerprint says what is done and not where it was read.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from src.common.directions_file import HOOK_POINTS, Directions, read_directions
from src.common.errors import InputError
from src.common.intervention_fields import parse_layers
from src.common.interventions import Condition, Entry, Window

if TYPE_CHECKING:
    import numpy as np

ReadDirections = Callable[[str], Directions]
"""From `directions_path` to what it names. Raises InputError."""
VANISH_AT_ZERO = ("add", "ablate", "scale")
"""Operations that do nothing with a coefficient of 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ResolvedCondition:
    """Act only where above < ⟨h, direction⟩ < below, h being what arrives at this layer and hook point."""

    layer: int
    hook_point: str
    direction: "np.ndarray"
    """float32 (d_model,), of length 1."""
    above: float | None
    below: float | None

    @property
    def key(self) -> tuple:
        """Equal for conditions that ask the same."""
        return self.layer, self.hook_point, self.above, self.below, self.direction.tobytes()


@dataclass(frozen=True, kw_only=True, eq=False)
class ResolvedOperation:
    """One operation at one layer."""

    layer: int
    hook_point: str
    op: str
    direction: "np.ndarray"
    """float32 (d_model,), of length 1."""
    coefficient: float | None = None
    relative: bool = False
    value: float | None = None
    lo: float | None = None
    hi: float | None = None
    positions: str | Window = "all"
    condition: ResolvedCondition | None = None

    def window(self, prompt_length: int) -> tuple[int, int | None]:
        """The positions start ≤ i < end that it acts on, None for no end; those before the prompt's begin are cut."""
        match self.positions:
            case "all":
                return 0, None
            case "prompt":
                return 0, prompt_length
            case "generated":
                return prompt_length, None
            case "last_prompt":
                return prompt_length - 1, prompt_length
            case Window(start=start, end=end):
                count = lambda i: max(0, prompt_length + i) if i < 0 else i  # noqa: E731
                return count(start), None if end is None else count(end)
        raise AssertionError(f"positions are {self.positions!r}")


@dataclass(frozen=True, kw_only=True, eq=False)
class ResolvedSpec:
    """What is done to the hidden states of one row; operations on one layer and hook point act in this order."""

    operations: tuple[ResolvedOperation, ...]

    @cached_property
    def conditions(self) -> tuple[ResolvedCondition, ...]:
        """The conditions that differ, in the order of their first operation."""
        found = {o.condition.key: o.condition for o in self.operations if o.condition}
        return tuple(found.values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over the operations as canonical JSON and the bytes of their vectors, little-endian float32."""
        digest = hashlib.sha256()
        for operation in self.operations:
            condition = operation.condition
            plain = {**_plain(operation), "condition": _plain(condition) if condition else None}
            digest.update(json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())
            digest.update(operation.direction.astype("<f4").tobytes())
            if condition:
                digest.update(condition.direction.astype("<f4").tobytes())
        return digest.hexdigest()


def resolve(
    entries: Sequence[Entry],
    *,
    n_layers: int,
    d_model: int,
    model_fingerprint: str | None,
    adapter_fingerprint: str | None = None,
    allow_model_mismatch: bool = False,
    read: ReadDirections = read_directions,
) -> ResolvedSpec:
    """
    The operations of `entries` for a model of `n_layers` layers of width `d_model`, in the entries' order.

    Layers, `best`, percentiles and hook points become concrete; an add, ablate or scale with coefficient 0 is left out.
    allow_model_mismatch: take directions of another model of the same shape. read: how a directions file is read.
    Raises InputError, beginning with the entry's number: a bad directions file; directions of another model
    (fingerprint, n_layers or d_model); a layer out of range or absent; no best layer; a percentile that the file does
    not keep or that is not of the layer and hook point acted on; lo above hi; a condition read later than it is needed.
    """
    files: dict[str, Directions] = {}
    operations: list[ResolvedOperation] = []

    def directions(path: str) -> Directions:
        if path not in files:
            files[path] = read(path)
            _refuse_other_model(
                path, files[path], n_layers, d_model, (model_fingerprint, adapter_fingerprint), allow_model_mismatch
            )
        return files[path]

    for number, each in enumerate(entries, start=1):
        try:
            operations += _operations(each, n_layers, directions)
        except InputError as error:
            raise InputError(f"entry {number}: {error}") from error
    return ResolvedSpec(operations=tuple(operations))


def _refuse_other_model(
    path: str,
    directions: Directions,
    n_layers: int,
    d_model: int,
    fingerprints: tuple[str | None, str | None],
    allow_model_mismatch: bool,
) -> None:
    metadata = directions.metadata
    if (directions.n_layers, directions.d_model) != (n_layers, d_model):
        raise InputError(
            f"{path}: directions of {metadata.model_id}, {directions.n_layers} layers of width {directions.d_model}; "
            f"this model has {n_layers} of width {d_model}, so they cannot be used on it"
        )
    if (metadata.model_fingerprint, metadata.adapter_fingerprint) != fingerprints and not allow_model_mismatch:
        raise InputError(
            f"{path}: directions of {metadata.model_id}, whose weights or adapter are not this model's (fingerprint "
            f"{metadata.model_fingerprint[:12]}, here {(fingerprints[0] or 'unknown')[:12]}); extract them anew, or "
            "give --allow_model_mismatch"
        )


def _operations(each: Entry, n_layers: int, read: Callable[[str], Directions]) -> list[ResolvedOperation]:
    directions = read(each.directions_path)
    layers = _layers(each, directions, n_layers)
    operations = [_operation(each, layer, directions, n_layers, read) for layer in layers]
    # Only now, so that a coefficient of 0 does not hide what is wrong with an entry.
    return [] if each.op in VANISH_AT_ZERO and _coefficient(each) == 0 else operations


def _operation(
    each: Entry, layer: int, directions: Directions, n_layers: int, read: Callable[[str], Directions]
) -> ResolvedOperation:
    hook_point = each.hook_point or directions.metadata.hook_point
    source = _source(each.source_layer, layer)
    is_native = (source, directions.metadata.hook_point) == (layer, hook_point)
    value, lo, hi = (_number(b, directions, source, each.k_index, is_native) for b in (each.value, each.lo, each.hi))
    if lo is not None and hi is not None and lo > hi:
        raise InputError(f"lo {each.lo} is {lo:.6g} at layer {layer}, above hi {each.hi}, {hi:.6g}")
    return ResolvedOperation(
        layer=layer,
        hook_point=hook_point,
        op=each.op,
        direction=directions.vector(source, each.k_index),
        coefficient=_coefficient(each),
        relative=each.relative,
        value=value,
        lo=lo,
        hi=hi,
        positions=each.positions,
        condition=_condition(each.when, layer, hook_point, n_layers, read) if each.when else None,
    )


def _coefficient(each: Entry) -> float | None:
    if each.op == "ablate" and each.coefficient is None:
        return 1.0
    return each.coefficient


def _source(source_layer: int | str, layer: int) -> int:
    return layer if isinstance(source_layer, str) else source_layer


def _layers(each: Entry, directions: Directions, n_layers: int) -> tuple[int, ...]:
    layers = parse_layers(each.layers)
    if layers == "best":
        best = directions.metadata.best_layer
        if best is None:
            raise InputError(f"{each.directions_path}: names no best layer; give the layers by number")
        return (best,)
    if layers == "all":
        return directions.layers_present if each.source_layer == "same" else tuple(range(n_layers))
    if layers[-1] >= n_layers:
        raise InputError(f"layers {each.layers}: the model's layers are 0 to {n_layers - 1}")
    return layers


def _number(
    bound: float | str | None, directions: Directions, source: int, k_index: int, is_native: bool
) -> float | None:
    """A bound in the projection's unit."""
    if not isinstance(bound, str):
        return bound
    if not is_native:
        raise InputError(
            f"percentile {bound!r} was measured at {directions.metadata.hook_point} of layer {source} and says nothing "
            "of another layer or hook point; give a number instead"
        )
    return directions.percentile(source, k_index, bound)


def _condition(
    when: Condition, acting_layer: int, acting_hook_point: str, n_layers: int, read: Callable[[str], Directions]
) -> ResolvedCondition:
    directions = read(when.directions_path)
    hook_point = directions.metadata.hook_point
    layer = _source(when.layer, acting_layer)
    source = _source(when.source_layer, layer)
    if layer >= n_layers:
        raise InputError(f"when.layer {layer}: the model's layers are 0 to {n_layers - 1}")
    order = HOOK_POINTS.index
    if (layer, order(hook_point)) > (acting_layer, order(acting_hook_point)):
        raise InputError(
            f"when: reads {hook_point} of layer {layer}, which comes after {acting_hook_point} of layer "
            f"{acting_layer}, where it is needed; expected the same or an earlier one"
        )
    above, below = (_number(b, directions, source, when.k_index, source == layer) for b in (when.above, when.below))
    if above is not None and below is not None and above >= below:
        raise InputError(f"when: above {when.above} is {above:.6g} and below {when.below} is {below:.6g}: never true")
    vector = directions.vector(source, when.k_index)
    return ResolvedCondition(layer=layer, hook_point=hook_point, direction=vector, above=above, below=below)


def _plain(value: ResolvedOperation | ResolvedCondition) -> dict[str, Any]:
    """The fields but for the vector, as JSON; −0.0 is 0."""
    plain = {name: each for name, each in vars(value).items() if name not in ("direction", "condition")}
    numbers = {name: each + 0.0 for name, each in plain.items() if isinstance(each, float)}
    positions = plain.get("positions")
    window = {"positions": positions.model_dump()} if isinstance(positions, Window) else {}
    return {**plain, **numbers, **window}
