"""Nearest rows and near-equal pairs over a folder of shards, which is streamed and never held."""

import heapq
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from src.common.errors import InputError
from src.common.results import make_id
from src.embedding.shards_reading import ROWS_AT_ONCE, Block, Embeddings, metadata_of
from src.ops.top_rows import Found, Knn, TopRows, near_pairs

KEY = ("id", "chunk_index")
SHOWN = ("row_index", "text", "metadata")
NUMBERS_AT_ONCE = 1 << 24
"""Of the rows that are held while all later rows stream by: 64 MiB of float32."""
TILE = 2048
Row = dict[str, Any]


class Query(NamedTuple):
    id: str
    text: str | None


def embedded_queries(others: Embeddings, embeddings: Embeddings) -> tuple[list[Query], np.ndarray]:
    """
    The rows of `others` as queries and their vectors, float32 (n, dim). Raises InputError unless both folders are of
    one model and dimension.
    """
    made_by = [each.settings.get("model_fingerprint") for each in (embeddings, others)]
    if None not in made_by and made_by[0] != made_by[1]:
        raise InputError(
            f"--query_embeddings_dir {others.folder}: of another model {others.model} than the {embeddings.model} of "
            f"the rows (fingerprint {made_by[1][:12]}, theirs {made_by[0][:12]}); expected the same model"
        )
    # The same weights may go by two names, and a server's model has no fingerprint.
    for name in ("dim",) if None not in made_by else ("model", "dim"):
        ours, theirs = getattr(embeddings, name), getattr(others, name)
        if ours != theirs:
            raise InputError(f"--query_embeddings_dir {others.folder}: {name} {theirs}, the rows have {ours}")
    queries, vectors = [], []
    for block in others.blocks([*_key_columns(others), *(["text"] if "text" in others.columns else [])]):
        vectors.append(block.vectors)
        texts = block.columns.pop("text", [None] * len(block.vectors))
        for key, text in zip(_keys(block), texts, strict=True):
            row_id, chunk = _id_and_chunk(key)
            queries.append(Query(f"{row_id}#{chunk}" if chunk else row_id, text))
    return queries, np.concatenate(vectors)


def search(embeddings: Embeddings, queries: np.ndarray, k: int, knn: Knn | None = None) -> list[list[Found]]:
    """For each query, float32 (n, dim), the k rows of the largest cosine; equal ones in order of id and chunk."""
    top = TopRows(queries, k, knn)
    for block in embeddings.blocks(_key_columns(embeddings)):
        top.add(block.vectors, _keys(block), block.start)
    return top.best()


def search_rows(embeddings: Embeddings, queries: Sequence[Query], best: Sequence[Sequence[Found]]) -> list[Row]:
    """A result row for each hit, query by query, rank from 1."""
    shown = embeddings.rows_at([found.place for hits in best for found in hits], SHOWN)
    rows = []
    for query, hits in zip(queries, best, strict=True):
        for rank, found in enumerate(hits, start=1):
            row_id, chunk = _id_and_chunk(found.key)
            about = {"id": make_id(query.id, row_id, chunk), "query_id": query.id, "query": query.text, "rank": rank}
            rows.append(
                about | {"cosine": found.cosine, "row_id": row_id, "chunk_index": chunk} | _told(shown, found.place)
            )
    return rows


class Pairs(NamedTuple):
    """All pairs of rows at least so near."""

    n_pairs: int
    rows: list[Row]
    """The nearest of them, the nearest first."""


def find_pairs(embeddings: Embeddings, least: float, most: int) -> Pairs:
    """
    The pairs of rows whose cosine is at least `least`; of more than `most` the nearest, equal ones in order of their
    ids. All are counted.
    """
    n_pairs, kept = 0, []
    for pairs in _pairs(embeddings, least):
        n_pairs += len(pairs)
        kept = heapq.nsmallest(most, [*kept, *pairs]) if len(kept) + len(pairs) > most else kept + pairs
    kept.sort()
    shown = embeddings.rows_at([place for pair in kept for place in pair[3:]], SHOWN)
    return Pairs(n_pairs, [_pair_row(pair, shown) for pair in kept])


def _pairs(embeddings: Embeddings, least: float) -> Iterator[list[tuple]]:
    """Lists of (−cosine, key, key, place, place), the smaller key first."""
    for held in _held(embeddings):
        for first in range(0, len(held.vectors), TILE):
            left = _part(held, first)
            yield from _between(left, left, least, same=True)
            for second in range(first + TILE, len(held.vectors), TILE):
                yield from _between(left, _part(held, second), least)
        for block in embeddings.blocks(_key_columns(embeddings), first_row=held.start + len(held.vectors)):
            for first in range(0, len(held.vectors), TILE):
                yield from _between(_part(held, first), block, least)


def _held(embeddings: Embeddings) -> Iterator[Block]:
    rows_held = max(ROWS_AT_ONCE, NUMBERS_AT_ONCE // embeddings.dim)
    gathered: list[Block] = []
    for block in embeddings.blocks(_key_columns(embeddings)):
        gathered.append(block)
        if sum(len(each.vectors) for each in gathered) >= rows_held:
            yield _joined(gathered)
            gathered = []
    if gathered:
        yield _joined(gathered)


def _joined(blocks: Sequence[Block]) -> Block:
    columns = {name: [value for block in blocks for value in block.columns[name]] for name in blocks[0].columns}
    return Block(blocks[0].start, np.concatenate([block.vectors for block in blocks]), columns)


def _part(block: Block, first: int) -> Block:
    columns = {name: values[first : first + TILE] for name, values in block.columns.items()}
    return Block(block.start + first, block.vectors[first : first + TILE], columns)


def _between(left: Block, right: Block, least: float, same: bool = False) -> Iterator[list[tuple]]:
    left_keys, right_keys = _keys(left), _keys(right)
    for i, j, cosines in near_pairs(left.vectors, right.vectors, least, same):
        found = []
        for a, b, cosine in zip(i.tolist(), j.tolist(), cosines.tolist(), strict=True):
            one, other = sorted([(left_keys[a], left.start + a), (right_keys[b], right.start + b)])
            found.append((-cosine, one[0], other[0], one[1], other[1]))
        yield found


def _pair_row(pair: tuple, shown: dict[int, Row]) -> Row:
    cosine, one, other, place, other_place = pair
    ids = [_id_and_chunk(key) for key in (one, other)]
    row = {"id": make_id(*ids[0], *ids[1]), "cosine": -cosine}
    for side, (row_id, chunk), at in (("a", ids[0], place), ("b", ids[1], other_place)):
        told = {"row_id": row_id, "chunk_index": chunk} | _told(shown, at)
        row |= {f"{name}_{side}": value for name, value in told.items()}
    return row


def _told(shown: dict[int, Row], place: int) -> Row:
    row = dict(shown[place])
    return row | ({"metadata": metadata_of(row["metadata"])} if "metadata" in row else {})


def _key_columns(embeddings: Embeddings) -> list[str]:
    return [name for name in KEY if name in embeddings.columns]


def _keys(block: Block) -> list[tuple]:
    return list(zip(*block.columns.values(), strict=True))


def _id_and_chunk(key: tuple) -> tuple[str, int]:
    return (key[0], key[1]) if len(key) > 1 else (key[0], 0)


def one_line(text: str | None, most: int = 90) -> str:
    """The text's beginning, for the terminal: no line breaks, nothing that steers a terminal."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text or "").split())
    return words if len(words) <= most else f"{words[: most - 1]}…"


def faiss_knn() -> Knn:
    """faiss's exhaustive search. Raises InputError where it is not installed."""
    if importlib.util.find_spec("faiss") is None:
        raise InputError("--engine faiss: the package faiss is not installed; `uv pip install faiss-cpu`, or numpy")
    import faiss

    return lambda queries, rows, k: faiss.knn(queries, rows, k, metric=faiss.METRIC_INNER_PRODUCT)
