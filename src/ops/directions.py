"""
Directions from contrasts: residual rows of target and control prompts → (n_layers, k, d_model), one set a layer.

Rows are floats (n, n_layers, d_model) on the CPU or a CUDA device. Results are float32 on the rows' device, orthonormal
over k, and point from control to target wherever that is defined. Sums and factorisations are float64, one layer at a
time, by the n × n Gram matrix or an SVD of the rows. ValueError for: a class without rows, shapes that disagree, NaN or
infinity, pairs of unequal number, more directions than the rows determine, no difference of means at some layer.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from src.ops.kmeans import cluster_means
from src.ops.moments import Moments
from src.ops.probes import fit
from src.ops.row_space import (
    NO_DIFFERENCE,
    RANK_TOLERANCE,
    check_classes,
    check_directions,
    check_rows,
    left_factor,
    orthonormal,
    without,
)

UNIT_TOLERANCE = 1e-3
MAX_ELEMENTS_AT_ONCE = 1 << 23
"""torch.quantile refuses more than 2²⁴ numbers."""


def mean_difference(target: Tensor | Moments, control: Tensor | Moments) -> Tensor:
    """Mean of target minus mean of control, of length 1: float32 (n_layers, 1, d_model). Marks and Tegmark 2023."""
    return _unit(_difference(target, control)[:, None])


def median_of_means(target: Tensor, control: Tensor, n_blocks: int = 9, seed: int = 0) -> Tensor:
    """
    Difference of the classes' medians of means: float32 (n_layers, 1, d_model).

    Each class is shuffled by `seed` and cut into `n_blocks` blocks of equal size to within one; the median over their
    means is taken by coordinate (Nemirovsky and Yudin 1983), so outliers in fewer than half of the blocks do not carry
    it far. One block gives the mean difference. Not equivariant under rotation, as medians by coordinate are not.
    Raises ValueError unless 1 ≤ n_blocks ≤ the rows of the smaller class.
    """
    _difference(target, control)
    if not 1 <= n_blocks <= min(len(target), len(control)):
        raise ValueError(
            f"{n_blocks} blocks of {len(target)} target and {len(control)} control rows: expected 1 to the fewer"
        )
    generator = torch.Generator().manual_seed(seed)
    medians = [_median(_block_means(rows, n_blocks, generator)) for rows in (target, control)]
    difference = medians[0] - medians[1]
    _refuse_equal(difference, torch.maximum(*(median.norm(dim=-1) for median in medians)))
    return _unit(difference[:, None])


def pca(target: Tensor, control: Tensor, *, paired: bool, k: int = 1) -> Tensor:
    """
    The k principal directions of the contrast: float32 (n_layers, k, d_model), strongest first.

    paired: of the differences target i − control i, about zero and not about their mean, which is the signal (the same
    as of each pair centred on its midpoint: Zou et al. 2023). Otherwise: of all rows less the midpoint of the class
    means, both classes weighing the same whatever their sizes. A direction's sign is that of the mean difference.
    """
    difference = _difference(target, control)
    _check_k(k, target, control, paired)
    found = _principal(target, control, paired, k, lambda contrast, layer: contrast)
    return _signed(found, difference[:, None]).float()


def mean_and_pca(target: Tensor, control: Tensor, *, paired: bool, k: int = 2) -> Tensor:
    """
    The mean difference, then the k − 1 principal directions of what `pca` analyses, less its part along the mean
    difference: float32 (n_layers, k, d_model). On the later ones the class means agree; their sign makes the largest
    coordinate positive.
    """
    first = _unit(_difference(target, control)[:, None]).double()
    _check_k(k, target, control, paired)
    if k == 1:
        return first.float()
    along = lambda contrast, layer: contrast - (contrast @ first[layer].T) @ first[layer]  # noqa: E731
    rest = _principal(target, control, paired, k - 1, along)
    return orthonormal(torch.cat([first, _signed(rest, None)], dim=1), "the principal direction").float()


def cones(target: Tensor, control: Tensor | Moments, k: int = 2, seed: int = 0) -> Tensor:
    """
    One direction a cluster of the target rows: its mean minus the control's mean, the largest cluster first, then made
    orthonormal in that order: float32 (n_layers, k, d_model). The span is that of the k differences.

    Clusters are found at each layer by k-means (Lloyd 1982; starts by k-means++, Arthur and Vassilvitskii 2007), the
    best of 10 starts drawn from `seed`. Raises ValueError for fewer than k distinct rows and for clusters whose
    differences depend on one another.
    """
    _difference(target, control)
    means = cluster_means(target, k, seed)
    differences = means - _moments(control, "control rows").mean.to(means.device)[:, None]
    return orthonormal(differences, "the difference of the cluster").float()


def logistic(target: Tensor, control: Tensor, c: float | Tensor = 1.0) -> Tensor:
    """
    Weights of an L2 logistic regression of target against control, of length 1: float32 (n_layers, 1, d_model).

    c: scikit-learn's C, a number or one a layer (n_layers,), on rows scaled to mean squared distance 1 from their mean
    (`src.ops.probes`). The smaller, the closer to the mean difference of balanced classes.
    """
    _difference(target, control)
    return _unit(fit(target, control, c=c).weights[:, None])


def ensemble(directions: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """
    Weighted sum of directions (n_layers, k, d_model), each first turned to the side of the first at its layer and
    place; of length 1, and orthonormal over k: float32.

    Raises ValueError for shapes that differ, directions that are not of length 1, and weights that are not positive.
    """
    if not directions or len(directions) != len(weights):
        raise ValueError(f"{len(directions)} sets of directions with {len(weights)} weights: expected one each")
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"weights {list(weights)}: expected positive numbers")
    for number, each in enumerate(directions):
        check_directions(each, f"directions of set {number}")
        if each.shape != directions[0].shape:
            raise ValueError(f"set {number} is {tuple(each.shape)}, the first {tuple(directions[0].shape)}")
        if ((each.double().norm(dim=-1) - 1).abs() > UNIT_TOLERANCE).any():
            raise ValueError(
                f"set {number} holds directions that are not of length 1: their weights would not be meant"
            )
    first = directions[0].double()
    total = sum(weight * _signed(each.double(), first) for each, weight in zip(directions, weights, strict=True))
    return orthonormal(total, "the weighted sum").float()


def project_out(directions: Tensor, subspace: Tensor) -> Tensor:
    """
    Directions less their part in a subspace, orthonormal over k again: float32 (n_layers, k, d_model).

    subspace: spanning vectors (n_layers, m, d_model) of any length, number and rank, zeros included: the control mean
    as mean[:, None] ("projected" abliteration), or directions that are to be preserved. Raises ValueError, naming layer
    and place, for a direction that lies in the subspace (less than 1e-4 of it is left), or that depends on the others
    outside it; for shapes that disagree; for NaN or infinity.
    """
    check_directions(directions)
    check_directions(subspace, "vectors of the subspace")
    if (directions.shape[0], directions.shape[2]) != (subspace.shape[0], subspace.shape[2]):
        raise ValueError(
            f"directions are {tuple(directions.shape)}, the subspace {tuple(subspace.shape)}: "
            "the first and last numbers must be the same"
        )
    return orthonormal(without(directions, subspace), "what is left of the direction").float()


def winsorize(rows: Tensor, quantile: float) -> Tensor:
    """
    Each row of each layer with its coordinates clamped to ± the `quantile` of their absolute values (linear between
    order statistics): float32, the rows' shape. 1 changes nothing. Raises ValueError for a quantile outside (0, 1].
    """
    check_rows(rows, "rows")
    if not 0 < quantile <= 1:
        raise ValueError(f"winsorize at quantile {quantile}: expected more than 0 and at most 1")
    if quantile == 1 or not len(rows):
        return rows.float()
    flat = rows.reshape(-1, rows.shape[-1])
    return torch.cat(
        [_winsorized(part.float(), quantile) for part in flat.split(max(1, MAX_ELEMENTS_AT_ONCE // flat.shape[1]))]
    ).reshape(rows.shape)


def _winsorized(rows: Tensor, quantile: float) -> Tensor:
    limit = torch.quantile(rows.abs(), quantile, dim=-1, keepdim=True)
    return rows.clamp(-limit, limit)


def _moments(rows: Tensor | Moments, what: str) -> Moments:
    if isinstance(rows, Tensor):
        check_rows(rows, what)
        moments = Moments(*rows.shape[1:])
        moments.add(rows)
    else:
        moments = rows
    if not moments.count:
        raise ValueError(f"there are no {what}: both classes need at least one")
    return moments


def _difference(target: Tensor | Moments, control: Tensor | Moments) -> Tensor:
    """Mean of target minus mean of control, float64 (n_layers, d_model); makes the checks that all methods share."""
    moments = _moments(target, "target rows"), _moments(control, "control rows")
    shapes = [(each.n_layers, each.d_model) for each in moments]
    if shapes[0] != shapes[1]:
        raise ValueError(f"target has (n_layers, d_model) = {shapes[0]}, control {shapes[1]}: they must be the same")
    difference = moments[0].mean - moments[1].mean
    _refuse_equal(difference, torch.maximum(moments[0].mean_norm, moments[1].mean_norm))
    return difference.to(next((rows.device for rows in (target, control) if isinstance(rows, Tensor)), "cpu"))


def _refuse_equal(difference: Tensor, scale: Tensor) -> None:
    equal = difference.norm(dim=-1) <= NO_DIFFERENCE * scale
    if equal.any():
        layers = equal.nonzero().flatten().tolist()
        raise ValueError(
            f"the means of target and control are equal at layer {layers[0]} ({len(layers)} such layers): there is no "
            "direction between them; another token position or hook point may have one"
        )


def _unit(vectors: Tensor) -> Tensor:
    return (vectors / vectors.norm(dim=-1, keepdim=True)).float()


def _block_means(rows: Tensor, n_blocks: int, generator: torch.Generator) -> Tensor:
    blocks = torch.randperm(len(rows), generator=generator).tensor_split(n_blocks)
    return torch.stack([rows[block.to(rows.device)].mean(dim=0, dtype=torch.float64) for block in blocks])


def _median(values: Tensor) -> Tensor:
    """Over the first dimension; the mean of the middle two of an even number, which torch.median does not take."""
    ordered, n = values.sort(dim=0).values, len(values)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def _check_k(k: int, target: Tensor, control: Tensor, paired: bool) -> None:
    check_classes(target, control, paired)
    most = min(len(target) if paired else len(target) + len(control) - 1, target.shape[2])
    if not 1 <= k <= most:
        kind = "pairs" if paired else "target and control rows"
        raise ValueError(f"{k} directions from {len(target)} + {len(control)} {kind}: expected 1 to {most}")


def _contrast(target: Tensor, control: Tensor, paired: bool) -> tuple[Tensor, Tensor]:
    """What the principal directions of one layer are of, (n or n_target + n_control, d_model), and its rows' norm."""
    if paired:
        return target - control, torch.cat([target, control]).norm()
    midpoint = (target.mean(dim=0) + control.mean(dim=0)) / 2
    target, control = target / len(target) ** 0.5, control / len(control) ** 0.5
    centred = torch.cat([target - midpoint / len(target) ** 0.5, control - midpoint / len(control) ** 0.5])
    return centred, torch.cat([target, control]).norm()


def _principal(
    target: Tensor, control: Tensor, paired: bool, k: int, prepare: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """The k strongest right singular vectors of every layer's prepared contrast, float64 (n_layers, k, d_model)."""
    found = []
    for layer in range(target.shape[1]):
        contrast, scale = _contrast(target[:, layer].double(), control[:, layer].double(), paired)
        contrast = prepare(contrast, layer)
        factor = left_factor(contrast)
        # What is smaller is what rounding has left of the rows, however large it is beside the rest of the contrast.
        rank = int((factor.s > RANK_TOLERANCE * scale).sum())
        if rank < k:
            raise ValueError(f"layer {layer}: the rows determine {rank} principal directions, {k} were asked for")
        found.append((factor.u[:, :k].T @ contrast) / factor.s[:k, None])
    # Right vectors from a Gram matrix are orthogonal only as far as their singular values are apart.
    return orthonormal(torch.stack(found), "the principal direction")


def _signed(vectors: Tensor, reference: Tensor | None) -> Tensor:
    """Each on the side of `reference`; where that is not defined, with its largest coordinate positive."""
    largest = vectors.gather(-1, vectors.abs().argmax(dim=-1, keepdim=True))
    side = torch.zeros_like(largest) if reference is None else (vectors * reference).sum(dim=-1, keepdim=True)
    return vectors * torch.where(side == 0, largest, side).sign()
