"""
Whether stored vectors are those of their texts: random rows are read back, their texts taken from the dataset anew,
embedded one by one in float32 by the library itself, and compared.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.common.errors import CheckFailed
from src.common.jsonl import round_measured
from src.embedding.loading import Pieces
from src.embedding.precisions import agreement, shortened
from src.embedding.reading import Source
from src.embedding.settings import EmbedSettings
from src.embedding.texts import read_texts

BARS = {"int8": 0.99, "binary": 0.98}
"""Least agreement: the cosine of int8 vectors, the share of equal bits of binary ones; 0.999 of all others."""
BAR = 0.999
Reference = Callable[[str], np.ndarray]
"""A text's vector, (dim,) float32, by the library itself."""


class _Stored(NamedTuple):
    shard: str
    row_index: int
    chunk_index: int
    text: str | None
    vector: np.ndarray


def verify_shards(
    folder: Path,
    sidecars: Sequence[dict[str, Any]],
    source: Source,
    settings: EmbedSettings,
    pieces_of: Pieces,
    reference: Reference,
) -> dict[str, Any]:
    """
    Compares up to `settings.verify` random stored rows; returns {"rows", "least", "bar", "row_index"}, the last that of
    the worst. Raises CheckFailed below the bar, and where a stored text is not the dataset's.
    """
    stored = _draw(folder, sidecars, settings)
    # A hub dataset would have to be streamed once more: there the stored text has to do.
    texts = {} if source.hub and settings.store_text else _source_texts(source, settings, stored)
    bar = BARS.get(settings.precision, BAR)
    least, worst = 1.0, None
    for row in stored:
        wanted = _wanted(row, texts.get(row.row_index), settings, pieces_of, reference)
        vector = shortened(wanted[None], settings.truncate_dim, settings.normalize)[0]
        found = agreement(row.vector, vector, settings.precision)
        if worst is None or not found >= least:
            least, worst = found, row
    if worst is not None and not least >= bar:
        raise CheckFailed(
            f"row {worst.row_index} in {folder / worst.shard}: its vector agrees with the float32 one of its text to "
            f"{least:.5f} only, and at least {bar} is expected; try --dtype float32 or another --backend"
        )
    return {"rows": len(stored), "least": round_measured(least) if stored else None, "bar": bar,
            "row_index": worst.row_index if worst else None}  # fmt: skip


def _draw(folder: Path, sidecars: Sequence[dict[str, Any]], settings: EmbedSettings) -> list[_Stored]:
    total = sum(sidecar["rows"] for sidecar in sidecars)
    chosen = sorted(random.Random(settings.seed).sample(range(total), min(settings.verify, total)))
    found, first = [], 0
    for sidecar in sidecars:
        own = [position - first for position in chosen if first <= position < first + sidecar["rows"]]
        found += _read(folder / sidecar["shard"], own) if own else []
        first += sidecar["rows"]
    return found


def _read(path: Path, positions: list[int]) -> list[_Stored]:
    import pyarrow.parquet

    columns = ["row_index", "chunk_index", "embedding", "text"]
    present = pyarrow.parquet.read_schema(path).names
    table = pyarrow.parquet.read_table(path, columns=[name for name in columns if name in present])
    rows = table.take(positions)
    dtype = rows.schema.field("embedding").type.value_type.to_pandas_dtype()
    return [
        _Stored(path.name, row["row_index"], row["chunk_index"], row.get("text"), np.array(row["embedding"], dtype))
        for row in rows.to_pylist()
    ]


def _source_texts(source: Source, settings: EmbedSettings, stored: Sequence[_Stored]) -> dict[int, str]:
    stream, texts, passed = source.open(), {}, 0
    for row_index in sorted({row.row_index for row in stored}):
        stream.skip(row_index - passed)
        found, _, _ = read_texts(stream.take(1), row_index, settings)
        if not found:
            raise CheckFailed(f"row {row_index} of {settings.dataset_path} has no text now; the dataset has changed")
        texts[row_index], passed = found[0].text, row_index + 1
    return texts


def _wanted(
    row: _Stored, text: str | None, settings: EmbedSettings, pieces_of: Pieces, reference: Reference
) -> np.ndarray:
    whole = text if text is not None else row.text
    assert whole is not None
    if settings.chunk_tokens is None or (text is None and not settings.pool_chunks):
        slices, weights = [whole], [1]
    else:
        pieces = pieces_of([whole])
        pieces = pieces if settings.pool_chunks else [pieces[row.chunk_index]]
        slices = [whole[piece.start : piece.stop] for piece in pieces]
        weights = [len(piece.token_ids) for piece in pieces]
    expected = whole if settings.pool_chunks else slices[0]
    if row.text is not None and row.text != expected:
        raise CheckFailed(f"row {row.row_index} in {row.shard}: the stored text is not the dataset's")
    return np.average([reference(each) for each in slices], axis=0, weights=weights).astype(np.float32)
