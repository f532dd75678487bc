"""Summaries of a sample of measurements, with intervals from the bootstrap, and of a few by Student's t."""

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


def summarize_few(values: Sequence[float]) -> Summary | None:
    """
    Mean, standard deviation, n and the 95 % interval of the mean by Student's t (Student 1908), for a handful of
    independent values such as runs with different seeds: of two values the percentile bootstrap's covers the mean half
    of the time, of six 87 %. None for no values, no interval for one. Raises ValueError for a NaN or infinite value.
    """
    from scipy.special import stdtrit

    sample = np.asarray(values, dtype=np.float64)
    if not sample.size:
        return None
    if not np.isfinite(sample).all():
        raise ValueError(f"{int((~np.isfinite(sample)).sum())} of {sample.size} values are not finite")
    mean, n = float(sample.mean()), int(sample.size)
    if n == 1:
        return Summary(mean, None, 1, None, None)
    std = float(sample.std(ddof=1))
    half = float(stdtrit(n - 1, 0.975)) * std / n**0.5
    return Summary(mean, std, n, mean - half, mean + half)


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


def share_interval(n_hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of `n` independent draws, 0 and 1 among them (Wilson 1927). Raises for n < 1."""
    if not 0 <= n_hits <= n or n < 1:
        raise ValueError(f"{n_hits} of {n}; expected a share of at least one")
    z = 1.959963984540054
    share, extra = n_hits / n, z * z / n
    middle = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * np.sqrt(share * (1 - share) / n + extra / (4 * n))
    # At 0 and 1 the ends are exact; rounding would leave them an ulp off.
    return (0.0 if n_hits == 0 else float(middle - half)), (1.0 if n_hits == n else float(middle + half))


def paired_difference_interval(both: int, first: int, second: int, neither: int) -> tuple[float, float]:
    """
    The 95 % interval of the difference of two shares of the same draws, P(first) − P(second), from how many had both,
    the first alone, the second alone and neither (Newcombe 1998, Statistics in Medicine 17, p. 2635, method 10). Unlike
    the bootstrap's it is no single point where the two never differ. Raises ValueError for no draws.
    """
    n = both + first + second + neither
    p, q = (both + first) / n if n else 0.0, (both + second) / n if n else 0.0
    (p_low, p_high), (q_low, q_high) = share_interval(both + first, n), share_interval(both + second, n)
    margins = float((both + first) * (second + neither) * (both + second) * (first + neither))
    product = both * neither - first * second
    # The correction for continuity shrinks a positive correlation alone.
    product = max(product - n / 2, 0.0) if product > 0 else product
    phi = product / np.sqrt(margins) if margins else 0.0

    def reach(one: float, other: float) -> float:
        return float(np.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other)))

    difference = p - q
    return difference - reach(p - p_low, q_high - q), difference + reach(p_high - p, q - q_low)
