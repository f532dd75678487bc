"""How far the embeddings of a group of rows spread: sums while the shards stream by, a table row a group."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from src.common.errors import InputError
from src.common.results import make_id
from src.embedding.row_fields import rows_with_fields, value_of
from src.embedding.shards_reading import FLOATS, Embeddings
from src.ops.covariance_trace import ClusterSums, covariance_trace, trace_interval, within_cluster_trace

MEASURED = ("trace", "ci_low", "ci_high", "within_cluster_trace", "mean_norm")
OVERALL = "overall"
Row = dict[str, Any]


class GroupSums:
    """The sums of one group, by cluster. The origin is its first row, so that a common offset cancels no digits."""

    def __init__(self, origin: np.ndarray) -> None:
        self.origin = origin
        self.norms = 0.0
        self._of_cluster: dict[str, tuple[int, np.ndarray, float]] = {}

    def add(self, vector: np.ndarray, cluster: str) -> None:
        """vector: float64 (dim,). One row at a time, so that no sum depends on how rows are cut into shards."""
        x = vector - self.origin
        count, total, squares = self._of_cluster.get(cluster, (0, 0.0, 0.0))
        self._of_cluster[cluster] = (count + 1, total + x, squares + float((x * x).sum()))
        self.norms += float(np.sqrt((vector * vector).sum()))

    def sums(self) -> ClusterSums:
        counts, sums, squares = zip(*self._of_cluster.values(), strict=True)
        return ClusterSums(np.array(counts, dtype=np.int64), np.stack(sums), np.array(squares))


def variance_rows(
    embeddings: Embeddings,
    results: Mapping[str, Row] | None,
    groupings: Sequence[str],
    cluster_by: str,
    seed: int,
) -> list[Row]:
    """
    A row for each group of each grouping, then one for all rows together; groups in the order of first appearance.

    cluster_by: the field whose rows are not independent, or `id` for rows that all are. Raises InputError for a
    missing field, an id that is there twice (chunks of one text), and vectors of int8 or bits.
    """
    if embeddings.precision not in FLOATS:
        raise InputError(f"{embeddings.folder}: vectors of {embeddings.precision}; expected {', '.join(FLOATS)}: "
                         f"the covariance of rounded codes is not that of the vectors")  # fmt: skip
    groups: dict[tuple[str, str], GroupSums] = {}
    seen: set[str] = set()
    for block, fields in rows_with_fields(embeddings, results):
        vectors = block.vectors.astype(np.float64)
        for i, row_id in enumerate(block.columns["id"]):
            _refuse_twice(embeddings, row_id, seen)
            cluster = row_id if cluster_by == "id" else value_of(fields[i], cluster_by, row_id)
            for key in _keys(fields[i], groupings, row_id):
                groups.setdefault(key, GroupSums(vectors[i].copy())).add(vectors[i], cluster)
    missing = _without_embedding(results, seen, groupings)
    # A stable sort: within a grouping the order stays that of first appearance.
    keys = sorted(dict.fromkeys([*groups, *missing]), key=lambda key: [*groupings, OVERALL].index(key[0]))
    return [_row(key, groups.get(key), missing.get(key, 0), seed) for key in keys]


def _keys(fields: Mapping[str, Any], groupings: Sequence[str], row_id: str) -> list[tuple[str, str]]:
    return [*((name, value_of(fields, name, row_id)) for name in groupings), (OVERALL, OVERALL)]


def _refuse_twice(embeddings: Embeddings, row_id: str, seen: set[str]) -> None:
    if row_id in seen:
        raise InputError(f"{embeddings.folder}: several vectors of row {row_id!r}, chunks of a long text; expected one "
                         f"a row: embed with --pool_chunks or without --chunk_tokens")  # fmt: skip
    seen.add(row_id)


def _without_embedding(
    results: Mapping[str, Row] | None, seen: set[str], groupings: Sequence[str]
) -> dict[tuple[str, str], int]:
    counts: dict[tuple[str, str], int] = {}
    for row_id, row in (results or {}).items():
        for key in _keys(row, groupings, row_id) if row_id not in seen else []:
            counts[key] = counts.get(key, 0) + 1
    return counts


def _row(key: tuple[str, str], group: GroupSums | None, n_missing: int, seed: int) -> Row:
    grouping, name = key
    row = {"id": make_id(grouping, name), "grouping": grouping, "group": name}
    if group is None:
        return row | {"n": 0, "n_clusters": 0, "n_without_embedding": n_missing} | dict.fromkeys(MEASURED)
    sums = group.sums()
    n = int(sums.counts.sum())
    low, high = trace_interval(sums, seed) or (None, None)
    return row | {
        "n": n,
        "n_clusters": len(sums.counts),
        "n_without_embedding": n_missing,
        "trace": covariance_trace(sums),
        "ci_low": low,
        "ci_high": high,
        "within_cluster_trace": within_cluster_trace(sums),
        "mean_norm": group.norms / n,
    }
