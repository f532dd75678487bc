"""
Edits of a weight W (d, n) whose output y = W·x is added to the residual stream, in closed form.

    W' = diag(s)·(W − diag(r)·V·diag(w)·(V/r)ᵀ·W·M)·diag(t),   V (d, k) orthonormal, w (k,) the edit weights

| norm | what it keeps | r | s | t |
|---|---|---|---|---|
| none | nothing; w = 1 removes V from what W writes (Arditi et al. 2024, arXiv 2406.11717) | 1 | 1 | 1 |
| column | each column's length: what one input adds is turned, not shortened | 1 | 1 | see `_column_factors` |
| row | each row's length, of directions removed from the rows at unit length | \\|W_i\\| | see `_row_factors` | 1 |

M is a diagonal of 0 and 1: only inputs at 1 (the columns of some attention heads, say) are edited. Everything that
depends on W alone is made once (`products`); an edit then costs O(k·(d + n)) and reads no weight. Computed this way:

    y' = s ⊙ W·(t ⊙ x) − U·A·(t ⊙ x) + bias,   A = (V/r)ᵀ·W·M (k, n),   U = diag(s·r)·V·diag(w) (d, k)

Leading dimensions of W, those of fused experts, are carried along.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

NORMS = ("none", "column", "row")
LEAST_LEFT = 1e-12
"""Share of a column's or row's squared length below which nothing is left whose length could be kept."""

LEAST_SINE = 0.01
"""Of the angle of a direction to the span of others: below it products in float32 say too little of what it adds."""


@dataclass(frozen=True, kw_only=True)
class WeightEdit:
    """What an edit does to one weight (…, d, n)."""

    u: Tensor
    """(…, d, k)"""
    a: Tensor
    """(…, k, n)"""
    s: Tensor | None = None
    """(…, d); None for ones."""
    t: Tensor | None = None
    """(…, n); None for ones."""
    bias: Tensor | None = None
    """(d,), added to the output whatever the input; None for none."""

    def to(self, device: torch.device) -> "WeightEdit":
        """The same on another device."""
        present = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **present)


@dataclass(frozen=True, kw_only=True)
class Products:
    """What edits of one weight are made of, for m candidate directions; float32."""

    norm: str
    directions: Tensor
    """(m, d)"""
    a: Tensor
    """(…, m, n): (R/r)·W·M."""
    lengths: Tensor | None = None
    """Of W's columns (…, n) or rows (…, d), as `norm` says; None for none."""
    c: Tensor | None = None
    """(…, d, m), norm row only: the products of W's rows, at unit length, with those of `a`."""


def products(weight: Tensor, directions: Tensor, norm: str, mask: Tensor | None = None) -> Products:
    """
    Everything of a weight (…, d, n) that edits in the span of `directions` (m, d) need; mask: bool (n,), the inputs
    that may be edited. Raises ValueError for another norm.
    """
    if norm not in NORMS:
        raise ValueError(f"norm {norm!r}; expected one of {', '.join(NORMS)}")
    w, r = weight.float(), directions.to(weight.device, torch.float32)
    keep = (lambda a: a) if mask is None else (lambda a: a * mask.to(a.device))
    if norm == "none":
        return Products(norm=norm, directions=r, a=keep(r @ w))
    if norm == "column":
        return Products(norm=norm, directions=r, a=keep(r @ w), lengths=torch.linalg.vector_norm(w, dim=-2))
    lengths = torch.linalg.vector_norm(w, dim=-1)
    inverse = torch.where(lengths > 0, 1 / lengths, 0)
    a = keep((r * inverse[..., None, :]) @ w)
    return Products(norm=norm, directions=r, a=a, lengths=lengths, c=(w @ a.mT) * inverse[..., None])


def orthonormal_mix(gram: Tensor, mix: Tensor) -> Tensor:
    """
    Coefficients (m, k) that turn m directions with Gram matrix `gram` (m, m) into k orthonormal ones spanning what
    `mix` (m, k) does, in its order (Gram–Schmidt by Cholesky). Raises ValueError where they are linearly dependent, or
    one is nearer to the span of those before it than float32 directions can tell.
    """
    wanted, known = mix.double(), gram.double()
    products_of = wanted.mT @ known @ wanted
    factor, info = torch.linalg.cholesky_ex(products_of)
    # A pivot over the vector's own length is the sine of its angle to those before it.
    if info.item() or (factor.diagonal() < LEAST_SINE * products_of.diagonal().sqrt()).any():
        raise ValueError(f"{mix.shape[1]} directions that are linearly dependent; expected independent ones")
    return torch.linalg.solve_triangular(factor, wanted.mT, upper=False).mT.float()


def weight_edit(known: Products, mix: Tensor, weights: Tensor) -> WeightEdit:
    """
    The edit by V = Rᵀ·mix, R being the candidate directions: mix (m, k) makes V orthonormal; weights (k,), 1 removes a
    direction whole, 2 reflects at it, below 0 strengthens it.
    """
    mix, weights = mix.to(known.a), weights.to(known.a)
    v, a = known.directions.mT @ mix, mix.mT @ known.a
    if known.norm == "none":
        return WeightEdit(u=v * weights, a=a)
    if known.norm == "column":
        return WeightEdit(u=v * weights, a=a, t=_column_factors(known.lengths, a, weights))
    s = _row_factors(v, known.c @ mix, a, weights)
    return WeightEdit(u=(s * known.lengths)[..., None] * v * weights, a=a, s=s)


def _column_factors(lengths: Tensor, a: Tensor, weights: Tensor) -> Tensor:
    """(…, n): n_j / √(n_j² − Σ_k (2·w_k − w_k²)·a_kj²), by which edited columns get their lengths back."""
    whole = lengths.double().square()
    lost = ((2 * weights - weights.square()).double()[:, None] * a.double().square()).sum(dim=-2)
    return _restoring(whole, whole - lost).to(a)


def _row_factors(v: Tensor, c: Tensor, a: Tensor, weights: Tensor) -> Tensor:
    """(…, d): 1 / |Ŵ_i − Σ_k w_k·v_ik·â_k|, Ŵ_i being row i at unit length: |…|² by the products with and among â."""
    scaled = (v * weights).double()
    gram = a.double() @ a.double().mT
    crossed = (scaled * c.double()).sum(dim=-1)
    squared = 1 - 2 * crossed + ((scaled @ gram) * scaled).sum(dim=-1)
    return _restoring(torch.ones_like(squared), squared).to(a)


def _restoring(whole: Tensor, left: Tensor) -> Tensor:
    nothing = left <= LEAST_LEFT * whole
    return torch.where(nothing, torch.ones_like(whole), whole / left.masked_fill(nothing, 1)).sqrt()


def edited(weight: Tensor, edit: WeightEdit) -> Tensor:
    """The edited weight (…, d, n), float32; the bias is not in it."""
    found = weight.float()
    if edit.s is not None:
        found = edit.s[..., None] * found
    found = found - edit.u @ edit.a
    return found if edit.t is None else found * edit.t[..., None, :]
