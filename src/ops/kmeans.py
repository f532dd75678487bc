"""Clusters of residual rows by k-means (Lloyd 1982) with k-means++ starts (Arthur and Vassilvitskii 2007)."""

import torch
from torch import Tensor

N_STARTS = 10
"""Starts a layer; the one that ends with the least inertia is kept."""
LEAST_GAIN = 1e-12
"""Relative fall of the inertia below which a start has ended. It never rises, so every start ends."""


def cluster_means(rows: Tensor, k: int, seed: int) -> Tensor:
    """
    Means of the k clusters of `rows` (n, n_layers, d), the largest cluster first: float64 (n_layers, k, d).

    Every layer draws from `seed` anew, so its clusters do not depend on the other layers. Raises ValueError unless
    1 ≤ k ≤ the number of distinct rows at every layer.
    """
    if not 1 <= k <= len(rows):
        raise ValueError(f"{k} clusters of {len(rows)} rows: expected 1 to their number")
    means = []
    for layer in range(rows.shape[1]):
        at_layer = rows[:, layer].double()
        n_distinct = len(at_layer.unique(dim=0))
        if n_distinct < k:
            raise ValueError(f"layer {layer}: {k} clusters of {n_distinct} distinct rows")
        means.append(_means_by_size(at_layer, k, torch.Generator().manual_seed(seed)))
    return torch.stack(means)


def _means_by_size(rows: Tensor, k: int, generator: torch.Generator) -> Tensor:
    starts = (_start(rows, k, generator) for _ in range(N_STARTS))
    _, members = min((_lloyd(rows, start) for start in starts), key=lambda found: found[0])
    order = members.bincount(minlength=k).argsort(descending=True, stable=True)
    return _means(rows, members, k)[order]


def _lloyd(rows: Tensor, means: Tensor) -> tuple[float, Tensor]:
    """Inertia and the cluster (n,) of each row, from k distinct rows as `means`; no cluster is empty."""
    k = len(means)
    best_inertia, best = float("inf"), torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    while True:
        nearest, members = _squared_distances(rows, means).min(dim=1)
        for cluster in (members.bincount(minlength=k) == 0).nonzero().flatten():
            # Not one that is alone in its cluster, which would be empty then.
            is_alone = members.bincount(minlength=k)[members] == 1
            farthest = nearest.masked_fill(is_alone, -1.0).argmax()
            members[farthest] = cluster
            nearest[farthest] = 0.0
        inertia = float(nearest.sum())
        if inertia >= best_inertia * (1 - LEAST_GAIN):
            return best_inertia, best
        best_inertia, best = inertia, members
        means = _means(rows, members, k)


def _start(rows: Tensor, k: int, generator: torch.Generator) -> Tensor:
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    while len(chosen) < k:
        distances = _squared_distances(rows, rows[chosen]).min(dim=1).values
        chosen.append(int(torch.multinomial(distances.cpu(), 1, generator=generator)))
    return rows[chosen]


def _means(rows: Tensor, members: Tensor, k: int) -> Tensor:
    return torch.stack([rows[members == cluster].mean(dim=0) for cluster in range(k)])


def _squared_distances(rows: Tensor, means: Tensor) -> Tensor:
    # By differences: ‖a‖² + ‖b‖² − 2⟨a, b⟩ cancels where rows are far from the origin.
    return torch.stack([(rows - mean).square().sum(dim=1) for mean in means], dim=1)
