"""How good probabilities of an event are. Numpy only; AUC is `direction_scores.auc`."""

from collections.abc import Sequence

import numpy as np

N_BINS = 10


def brier(probabilities: Sequence[float], labels: Sequence[int]) -> float:
    """Mean squared distance of the probability from what happened, 0 or 1 (Brier 1950)."""
    p, y = _checked(probabilities, labels)
    return float(((p - y) ** 2).mean())


def calibration_error(probabilities: Sequence[float], labels: Sequence[int], n_bins: int = N_BINS) -> float:
    """
    Expected calibration error: over bins of equal width, |mean probability − share of events| weighted by size (Guo et
    al. 2017). A probability on a border counts to the bin above, 1 to the last.
    """
    p, y = _checked(probabilities, labels)
    bins = np.minimum((p * n_bins).astype(int), n_bins - 1)
    gaps = np.bincount(bins, weights=p, minlength=n_bins) - np.bincount(bins, weights=y, minlength=n_bins)
    return float(np.abs(gaps).sum() / len(p))


def _checked(probabilities: Sequence[float], labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if not len(p) or p.shape != y.shape or not ((p >= 0) & (p <= 1)).all() or not np.isin(y, (0, 1)).all():
        raise ValueError(f"{len(p)} probabilities and {len(y)} labels; expected as many of each, in [0, 1] and 0 or 1")
    return p, y
