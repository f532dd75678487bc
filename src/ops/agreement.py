"""How far several judgements of the same things agree. Numpy only."""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np


def alpha_interval(units: Sequence[Sequence[float]]) -> float | None:
    """
    Krippendorff's α for numbers, disagreement being the squared difference: 1 − D_observed / D_expected (Krippendorff
    2011, "Computing Krippendorff's Alpha-Reliability"). 1 is agreement, 0 what chance gives.

    units: the values that each thing was given; those with fewer than two do not count. None where there is none, or
    where all values are equal, so that nothing is expected to differ.
    """
    paired = [np.asarray(unit, dtype=np.float64) for unit in units if len(unit) > 1]
    if not paired:
        return None
    everything = np.concatenate(paired)
    observed = sum(_squared_differences(unit) / (unit.size - 1) for unit in paired) / everything.size
    expected = _squared_differences(everything) / (everything.size * (everything.size - 1))
    return None if np.ptp(everything) == 0 else float(1 - observed / expected)


def _squared_differences(values: np.ndarray) -> float:
    """Σ over ordered pairs of (a − b)²; about the mean, so that large values do not cancel."""
    centred = values - values.mean()
    return float(2 * values.size * (centred**2).sum())


def alpha_nominal(units: Sequence[Sequence[Hashable]]) -> float | None:
    """The same for categories, disagreement being 1 for different ones and 0 for equal ones."""
    paired = [unit for unit in units if len(unit) > 1]
    everything = [value for unit in paired for value in unit]
    if len(set(everything)) < 2:
        return None
    n = len(everything)
    observed = sum(_different_pairs(unit) / (len(unit) - 1) for unit in paired) / n
    return 1 - observed / (_different_pairs(everything) / (n * (n - 1)))


def _different_pairs(values: Sequence[Hashable]) -> int:
    return len(values) ** 2 - sum(count**2 for count in Counter(values).values())


def exact_agreement(units: Sequence[Sequence[Hashable]]) -> float | None:
    """The share of equal ones among the pairs of values of one thing, things counting the same; None without any."""
    shares = [1 - _different_pairs(unit) / (len(unit) * (len(unit) - 1)) for unit in units if len(unit) > 1]
    return float(np.mean(shares)) if shares else None
