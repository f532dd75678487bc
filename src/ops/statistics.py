"""Summaries of a sample of measurements, with intervals from the bootstrap. Numpy only."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Summary(NamedTuple):
    """In the unit of the values."""

    mean: float
    std: float | None
    """Sample standard deviation (n − 1), None for a single value."""
    n: int
    ci_low: float | None
    """Lower end of the 95 % interval of the mean, None for a single cluster."""
    ci_high: float | None


def summarize(
    values: Sequence[float], clusters: Sequence[object], seed: int, n_resamples: int = 2_000
) -> Summary | None:
    """
    Mean, standard deviation, n and the 95 % percentile interval of the mean from a cluster bootstrap.

    clusters: which values belong together, of the same length as `values`: whole clusters are resampled (Davison and
    Hinkley 1997, §3.8), since repeats of one prompt are not independent measurements. One cluster a value gives the
    ordinary bootstrap (Efron 1979). None for no values. Raises ValueError when a value is NaN or infinite.
    """
    assert len(values) == len(clusters), f"{len(values)} values, {len(clusters)} clusters"
    sample = np.asarray(values, dtype=np.float64)
    if not sample.size:
        return None
    if not np.isfinite(sample).all():
        raise ValueError(f"{int((~np.isfinite(sample)).sum())} of {sample.size} values are not finite")
    mean = float(sample.mean())
    std = float(sample.std(ddof=1)) if sample.size > 1 else None
    numbers = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    if len(numbers) == 1:
        return Summary(mean, std, int(sample.size), None, None)
    index = np.array([numbers[cluster] for cluster in clusters])
    low, high = np.percentile(bootstrap_means(sample, index, seed, n_resamples), [2.5, 97.5])
    return Summary(mean, std, int(sample.size), float(low), float(high))


def bootstrap_means(sample: np.ndarray, index: np.ndarray, seed: int, n_resamples: int) -> np.ndarray:
    """
    Means of `n_resamples` resamples of whole clusters: float64 (n_resamples,).

    sample: float64 (n,). index: int (n,), the cluster of each value, 0 … n_clusters − 1, none empty.
    """
    sums, counts = np.bincount(index, weights=sample), np.bincount(index)
    generator = np.random.default_rng(seed)
    rows_at_once = max(1, 4_000_000 // sums.size)
    means = []
    for start in range(0, n_resamples, rows_at_once):
        drawn = generator.integers(sums.size, size=(min(rows_at_once, n_resamples - start), sums.size))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(means)
