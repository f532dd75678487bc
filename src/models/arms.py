"""The arms of a run that steers: unsteered, steered, and controls; what each does to the hidden states."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from src.common.dose_config import DoseConfigBase
from src.common.interventions import Entry
from src.common.resolved_interventions import ResolvedSpec

if TYPE_CHECKING:
    from src.models.engine import Engine

UNSTEERED = "unsteered"
CONTROL_SUFFIX = " random"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to steer."""

    name: str
    """Unique in its run: `unsteered`, `steered` or the coefficient, `+4`; of a control with ` random` behind it."""
    coefficient: float | None
    """Of all its entries, None when they differ or have none; 0 of the unsteered arm."""
    is_control: bool = False
    entries: tuple[Entry, ...] = ()

    @property
    def is_reference(self) -> bool:
        return self.name == UNSTEERED


def build_arms(config: DoseConfigBase, entries: Sequence[Entry]) -> list[Arm]:
    """
    The unsteered arm among the steered ones by its coefficient, then their controls; without entries it alone.
    `entries`: as written.
    """
    reference = Arm(name=UNSTEERED, coefficient=0.0)
    if not entries:
        return [reference]
    if config.steer is not None:
        entries = [e.model_copy(update={"relative": config.relative, "positions": config.positions}) for e in entries]
    if config.coefficients is None:
        arms = [Arm(name="steered", coefficient=_common_coefficient(entries), entries=tuple(entries))]
    else:
        arms = [
            Arm(
                name=f"{value:+.12g}",
                coefficient=value,
                entries=tuple(e.model_copy(update={"coefficient": value}) for e in entries),
            )
            for value in config.coefficients
            if value != 0
        ]
    controls = [replace(arm, name=arm.name + CONTROL_SUFFIX, is_control=True) for arm in arms]
    below = [arm for arm in arms if (arm.coefficient or 0) < 0]
    above = [arm for arm in arms if arm not in below]
    by_coefficient = lambda some: sorted(some, key=lambda arm: arm.coefficient or 0)  # noqa: E731
    return [
        *by_coefficient(below),
        reference,
        *by_coefficient(above),
        *(by_coefficient(controls) if config.random_control else []),
    ]


def specs_of(arms: Sequence[Arm], engine: "Engine", seed: int, allow_model_mismatch: bool) -> dict[str, ResolvedSpec]:
    """Arm's name → what it does in this model. Raises InputError as `Engine.resolve`."""
    specs = {}
    for arm in arms:
        spec = engine.resolve(arm.entries, allow_model_mismatch)
        specs[arm.name] = with_random_directions(spec, seed) if arm.is_control else spec
    return specs


def fingerprint_of(specs: Mapping[str, ResolvedSpec]) -> str:
    """sha256 (hex) over all arms' names and what they do."""
    plain = json.dumps([[name, spec.fingerprint] for name, spec in specs.items()])
    return hashlib.sha256(plain.encode()).hexdigest()


def with_random_directions(spec: ResolvedSpec, seed: int) -> ResolvedSpec:
    """
    The same operations along random directions: distinct unit vectors become as many, turned as one by a random
    rotation, so that lengths and mutual angles stay what they were. Arms that differ in their numbers alone get the
    same directions. Conditions keep theirs: they say where to act, not what is done.
    """
    if not spec.operations:
        return spec
    distinct = {each.direction.tobytes(): each.direction for each in spec.operations}
    turned = dict(zip(distinct, random_rotation(np.stack(list(distinct.values())), seed), strict=True))
    operations = [replace(each, direction=turned[each.direction.tobytes()]) for each in spec.operations]
    return ResolvedSpec(operations=tuple(operations))


def random_rotation(vectors: np.ndarray, seed: int) -> np.ndarray:
    """
    float32 (n, d) → (n, d) with the same inner products among the rows, their span uniformly random (Haar measure).

    By QR of a Gaussian matrix with as many columns as the rows span (Stewart 1980), never d × d.
    """
    _, d_model = vectors.shape
    basis, coordinates = np.linalg.qr(vectors.T.astype(np.float64))
    gaussian = np.random.default_rng(seed).normal(size=(d_model, basis.shape[1]))
    random_basis, triangle = np.linalg.qr(gaussian)
    # Without the signs QR's own convention would favour some bases.
    random_basis *= np.sign(np.diag(triangle))
    return (random_basis @ coordinates).T.astype(np.float32)


def _common_coefficient(entries: Sequence[Entry]) -> float | None:
    found = {entry.coefficient for entry in entries}
    return found.pop() if len(found) == 1 else None
