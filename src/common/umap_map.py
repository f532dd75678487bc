"""Rows placed on a plane by UMAP."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def umap_coordinates(rows: "np.ndarray", seed: int, n_neighbors: int, **options: Any) -> "np.ndarray":
    """
    float64 (n, 2) of rows (n, d) by UMAP (McInnes, Healy and Melville 2018) from Euclidean distances; options: its own.
    PyTorch computes with as many threads behind it as before: with another number, sums come out in another order.
    """
    from umap import UMAP

    # Numba, which UMAP runs on, sets the number of OpenMP's threads for the whole process.
    torch = sys.modules.get("torch")
    n_threads = torch.get_num_threads() if torch else None
    try:
        # With a seed UMAP runs on one thread; saying so keeps it from warning.
        found = UMAP(n_neighbors=n_neighbors, random_state=seed, n_jobs=1, **options).fit_transform(rows)
    finally:
        if torch:
            torch.set_num_threads(n_threads)
    return found.astype("float64")
