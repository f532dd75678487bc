"""
One shard on disk: `shard-00000.parquet`, which depends on the data and the settings alone, and beside it, written after
it, `shard-00000.json` with its sha256 and everything that differs from run to run.
"""

import errno
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from src.common.errors import CheckFailed, InputError
from src.common.files import open_atomic, sha256_file, write_json_atomic
from src.common.jsonl import round_measured
from src.common.provenance import now
from src.embedding.precisions import shortened, to_precision
from src.embedding.records import Piece, Shard

if TYPE_CHECKING:
    import pyarrow

PATTERN = "shard-*.json"
FILLING_UP = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Layout(NamedTuple):
    """What is stored of a shard, from the settings."""

    dataset: str
    split: str
    model: str
    precision: str
    truncate_dim: int | None
    normalize: bool
    store_text: bool
    pool_chunks: bool


def shard_name(index: int) -> str:
    """The name of a shard's file without its ending."""
    return f"shard-{index:05d}"


def write_shard(folder: Path, shard: Shard, layout: Layout, facts: dict[str, Any]) -> dict[str, Any]:
    """
    Writes an embedded shard and its sidecar, whole or not at all; returns the sidecar. `facts`: what else goes in it.
    Raises CheckFailed for vectors that are not finite, InputError where the disk is full.
    """
    import pyarrow.parquet

    assert shard.embeddings is not None
    started = time.perf_counter()
    table, measured = shard_table(shard, layout)
    path = folder / f"{shard_name(shard.index)}.parquet"
    try:
        with open_atomic(path, "wb") as file:
            pyarrow.parquet.write_table(
                table, file, compression="zstd", row_group_size=max(1, table.num_rows),
                use_dictionary=["source", "dataset", "split", "model"],
                column_encoding=_encodings(layout.precision),
            )  # fmt: skip
        shard.seconds["write"]["busy"] = round(time.perf_counter() - started, 4)
        sidecar = {
            "shard": path.name, "index": shard.index, "row_start": shard.row_start, "row_stop": shard.row_stop,
            "is_last": shard.is_last, "rows": table.num_rows, "texts": len(shard.texts), "pieces": len(shard.pieces),
            "bad_rows": shard.bad_rows, "sampled_out": shard.sampled_out,
            "bytes": path.stat().st_size, "sha256": sha256_file(path), **measured,
            "tokens": _tokens(shard.pieces), "padded_tokens": shard.padded_tokens,
            "seconds": shard.seconds["encode"]["busy"], "stages": shard.seconds,
            "created_at": now(), **facts,
        }  # fmt: skip
        write_json_atomic(path.with_suffix(".json"), sidecar)
    except OSError as error:
        if error.errno in FILLING_UP:
            raise InputError(
                f"--output_dir {folder}: {error.strerror} while writing {path.name}; make room, and the same command "
                f"goes on from here"
            ) from error
        raise
    return sidecar


def _encodings(precision: str) -> dict[str, str]:
    # The bytes of one place of all numbers together compress well, unlike floats as they stand.
    is_float = precision in ("float32", "float16", "bfloat16")
    return {"embedding.list.element": "BYTE_STREAM_SPLIT"} if is_float else {}


def shard_table(shard: Shard, layout: Layout) -> tuple["pyarrow.Table", dict[str, Any]]:
    """
    The rows as they are stored, in the dataset's order, and what a sidecar says of the vectors (dim, precision,
    coefficient, rows cut off, norm bounds of the float32 vectors). Raises CheckFailed for vectors that are not finite.
    """
    import pyarrow as pa

    pieces, vectors = _pooled(shard) if layout.pool_chunks else (shard.pieces, shard.embeddings)
    _require_finite(shard, pieces, vectors, "--dtype float32")
    vectors = shortened(vectors, layout.truncate_dim, layout.normalize)
    stored, coefficient = to_precision(vectors, layout.precision)
    _require_finite(shard, pieces, stored, "--precision float32 or --normalize")
    placed = _placed(shard, pieces)
    taken = stored[np.array([number for _, number in placed], dtype=np.int64)]
    rows, kept = [row for row, _ in placed], [pieces[number] for _, number in placed]
    has_tokens = all(piece.token_ids is not None for piece in kept)
    columns = {
        "id": pa.array([row.id for row in rows], pa.string()),
        "row_index": pa.array([row.row_index for row in rows], pa.int64()),
        "source": pa.array([row.source for row in rows], pa.string()),
        "dataset": pa.array([layout.dataset] * len(rows), pa.string()),
        "split": pa.array([layout.split] * len(rows), pa.string()),
        **({"text": pa.array([_text(row.text, piece) for row, piece in zip(rows, kept, strict=True)], pa.string())}
           if layout.store_text else {}),
        "metadata": pa.array([row.metadata for row in rows], pa.string()),
        "n_tokens": pa.array([len(p.token_ids) if has_tokens else None for p in kept], pa.int32()),
        "truncated": pa.array([p.truncated if has_tokens else None for p in kept], pa.bool_()),
        "chunk_index": pa.array([p.chunk_index for p in kept], pa.int32()),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(taken.reshape(-1)), stored.shape[1]),
        "model": pa.array([layout.model] * len(rows), pa.string()),
    }  # fmt: skip
    norms = np.linalg.norm(vectors, axis=1)
    measured = {
        "dim": vectors.shape[1], "precision": layout.precision, "coefficient": coefficient,
        "truncated": sum(piece.truncated for piece in kept) if has_tokens else None,
        "norm_min": round_measured(norms.min()) if len(norms) else None,
        "norm_max": round_measured(norms.max()) if len(norms) else None,
    }  # fmt: skip
    return pa.table(columns), measured


def _placed(shard: Shard, pieces: list[Piece]) -> list[tuple[Any, int]]:
    of_text: list[list[int]] = [[] for _ in shard.texts]
    for number, piece in enumerate(pieces):
        of_text[piece.text].append(number)
    return [(row, number) for row, text in zip(shard.rows, shard.text_of_row, strict=True) for number in of_text[text]]


def _text(text: str, piece: Piece) -> str:
    return text[piece.start : piece.stop]


def _pooled(shard: Shard) -> tuple[list[Piece], np.ndarray]:
    """One piece a text with all its tokens, and the mean of its chunks' vectors, weighted by their tokens."""
    assert shard.embeddings is not None
    lengths = np.array([len(piece.token_ids) for piece in shard.pieces], dtype=np.float64)
    text_of = np.array([piece.text for piece in shard.pieces], dtype=np.int64)
    sums = np.zeros((len(shard.texts), shard.embeddings.shape[1]))
    np.add.at(sums, text_of, shard.embeddings * lengths[:, None])
    means = sums / np.bincount(text_of, lengths, len(shard.texts))[:, None]
    groups: list[list[Piece]] = [[] for _ in shard.texts]
    for piece in shard.pieces:
        groups[piece.text].append(piece)
    pieces = [
        Piece(text, 0, np.concatenate([piece.token_ids for piece in group]), any(piece.truncated for piece in group))
        for text, group in enumerate(groups)
    ]
    return pieces, means.astype(np.float32)


def _require_finite(shard: Shard, pieces: list[Piece], vectors: np.ndarray, remedy: str) -> None:
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        text = pieces[int(wrong[0])].text
        row = shard.rows[shard.text_of_row.index(text)]
        raise CheckFailed(
            f"{len(wrong)} of {len(vectors)} {vectors.dtype} vectors of rows {shard.row_start} to {shard.row_stop - 1} "
            f"hold NaN or infinity, first that of row {row.row_index} (id {row.id!r}) in {row.source}; try {remedy}"
        )


def _tokens(pieces: list[Piece]) -> int | None:
    return None if any(p.token_ids is None for p in pieces) else sum(len(p.token_ids) for p in pieces)


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """What a sidecar says, or None where it is missing or no sidecar."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    is_sidecar = isinstance(value, dict) and {"shard", "rows", "sha256", "bytes", "settings"} <= value.keys()
    return value if is_sidecar else None


def valid_sidecar(folder: Path, index: int) -> dict[str, Any] | None:
    """The sidecar of a shard whose file is byte for byte what was written, else None."""
    path = folder / f"{shard_name(index)}.parquet"
    sidecar = read_sidecar(path.with_suffix(".json"))
    if sidecar is None or not path.is_file() or path.stat().st_size != sidecar["bytes"]:
        return None
    return sidecar if sha256_file(path) == sidecar["sha256"] else None
