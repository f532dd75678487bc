"""
Interventions on hidden states, all by one formula, for each row by itself and in float32:

    h ← h + v + (clamp(a·p, lo, hi) − p)·u,   p = ⟨h, u⟩

`add`, `ablate`, `scale`, `set_to` and `cap` give its parameters for one unit vector; `stacked` makes a table of them,
so that rows under different interventions go through one call. Additive steering: Turner et al. 2023,
arXiv:2308.10248; directional ablation: Arditi et al. 2024, arXiv:2406.11717; capping: Lu et al. 2026, arXiv:2601.10387.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervention:
    """The formula's parameters, float32: vectors (d_model,) and numbers (), or a table of (n, d_model) and (n,)."""

    v: Tensor
    """What is added; where `relative`, what is added per unit of the row's own Euclidean norm."""
    u: Tensor
    """The unit vector whose component is changed, or zero."""
    a: Tensor
    lo: Tensor
    hi: Tensor
    relative: Tensor
    """bool, () or (n,)."""

    def rows(self, index: Tensor) -> "Intervention":
        """From a table the entries `index`, int64 (rows,): what `intervene` takes for that many rows."""
        return Intervention(**{each.name: getattr(self, each.name)[index] for each in fields(self)})

    def write(self, index: int | slice, entries: "Intervention") -> None:
        """Put one intervention, or for a slice a table, into this table's place."""
        for each in fields(self):
            getattr(self, each.name)[index] = getattr(entries, each.name)

    def to(self, device: torch.device) -> "Intervention":
        """The same on another device."""
        return Intervention(**{each.name: getattr(self, each.name).to(device) for each in fields(self)})


def add(direction: Tensor, coefficient: float, relative: bool = False) -> Intervention:
    """
    h ← h + c·d, or with `relative` h + c·‖h‖·d. `direction`: a unit vector (d_model,), like that of every operation.

    Every operation raises ValueError when the direction is not a finite unit vector or a number is not finite.
    """
    return _intervention(direction, v=_finite("coefficient", coefficient), relative=relative)


def ablate(direction: Tensor, coefficient: float = 1.0) -> Intervention:
    """p ← (1 − c)·p: with c = 1 the component along the direction is removed, with c = 2 it is reflected."""
    return _intervention(direction, u=1.0, a=1.0 - _finite("coefficient", coefficient))


def scale(direction: Tensor, coefficient: float) -> Intervention:
    """p ← (1 + c)·p."""
    return _intervention(direction, u=1.0, a=1.0 + _finite("coefficient", coefficient))


def set_to(direction: Tensor, value: float) -> Intervention:
    """p ← value."""
    return _intervention(direction, u=1.0, lo=_finite("value", value), hi=value)


def cap(direction: Tensor, lo: float | None = None, hi: float | None = None) -> Intervention:
    """p ← clamp(p, lo, hi); either bound may be absent. Raises ValueError when both are, and when lo > hi."""
    if lo is None and hi is None:
        raise ValueError("cap needs lo, hi or both")
    low = -math.inf if lo is None else _finite("lo", lo)
    high = math.inf if hi is None else _finite("hi", hi)
    if low > high:
        raise ValueError(f"cap with lo = {lo} above hi = {hi}")
    return _intervention(direction, u=1.0, lo=low, hi=high)


def stacked(interventions: Sequence[Intervention]) -> Intervention:
    """A table of single interventions on one width, in their order."""
    assert interventions, "a table needs at least one intervention"
    names = [each.name for each in fields(Intervention)]
    return Intervention(**{name: torch.stack([getattr(i, name) for i in interventions]) for name in names})


def idle(n: int, d_model: int, device: torch.device) -> Intervention:
    """A table of n interventions that do nothing."""
    number = lambda value: torch.full((n,), value, dtype=torch.float32, device=device)  # noqa: E731
    vectors = lambda: torch.zeros(n, d_model, dtype=torch.float32, device=device)  # noqa: E731
    return Intervention(
        v=vectors(), u=vectors(), a=number(1.0), lo=number(-math.inf), hi=number(math.inf),
        relative=torch.zeros(n, dtype=torch.bool, device=device),
    )  # fmt: skip


def projection(h: Tensor, u: Tensor) -> Tensor:
    """p = ⟨h, u⟩ of each row in float32, (rows,). h: (rows, d_model), any float dtype; u: (d_model,) or as h."""
    return (_wide(h) * u).sum(dim=-1)


def difference(h: Tensor, by: Intervention) -> Tensor:
    """What `by` adds to h: float32, as h, (rows, d_model). `by` is one intervention for all rows or has one a row."""
    wide = _wide(h)
    p = (wide * by.u).sum(dim=-1)
    length = torch.where(by.relative, wide.norm(dim=-1), 1.0)
    return length[..., None] * by.v + (torch.clamp(by.a * p, by.lo, by.hi) - p)[..., None] * by.u


def intervene(h: Tensor, by: Intervention, acting: Tensor | None = None) -> Tensor:
    """
    h (rows, d_model) of any float dtype under `by`, in the same dtype: summed in float32, rounded once.

    acting: bool (rows,), the rows to act on, all when None. The others, and every number to which nothing is added,
    stay bit for bit, NaN and −0.0 included.
    """
    return moved(h, difference(h, by), acting)


def moved(h: Tensor, delta: Tensor, acting: Tensor | None = None) -> Tensor:
    """h + delta, in h's dtype, where `acting` and where delta is not 0; delta float32, as h. See `intervene`."""
    same = delta == 0
    if acting is not None:
        same = same | ~acting[..., None]
    return torch.where(same, h, (_wide(h) + delta).to(h.dtype))


def holds(p: Tensor, above: float | None = None, below: float | None = None) -> Tensor:
    """Whether a condition on projections p (rows,) holds: above < p, p < below, or both. NaN fulfils none. bool."""
    assert above is not None or below is not None, "a condition needs above, below or both"
    held = p == p
    if above is not None:
        held = held & (p > above)
    return held if below is None else held & (p < below)


def _wide(h: Tensor) -> Tensor:
    return h.to(torch.promote_types(h.dtype, torch.float32))


def _finite(name: str, number: float) -> float:
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}; expected a finite number")
    return number


def _intervention(
    direction: Tensor,
    *,
    v: float = 0.0,
    u: float = 0.0,
    a: float = 1.0,
    lo: float = -math.inf,
    hi: float = math.inf,
    relative: bool = False,
) -> Intervention:
    """v and u are given as multiples of the direction."""
    if direction.dim() != 1:
        raise ValueError(f"a direction of shape {tuple(direction.shape)}; expected (d_model,)")
    d = direction.to(torch.float32)
    norm = d.double().norm().item()
    # Also false for NaN and infinity.
    if not abs(norm - 1.0) <= UNIT_TOLERANCE:
        raise ValueError(f"a direction of norm {norm}; expected a unit vector")
    number = lambda x: torch.tensor(x, dtype=torch.float32, device=d.device)  # noqa: E731
    return Intervention(
        v=v * d, u=u * d, a=number(a), lo=number(lo), hi=number(hi), relative=torch.tensor(relative, device=d.device)
    )
