"""Embeddings in two dimensions, their clusters, and how far the picture can be trusted."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from src.common.errors import InputError
from src.common.row_hash import choose_rows
from src.common.umap_map import umap_coordinates
from src.embedding.row_fields import rows_with_fields
from src.embedding.shards_reading import FLOATS, Embeddings
from src.ops.top_rows import unit_rows

AXES = {"umap": "UMAP", "pca": "principal component", "tsne": "t-SNE"}
LEAST_ROWS = 4
MOST_TRUSTED = 3000
"""Trustworthiness compares all distances of a sample of at most this many rows."""
NEIGHBORS = 10


class Points(NamedTuple):
    """The rows to draw, in order."""

    vectors: np.ndarray
    """float32 (n, dim)."""
    ids: list[str]
    """`id`, or `id#chunk` for later chunks of a text."""
    texts: list[str | None]
    fields: list[dict[str, Any]]


def load_points(
    embeddings: Embeddings, results: Mapping[str, dict[str, Any]] | None, count: int | None, seed: int, metric: str
) -> Points:
    """
    All rows, or `count` of them chosen by a hash; scaled to length 1 where the metric is cosine. Raises InputError for
    fewer than LEAST_ROWS, a `count` that is more than there are, and Euclidean distances of int8 or bits.
    """
    if metric == "euclidean" and embeddings.precision not in FLOATS:
        raise InputError(
            f"--metric euclidean: {embeddings.folder} holds {embeddings.precision}; expected --metric cosine"
        )
    if count is not None and count > embeddings.rows:
        raise InputError(f"--num_rows {count}: {embeddings.folder} has {embeddings.rows}; leave it out for all of them")
    chosen = None if count is None else set(choose_rows(seed, embeddings.rows, count))
    points = Points(np.empty((count or embeddings.rows, embeddings.dim), dtype=np.float32), [], [], [])
    if len(points.vectors) < LEAST_ROWS:
        raise InputError(f"{embeddings.folder}: {len(points.vectors)} rows; expected at least {LEAST_ROWS}")
    also = [name for name in ("text", "chunk_index") if name in embeddings.columns]
    for block, fields in rows_with_fields(embeddings, results, also):
        columns = block.columns
        kept = [i for i in range(len(fields)) if chosen is None or block.start + i in chosen]
        vectors = block.vectors[kept]
        points.vectors[len(points.ids) : len(points.ids) + len(kept)] = (
            unit_rows(vectors) if metric == "cosine" else vectors
        )
        for i in kept:
            chunk = columns["chunk_index"][i] if "chunk_index" in columns else 0
            points.ids.append(f"{columns['id'][i]}#{chunk}" if chunk else columns["id"][i])
            points.texts.append(columns["text"][i] if "text" in columns else None)
            points.fields.append(fields[i])
    return points


def check_fit(n_rows: int, method: str, n_neighbors: int, perplexity: float, num_clusters: int) -> None:
    """Raises InputError for settings that so few rows do not bear."""
    for name, value in (
        ("n_neighbors", n_neighbors if method == "umap" else 0),
        ("perplexity", perplexity if method == "tsne" else 0),
    ):
        if value >= n_rows:
            raise InputError(f"--{name} {value}: there are {n_rows} rows; expected fewer than that")
    if num_clusters > n_rows:
        raise InputError(f"--num_clusters {num_clusters}: there are {n_rows} rows; expected at most so many")


def reduce(
    vectors: np.ndarray, method: str, seed: int, n_neighbors: int, min_dist: float, perplexity: float
) -> tuple[np.ndarray, dict[str, float]]:
    """
    Coordinates float64 (n, 2) and what the method tells of them. UMAP (McInnes, Healy and Melville 2018), t-SNE (van
    der Maaten and Hinton 2008) from a PCA start, or the first two principal components; Euclidean distances.
    """
    if method == "umap":
        return umap_coordinates(vectors, seed, n_neighbors, min_dist=min_dist), {}
    if method == "tsne":
        from sklearn.manifold import TSNE

        fitted = TSNE(perplexity=perplexity, random_state=seed, init="pca")
        return fitted.fit_transform(vectors).astype(np.float64), {"kl_divergence": float(fitted.kl_divergence_)}
    from sklearn.decomposition import PCA

    fitted = PCA(n_components=2, svd_solver="full" if len(vectors) < vectors.shape[1] else "covariance_eigh")
    coordinates = fitted.fit_transform(vectors.astype(np.float64))
    share = fitted.explained_variance_ratio_
    return coordinates, {"variance_share_1": float(share[0]), "variance_share_2": float(share[1])}


def clusters_of(
    vectors: np.ndarray, method: str, num_clusters: int, min_cluster_size: int, seed: int
) -> list[int | None]:
    """
    The cluster of each row, found among the vectors and not in the picture: 0 is the largest; None where HDBSCAN calls
    a row noise, and for all with `none`. Raises InputError for more clusters than distinct rows.
    """
    if method == "none":
        return [None] * len(vectors)
    from sklearn.cluster import HDBSCAN, KMeans

    if method == "kmeans":
        n_distinct = len(np.unique(vectors, axis=0))
        if n_distinct < num_clusters:
            raise InputError(f"--num_clusters {num_clusters}: the rows have {n_distinct} different vectors")
        labels = KMeans(num_clusters, n_init=10, random_state=seed).fit_predict(vectors)
    else:
        labels = HDBSCAN(min_cluster_size=min(min_cluster_size, len(vectors)), copy=True).fit_predict(vectors)
    found, first, counts = np.unique(labels[labels >= 0], return_index=True, return_counts=True)
    ranked = sorted(range(len(found)), key=lambda i: (-counts[i], first[i]))
    renamed = {int(found[i]): place for place, i in enumerate(ranked)}
    return [renamed.get(int(label)) for label in labels]


def trust(vectors: np.ndarray, coordinates: np.ndarray, seed: int) -> float | None:
    """
    Trustworthiness of the picture with 10 neighbours (Venna and Kaski 2001), on at most MOST_TRUSTED rows: 1 where
    points that look near are near, about 0.5 for points at random. None for too few rows.
    """
    from sklearn.manifold import trustworthiness

    chosen = choose_rows(seed, len(vectors), min(len(vectors), MOST_TRUSTED))
    if len(chosen) <= 2 * NEIGHBORS:
        return None
    return float(trustworthiness(vectors[chosen], coordinates[chosen], n_neighbors=NEIGHBORS))
