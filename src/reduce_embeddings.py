"""
Draw embeddings in two dimensions, with clusters, on a page to hover over, filter and colour by any column. From the
repository root:
uv run -m src.reduce_embeddings --embeddings_dir data/experiments/embedded \
    --output_dir data/experiments/map
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.common.cli import run_command
from src.common.errors import InputError
from src.common.experiment_config import RunConfigBase
from src.common.files import write_json_atomic, write_text_atomic
from src.common.jsonl import round_fields, round_measured, write_jsonl_atomic
from src.common.results import FILE_NAME
from src.common.runs import start_run
from src.common.settings import setting, to_json

if TYPE_CHECKING:
    from src.embedding.reducing import Points

REPORT, SUMMARY = "report.html", "summary.json"


@dataclass(kw_only=True)
class ReduceEmbeddingsConfig(RunConfigBase):
    """The map"""

    embeddings_dir: Path
    """A folder of src.embed_dataset."""
    results_path: Path | None = None
    """The JSONL that was embedded, for its fields, where the shards do not hold them."""
    method: str = setting("umap", choices=("umap", "pca", "tsne"))
    """UMAP, the first two principal components, or t-SNE."""
    metric: str = setting("cosine", choices=("cosine", "euclidean"))
    """cosine scales every vector to length 1 first; distances are Euclidean then."""
    n_neighbors: int = 15
    """UMAP: how many neighbours make a row's neighbourhood."""
    min_dist: float = 0.1
    """UMAP: how close points may lie."""
    perplexity: float = 30.0
    """t-SNE: about how many neighbours a row has."""
    cluster_method: str = setting("kmeans", choices=("kmeans", "hdbscan", "none"))
    """Clusters are of the vectors, not of the picture."""
    num_clusters: int = 8
    """k-means: how many."""
    min_cluster_size: int = 10
    """HDBSCAN: rows of the smallest."""
    num_rows: int | None = setting(None, aliases=("num_tasks",))
    """Only so many rows, chosen by a hash of seed and row."""
    color_by: str | None = setting(None, affects_rows=False)
    """Column that the page is coloured by when it opens; none is the cluster."""
    max_points: int = setting(10_000, affects_rows=False)
    """Most points on the page, chosen as with --num_rows; the rows file has all."""
    verify: bool = setting(True, affects_rows=False)
    """Compare every shard with its sha256 first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"n_neighbors": 2, "perplexity": 1, "num_clusters": 2, "min_cluster_size": 2, "max_points": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InputError(f"--{name} {getattr(self, name)}: expected at least {value}")
        if not 0 <= self.min_dist <= 1:
            raise InputError(f"--min_dist {self.min_dist}: expected 0 to 1")


def main(config: ReduceEmbeddingsConfig) -> None:
    from src.embedding.reducing import AXES, check_fit, clusters_of, load_points, reduce, trust
    from src.embedding.row_fields import read_results
    from src.embedding.scatter import column_names
    from src.embedding.shards_reading import open_embeddings

    # 1. The shards, the rows' fields, and whether the settings fit them.
    embeddings = open_embeddings(config.embeddings_dir, config.verify)
    results = read_results(config.results_path) if config.results_path else None
    points = load_points(embeddings, results, config.num_rows, config.seed, config.metric)
    n_clusters = config.num_clusters if config.cluster_method == "kmeans" else 0
    check_fit(len(points.ids), config.method, config.n_neighbors, config.perplexity, n_clusters)
    names = column_names([{"metadata": fields} for fields in points.fields])
    color_by = config.color_by or ("cluster" if config.cluster_method != "none" else None)
    if color_by and color_by not in names:
        raise InputError(f"--color_by {color_by}: no such column; expected one of: {', '.join(names)}")

    # 2. Coordinates, clusters, and how far to trust them.
    inputs = [*embeddings.inputs, *([config.results_path] if config.results_path else [])]
    with start_run(config, "reduce_embeddings", inputs=inputs) as run:
        run.record(embedding_model=embeddings.model, dim=embeddings.dim, precision=embeddings.precision)
        coordinates, told = reduce(points.vectors, config.method, config.seed, config.n_neighbors, config.min_dist,
                                   config.perplexity)  # fmt: skip
        clusters = clusters_of(points.vectors, config.cluster_method, config.num_clusters, config.min_cluster_size,
                               config.seed)  # fmt: skip
        told["trustworthiness"] = trust(points.vectors, coordinates, config.seed)
        about = {"rows": len(points.ids), "rows_embedded": embeddings.rows}
        about |= {name: round_measured(value) for name, value in told.items()}

        # 3. Rows, summary, page.
        rows = result_rows(points, coordinates, clusters)
        write_jsonl_atomic(run.path(FILE_NAME), rows)
        write_json_atomic(run.path(SUMMARY), {"map": about, "clusters": cluster_sizes(clusters)})
        write_text_atomic(run.path(REPORT), report(config, rows, about, AXES[config.method], color_by))
        run.finish({
            FILE_NAME: "x, y and cluster of each row",
            SUMMARY: "how far to trust the picture, sizes of the clusters",
            REPORT: "the map; open it in a browser",
        })  # fmt: skip


def result_rows(points: "Points", coordinates: Any, clusters: Sequence[int | None]) -> list[dict[str, Any]]:
    """A row for each point; its own fields stay together under `metadata`, so that none takes the place of ours."""
    rows = []
    for i, (x, y) in enumerate(coordinates.tolist()):
        row = {"id": points.ids[i], "x": x, "y": y, "cluster": clusters[i], "text": points.texts[i]}
        rows.append(round_fields(row, ["x", "y"]) | {"metadata": points.fields[i]})
    return rows


def cluster_sizes(clusters: Sequence[int | None]) -> dict[str, int]:
    """Cluster → its number of rows; those of none are `none`."""
    sizes: dict[str, int] = {}
    for cluster in sorted(clusters, key=lambda each: (each is None, each or 0)):
        name = "none" if cluster is None else str(cluster)
        sizes[name] = sizes.get(name, 0) + 1
    return sizes


def report(
    config: ReduceEmbeddingsConfig,
    rows: Sequence[dict[str, Any]],
    about: dict[str, Any],
    axes: str,
    color_by: str | None,
) -> str:
    """The page; of more rows than it bears a sample, and it says so."""
    from src.common.row_hash import choose_rows
    from src.embedding.scatter import scatter_page

    shown = rows
    if len(rows) > config.max_points:
        shown = [rows[i] for i in choose_rows(config.seed, len(rows), config.max_points)]
        print(f"note: the page shows {len(shown)} of {len(rows)} rows; {FILE_NAME} has all", file=sys.stderr)
    about = {"points shown": len(shown)} | about
    settings = {name: value for name, value in to_json(config).items() if name != "datetime_str"}
    return scatter_page(f"{config.embeddings_dir} by {config.method}", shown, axes, color_by, about, settings)


if __name__ == "__main__":
    run_command(main, ReduceEmbeddingsConfig)
