"""
How often the 95 % interval of a covariance trace holds the true value, beside plain percentiles of the same bootstrap;
rows are normal with a part that a cluster shares. About a minute on one CPU core:
uv run python scripts/acceptance/covariance_intervals.py
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from src.ops.covariance_trace import ClusterSums, covariance_trace, trace_interval  # noqa: E402

N_TRIALS, N_RESAMPLES, WITHIN = 400, 500, 0.5
CASES = [(5, 1, 8), (10, 1, 8), (20, 1, 64), (20, 3, 8), (86, 1, 384), (86, 3, 384)]


def sums_of(generator: np.random.Generator, n_clusters: int, per_cluster: int, dim: int) -> ClusterSums:
    shared = generator.normal(size=(n_clusters, 1, dim))
    rows = shared + WITHIN * generator.normal(size=(n_clusters, per_cluster, dim))
    return ClusterSums(np.full(n_clusters, per_cluster), rows.sum(axis=1), np.square(rows).sum(axis=(1, 2)))


def percentiles(rows: ClusterSums, seed: int) -> tuple[float, float]:
    """The interval without the division by the resamples' mean."""
    n_clusters = len(rows.counts)
    times = np.random.default_rng(seed).multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=N_RESAMPLES)
    n = times @ rows.counts
    traces = (times @ rows.squares - np.square(times @ rows.sums).sum(axis=1) / n) / (n - 1)
    low, high = np.percentile(traces, [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    for n_clusters, per_cluster, dim in CASES:
        generator, n = np.random.default_rng(0), n_clusters * per_cluster
        # What covariance_trace estimates: see its docstring.
        truth = dim * (WITHIN**2 + (n - per_cluster) / (n - 1))
        held = np.zeros(2)
        ratio = []
        for seed in range(N_TRIALS):
            rows = sums_of(generator, n_clusters, per_cluster, dim)
            ratio.append(covariance_trace(rows) / truth)
            for i, (low, high) in enumerate((trace_interval(rows, seed, N_RESAMPLES), percentiles(rows, seed))):
                held[i] += low <= truth <= high
        told = f"{n_clusters} clusters of {per_cluster}, {dim} dimensions: mean estimate / truth {np.mean(ratio):.4f}"
        print(f"{told}, held {held[0] / N_TRIALS:.3f}, by plain percentiles {held[1] / N_TRIALS:.3f}", flush=True)


if __name__ == "__main__":
    main()
