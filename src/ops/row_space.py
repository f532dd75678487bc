"""
Linear algebra on residual rows that never makes a d_model × d_model matrix, and the checks that go before it.

Rows are (n, n_layers, d_model); whatever is raised names the layer.
"""

from typing import NamedTuple

import scipy.linalg
import torch
from torch import Tensor

RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest count as 0: float32 rows do not determine smaller ones."""
NO_DIFFERENCE = 1e-6
"""Class means closer than this share of the rows' mean norm are equal to float32 precision."""
VANISHING = 1e-4
"""A direction of which no more than this share is left lies in the subspace that was taken out."""


class LeftFactor(NamedTuple):
    """Rows A (n, d) ≈ u·diag(s)·V with orthonormal V (r, d) = diag(1/s)·uᵀ·A; r is the numerical rank."""

    u: Tensor
    """(n, r), orthonormal columns."""
    s: Tensor
    """(r,), positive, descending."""


def check_rows(rows: Tensor, what: str) -> None:
    """Raises ValueError unless `rows` is a float (n, n_layers, d_model) without NaN and infinity; only n may be 0."""
    if rows.dim() != 3 or not rows.is_floating_point() or not min(rows.shape[1:]):
        raise ValueError(f"{what} are {rows.dtype} {tuple(rows.shape)}; expected floats (n, n_layers, d_model)")
    _refuse_not_finite(rows, what)


def check_directions(directions: Tensor, what: str = "directions") -> None:
    """Raises ValueError unless they are floats (n_layers, k, d_model) without NaN and infinity; only k may be 0."""
    if directions.dim() != 3 or not directions.is_floating_point() or not min(directions.shape[::2]):
        raise ValueError(
            f"{what} are {directions.dtype} {tuple(directions.shape)}; expected floats (n_layers, k, d_model)"
        )
    _refuse_not_finite(directions.transpose(0, 1), what)


def _refuse_not_finite(rows: Tensor, what: str) -> None:
    """Rows (n, n_layers, d)."""
    bad = torch.stack([~layer.isfinite().all() for layer in rows.unbind(dim=1)]).nonzero().flatten().tolist()
    if bad:
        n_rows = int((~rows[:, bad[0]].isfinite().all(dim=-1)).sum())
        others = f" (and {len(bad) - 1} more layers)" if len(bad) > 1 else ""
        raise ValueError(
            f"{what} hold NaN or infinity at layer {bad[0]}{others}, in {n_rows} of its {len(rows)}; "
            "a model that overflows in half precision often runs in float32"
        )


def check_classes(target: Tensor, control: Tensor, paired: bool = False) -> None:
    """Raises ValueError unless both pass `check_rows`, hold rows, agree in layers and width, in size too if paired."""
    for rows, what in ((target, "target rows"), (control, "control rows")):
        check_rows(rows, what)
        if not len(rows):
            raise ValueError(f"there are no {what}: both classes need at least one")
    if target.shape[1:] != control.shape[1:]:
        raise ValueError(
            f"target rows are {tuple(target.shape)}, control rows {tuple(control.shape)}: "
            "layers and width must be the same"
        )
    if paired and len(target) != len(control):
        raise ValueError(f"pairs need as many target rows as control rows, there are {len(target)} and {len(control)}")


def left_factor(rows: Tensor, least: float = 0.0) -> LeftFactor:
    """
    Left singular vectors and singular values of float64 rows (n, d), by the n × n Gram matrix where n ≤ d.

    least: the size of what rounding has left in differences of larger rows; unless the largest singular value exceeds
    it, r is 0, as for rows of zeros.
    """
    if rows.shape[0] <= rows.shape[1]:
        squares, u = torch.linalg.eigh(rows @ rows.T)
        u, s = u.flip(1), squares.flip(0).clamp_min(0).sqrt()
    else:
        u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    rank = int((s > RANK_TOLERANCE * s[0]).sum()) if s[0] > least else 0
    return LeftFactor(u[:, :rank], s[:rank])


def orthonormal(vectors: Tensor, what: str) -> Tensor:
    """
    Vectors (n_layers, k, d) made orthonormal over k, the first kept as it is, each on the side it was on: float64.

    Raises ValueError, naming `what`, layer and place, when one is zero or depends on those before it.
    """
    if vectors.shape[1] > vectors.shape[2]:
        raise ValueError(f"{vectors.shape[1]} orthonormal directions do not fit in width {vectors.shape[2]}")
    vectors = vectors.double()
    lengths = vectors.norm(dim=-1, keepdim=True)
    _refuse(lengths[..., 0] == 0, f"{what} is zero")
    q, r = torch.linalg.qr((vectors / lengths).mT)
    left = r.diagonal(dim1=-2, dim2=-1)
    _refuse(left.abs() <= VANISHING, f"{what} depends on those before it")
    return (q * left.sign()[:, None]).mT


def without(vectors: Tensor, subspace: Tensor) -> Tensor:
    """
    Vectors (n_layers, k, d) less their part in the span of `subspace` (n_layers, m, d), of any rank: float64.

    The basis comes from QR with column pivoting, and is taken out twice, since one pass leaves a rounding error that is
    large beside a small rest ("twice is enough", Giraud et al. 2005). Raises ValueError, naming layer and place, when
    less than `VANISHING` of a vector is left.
    """
    vectors = vectors.double()
    parts = []
    for layer in range(len(vectors)):
        basis = _basis(subspace[layer].double()).to(vectors.device)
        rest = vectors[layer]
        for _ in range(2):
            rest = rest - (rest @ basis) @ basis.T
        parts.append(rest)
    rest = torch.stack(parts)
    _refuse(rest.norm(dim=-1) <= VANISHING * vectors.norm(dim=-1), "the direction lies in the subspace to be taken out")
    return rest


def _basis(spanning: Tensor) -> Tensor:
    """Orthonormal columns (d, rank) spanning the rows of `spanning` (m, d), each counted at length 1."""
    lengths = spanning.norm(dim=-1)
    unit = (spanning[lengths > 0] / lengths[lengths > 0, None]).cpu()
    if not len(unit):
        return unit.T
    q, r, _ = scipy.linalg.qr(unit.T.numpy(), mode="economic", pivoting=True)
    return torch.from_numpy(q[:, abs(r.diagonal()) > RANK_TOLERANCE])


def _refuse(bad: Tensor, what: str) -> None:
    """Raises ValueError for the first True of (n_layers, k)."""
    if bad.any():
        layer, k = bad.nonzero()[0].tolist()
        raise ValueError(f"layer {layer}, direction {k}: {what} ({int(bad.any(dim=1).sum())} layers in all)")
