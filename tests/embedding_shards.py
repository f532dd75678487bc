"""Folders of embedding shards as src.embed_dataset writes them, made of given vectors and rows."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from src.common.files import sha256_file

TYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8}


def write_shards(
    folder: Path, vectors: np.ndarray, rows: Sequence[dict[str, Any]], cuts: Sequence[int] = (),
    precision: str = "float32", model: str = "bundled:minilm", settings: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """
    vectors: float (n, dim), bits as positive and negative. rows: n of {"id", "text", "metadata": {…}}, text optional.
    cuts: the rows before which a new shard begins.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed, bounds = [], [0, *cuts, len(vectors)]
    for number, (start, end) in enumerate(pairwise(bounds)):
        path = folder / f"shard-{number:05d}.parquet"
        write_shard(path, vectors[start:end], rows[start:end], start, precision, model)
        listed.append({"shard": path.name, **json.loads(path.with_suffix(".json").read_text())})
    manifest = {"complete": True, "shards": listed, "settings": settings or {"model_id": model, "prompt": ""}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write_shard(path: Path, vectors: np.ndarray, rows: Sequence[dict], start: int, precision: str, model: str) -> None:
    """One shard and its sidecar."""
    dim = vectors.shape[1]
    stored = np.packbits(vectors > 0, axis=1) if precision == "binary" else vectors.astype(TYPES[precision])
    flat = pa.array(stored.reshape(-1))
    columns = {
        "id": [str(row["id"]) for row in rows],
        "row_index": pa.array(range(start, start + len(rows)), pa.int64()),
        "metadata": [json.dumps(row.get("metadata", {})) for row in rows],
        "chunk_index": pa.array([row.get("chunk_index", 0) for row in rows], pa.int32()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, stored.shape[1]),
        "model": pa.array([model] * len(rows), pa.string()),
    }
    if rows and "text" in rows[0]:
        columns["text"] = [row["text"] for row in rows]
    pq.write_table(pa.table(columns), path, row_group_size=1000)
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    sidecar = {
        "rows": len(rows), "sha256": sha256_file(path), "dim": dim, "precision": precision, "seconds": 0.1,
        "norm_min": float(norms.min()) if len(norms) else None, "norm_max": float(norms.max()) if len(norms) else None,
    }  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(sidecar))


def unit_vectors(n: int, dim: int, seed: int = 0) -> np.ndarray:
    """float32 (n, dim), directions drawn evenly."""
    drawn = np.random.default_rng(seed).normal(size=(n, dim))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
