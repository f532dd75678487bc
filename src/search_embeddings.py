"""
Find the rows nearest to a text, or all pairs of near-duplicates, in a folder of embeddings. From the repository root:
uv run -m src.search_embeddings --embeddings_dir data/experiments/embedded --query "a ship in a storm" \
    --output_dir data/experiments/ships
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.common.cli import run_command
from src.common.errors import InputError
from src.common.experiment_config import RunConfigBase
from src.common.files import write_json_atomic
from src.common.jsonl import round_fields, write_jsonl_atomic
from src.common.results import FILE_NAME
from src.common.rows import read_prompts
from src.common.runs import Run, start_run
from src.common.settings import require_at_least_one, setting

if TYPE_CHECKING:
    from src.embedding.searching import Query
    from src.embedding.shards_reading import Embeddings

PAIRS = "pairs.jsonl"
SHOWN_PAIRS = 10


@dataclass(kw_only=True)
class SearchEmbeddingsConfig(RunConfigBase):
    """The search"""

    embeddings_dir: Path
    """A folder of src.embed_dataset."""
    query: list[str] | None = None
    """Texts; the model that made the shards embeds them."""
    query_path: Path | None = None
    """A file of texts: prompts in any of their formats."""
    query_embeddings_dir: Path | None = None
    """Texts that src.embed_dataset has embedded by the same model."""
    query_prompt: str | None = None
    """Put before each text, for models whose queries need another prompt than the rows had; none is the rows' own."""
    top_k: int = 10
    """Rows to find for each text."""
    pairs: bool = False
    """Find all pairs of rows that are nearly equal instead."""
    min_cosine: float = 0.95
    """Least cosine of such a pair."""
    max_pairs: int = 100_000
    """Pairs to write, the nearest first; all are counted."""
    engine: str = setting("numpy", choices=("numpy", "faiss"), affects_rows=False)
    """What looks through the rows; both are exact, and faiss must be installed."""
    verify: bool = setting(True, affects_rows=False)
    """Compare every shard with its sha256 first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("query", "query_path", "query_embeddings_dir", "pairs")
        asked = [f"--{name}" for name in names if getattr(self, name)]
        if len(asked) != 1:
            told = " and ".join(asked) or "none of them"
            raise InputError(f"{told}; expected one of --query, --query_path, --query_embeddings_dir and --pairs")
        if not -1 <= self.min_cosine <= 1:
            raise InputError(f"--min_cosine {self.min_cosine}: expected -1 to 1")
        require_at_least_one(self, ("top_k", "max_pairs"))
        if any(not text.strip() for text in self.query or []):
            raise InputError("--query: an empty text; expected some words")


def main(config: SearchEmbeddingsConfig) -> None:
    from src.embedding.searching import Query, embedded_queries
    from src.embedding.shards_reading import open_embeddings

    # 1. Everything that can be wrong without a model.
    embeddings = open_embeddings(config.embeddings_dir, config.verify)
    inputs, queries, vectors = [*embeddings.inputs], [], None
    if config.query:
        queries = [Query(str(number), text) for number, text in enumerate(config.query)]
    elif config.query_path:
        queries = [Query(prompt.id, prompt.text) for prompt in read_prompts(config.query_path)]
        inputs.append(config.query_path)
    elif config.query_embeddings_dir:
        others = open_embeddings(config.query_embeddings_dir, config.verify)
        queries, vectors = embedded_queries(others, embeddings)
        inputs += others.inputs

    # 2. The run folder, then pairs or nearest rows.
    with start_run(config, "search_embeddings", inputs=inputs) as run:
        run.record(embedding_model=embeddings.model, dim=embeddings.dim, precision=embeddings.precision)
        if config.pairs:
            write_pairs(config, run, embeddings)
        else:
            write_nearest(config, run, embeddings, queries, vectors)


def write_nearest(
    config: SearchEmbeddingsConfig, run: Run, embeddings: "Embeddings", queries: Sequence["Query"], vectors: Any
) -> None:
    """Embed the texts where they are not yet, look through the rows, write and print what is nearest."""
    from src.embedding.searching import faiss_knn, one_line, search, search_rows

    knn = faiss_knn() if config.engine == "faiss" else None
    if vectors is None:
        from src.embedding.query_encoder import encode_queries

        vectors = encode_queries([query.text for query in queries], embeddings, config.query_prompt)
    rows = search_rows(embeddings, queries, search(embeddings, vectors, config.top_k, knn))
    rows = [round_fields(row, ["cosine"]) for row in rows]
    write_jsonl_atomic(run.path(FILE_NAME), rows)
    for row in rows:
        if row["rank"] == 1:
            print(f"\n{row['query'] or row['query_id']}")
        print(f"  {row['cosine']:+.4f}  {row['row_id']}  {one_line(row.get('text'))}")
    run.finish({FILE_NAME: f"the {config.top_k} nearest rows of each of {len(queries)} texts, by cosine"})


def write_pairs(config: SearchEmbeddingsConfig, run: Run, embeddings: "Embeddings") -> None:
    """Find, write and print the pairs."""
    from src.embedding.searching import find_pairs, one_line

    found = find_pairs(embeddings, config.min_cosine, config.max_pairs)
    rows = [round_fields(row, ["cosine"]) for row in found.rows]
    write_jsonl_atomic(run.path(PAIRS), rows)
    told = {
        "n_rows": embeddings.rows,
        "n_pairs": found.n_pairs,
        "n_written": len(rows),
        "min_cosine": config.min_cosine,
    }
    write_json_atomic(run.path("summary.json"), {"pairs": told})
    for row in rows[:SHOWN_PAIRS]:
        print(f"{row['cosine']:+.4f}  {row['row_id_a']}  {one_line(row.get('text_a'))}")
        print(f"         {row['row_id_b']}  {one_line(row.get('text_b'))}")
    phrase = f"pairs of {embeddings.rows} rows with a cosine of {config.min_cosine} or more"
    if len(rows) < found.n_pairs:
        print(f"note: {found.n_pairs} {phrase}; only the nearest {len(rows)} are written", file=sys.stderr)
    run.finish({PAIRS: f"{len(rows)} of {found.n_pairs} {phrase}", "summary.json": "their number"})


if __name__ == "__main__":
    run_command(main, SearchEmbeddingsConfig)
