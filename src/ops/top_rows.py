"""
Exact nearest rows and near-equal pairs by cosine, block by block. A fast float32 product finds the rows that can matter
(its rounding is bounded), a float64 product decides. Numpy only.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

DECIMALS = 9
"""Cosines are compared after rounding to this, so that equal vectors tie wherever they stand, and ids decide."""


EXTRA = 32
"""Rows beyond k that a `knn` is asked for, so that ties at the k-th place show."""
Knn = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""(queries (q, dim), rows (n, dim), k) → inner products (q, k), falling, and places (q, k), all float32 and int."""


class Found(NamedTuple):
    """One row near a query."""

    cosine: float
    key: tuple
    """What decides between equal cosines: the smaller one comes first."""
    place: int
    """Of the row, from 0."""


def rounding_bound(dim: int) -> float:
    """
    How far the float32 inner product of two unit vectors that were themselves rounded can be from the exact one:
    γₙ = n·u / (1 − n·u) with u = 2⁻²⁴ (Higham 2002, §3.1), n = dim for the sum and 4 more for the unit vectors.
    """
    n_units = (dim + 4) * 2.0**-24
    return n_units / (1 - n_units)


def exact_cosines(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosines of rows i of both (n, dim), in float64, rounded to DECIMALS; none depends on the rows beside it."""
    a, b = rows.astype(np.float64), others.astype(np.float64)
    cosines = (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.clip(np.round(cosines, DECIMALS), -1.0, 1.0) + 0.0


class TopRows:
    """The k rows nearest to each of several queries, of all rows added so far."""

    def __init__(self, queries: np.ndarray, k: int, knn: Knn | None = None) -> None:
        """queries: float32 (n_queries, dim), none zero. knn: what finds candidates in a block instead of a product."""
        assert k >= 1 and queries.ndim == 2, f"k is {k}, queries are {queries.shape}"
        self.queries, self.k = queries, k
        self._units, self._knn = unit_rows(queries), knn
        self._margin = rounding_bound(queries.shape[1]) + 10.0**-DECIMALS
        self._best: list[list[Found]] = [[] for _ in queries]

    def add(self, vectors: np.ndarray, keys: Sequence[tuple], start: int) -> None:
        """vectors: float32 (n, dim), rows `start` and on. keys: n, all different, see `Found`."""
        for number, near in enumerate(self._candidates(unit_rows(vectors))):
            if len(near):
                query = np.broadcast_to(self.queries[number], (len(near), self.queries.shape[1]))
                cosines = exact_cosines(vectors[near], query)
                found = [Found(float(c), keys[i], start + int(i)) for c, i in zip(cosines, near, strict=True)]
                self._best[number] = sorted([*self._best[number], *found], key=_order)[: self.k]

    def best(self) -> list[list[Found]]:
        """For each query its nearest rows, the nearest first."""
        return self._best

    def _candidates(self, units: np.ndarray) -> Iterator[np.ndarray]:
        """For each query the places in the block of all rows that are perhaps among its k best."""
        if self._knn is None:
            for number, row in enumerate(self._units @ units.T):
                yield np.flatnonzero(row >= self._threshold(number, row))
            return
        n_asked = min(len(units), self.k + EXTRA)
        for number, (cosines, places) in enumerate(zip(*self._knn(self._units, units, n_asked), strict=True)):
            threshold = self._threshold(number, cosines)
            if n_asked < len(units) and cosines[-1] >= threshold:
                # More rows than were asked for may tie: look at all.
                cosines, places = units @ self._units[number], np.arange(len(units))
            yield places[cosines >= threshold]

    def _threshold(self, number: int, cosines: np.ndarray) -> float:
        """What a float32 product must reach, given those of a block, or the largest k and more of them."""
        best = self._best[number]
        least = best[-1].cosine - self._margin if len(best) == self.k else -np.inf
        if len(cosines) > self.k:
            # Rows of this block alone fill the k places.
            least = max(least, float(np.partition(cosines, -self.k)[-self.k]) - 2 * self._margin)
        return least


def _order(found: Found) -> tuple:
    return (-found.cosine, found.key, found.place)


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """The rows (n, dim) scaled to length 1 in float32; none may be zero."""
    wide = vectors.astype(np.float64)
    return (wide / np.sqrt((wide * wide).sum(axis=1, keepdims=True))).astype(np.float32)


def near_pairs(
    left: np.ndarray, right: np.ndarray, least: float, same: bool
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """
    Yields (i, j, cosines) of rows of `left` and `right`, float32 (n, dim) each, whose cosine is at least `least`.
    same: both are the same rows, so only i < j counts.
    """
    approximate = unit_rows(left) @ unit_rows(right).T
    i, j = np.nonzero(approximate >= least - rounding_bound(left.shape[1]) - 10.0**-DECIMALS)
    if same:
        i, j = i[i < j], j[i < j]
    for part in range(0, len(i), 65_536):
        a, b = i[part : part + 65_536], j[part : part + 65_536]
        cosines = exact_cosines(left[a], right[b])
        held = cosines >= least
        yield a[held], b[held], cosines[held]
