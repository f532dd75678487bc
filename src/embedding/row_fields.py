"""The fields by which embedded rows are grouped and coloured: those of a results file, or what the shards hold."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.common.errors import InputError
from src.common.jsonl import read_jsonl
from src.embedding.shards_reading import Block, Embeddings, metadata_of

OWN_COLUMNS = ("source", "dataset", "split", "n_tokens", "truncated", "chunk_index")
JOINT = "+"


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """id → row of a JSONL file. Raises InputError for a row without an id, or with one that is there twice."""
    rows: dict[str, dict[str, Any]] = {}
    for number, row in read_jsonl(path):
        if "id" not in row or str(row["id"]) in rows:
            raise InputError(f"{path}:{number}: a row without an id or twice; expected each id once")
        rows[str(row["id"])] = row
    return rows


def rows_with_fields(
    embeddings: Embeddings, results: Mapping[str, dict[str, Any]] | None, also: Sequence[str] = ()
) -> Iterator[tuple[Block, list[dict[str, Any]]]]:
    """
    Each block with the fields of its rows: those of `results` (id → row) where it is given, else the row's metadata and
    the shards' own columns. also: further columns of the block. Raises InputError for an embedded id that is not in
    `results`.
    """
    own = [name for name in OWN_COLUMNS if name in embeddings.columns] if results is None else []
    metadata = ["metadata"] if results is None and "metadata" in embeddings.columns else []
    for block in embeddings.blocks(list(dict.fromkeys(["id", *also, *own, *metadata]))):
        ids = block.columns["id"]
        if results is not None:
            yield block, [_joined(results, row_id, embeddings.folder) for row_id in ids]
            continue
        owned = [{name: block.columns[name][i] for name in own} for i in range(len(ids))]
        texts = block.columns["metadata"] if metadata else [None] * len(ids)
        # What the source says wins: a field of its own may well be called `source`.
        yield block, [ours | metadata_of(text) for ours, text in zip(owned, texts, strict=True)]


def _joined(results: Mapping[str, dict[str, Any]], row_id: str, folder: Path) -> dict[str, Any]:
    if row_id not in results:
        raise InputError(f"{folder}: row {row_id!r} is not in --results_path; expected the file that was embedded")
    return results[row_id]


def value_of(fields: Mapping[str, Any], name: str, row_id: str) -> str:
    """
    The value of a field, or of several (`persona+turn`), as one word. Raises InputError for a row without the field,
    with the fields that it has.
    """
    words = []
    for part in name.split(JOINT):
        if part not in fields:
            raise InputError(f"row {row_id!r} has no field {part!r}; expected some of: {', '.join(sorted(fields))}")
        value = fields[part]
        words.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return f" {JOINT} ".join(words)
