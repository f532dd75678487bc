"""
A folder of embedding shards, read as one matrix that is never held: blocks of float32 vectors with their columns.
What does not fit together (dimension, precision, model, normalisation) is refused before anything is computed.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from src.common.errors import InputError
from src.common.files import sha256_file
from src.common.run_folder import read_json
from src.embedding.manifest import MANIFEST, failures

AGAIN = "the same src.embed_dataset command again makes it whole"
UNIT_NORMS = (0.98, 1.02)
"""Norms of vectors that were normalised and then rounded to half precision lie well inside."""
FLOATS = ("float32", "float16", "bfloat16")
PRECISIONS = (*FLOATS, "int8", "binary")
ROWS_AT_ONCE = 4096


class Block(NamedTuple):
    """Consecutive rows."""

    start: int
    """Place of the first row in the whole folder, from 0."""
    vectors: np.ndarray
    """float32 (n, dim): int8 codes times their shard's coefficient, bits as −1 and 1."""
    columns: dict[str, list]
    """The columns that were asked for, n values each."""


@dataclass(frozen=True)
class Shard:
    """One Parquet file and what its sidecar says of it."""

    path: Path
    rows: int
    sha256: str
    dim: int
    precision: str
    norm_min: float
    norm_max: float
    coefficient: float | None = None
    """int8: what a stored number is to be multiplied by."""


@dataclass(frozen=True)
class Embeddings:
    """The shards of one src.embed_dataset folder, in order, all of one model, dimension and precision."""

    folder: Path
    shards: tuple[Shard, ...]
    model: str
    settings: dict[str, Any]
    """The settings that the manifest records."""
    columns: tuple[str, ...]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def dim(self) -> int:
        return self.shards[0].dim

    @property
    def precision(self) -> str:
        return self.shards[0].precision

    @property
    def inputs(self) -> list[Path]:
        """The small files that fix what the shards hold: each sidecar names its shard's sha256."""
        return [shard.path.with_suffix(".json") for shard in self.shards]

    def require(self, *names: str) -> None:
        """Raises InputError unless the shards have these columns."""
        missing = [name for name in names if name not in self.columns]
        if missing:
            raise InputError(f"{self.folder}: no column {missing[0]!r}; expected some of: {', '.join(self.columns)}")

    def blocks(
        self, columns: Sequence[str] = (), first_row: int = 0, rows_at_once: int = ROWS_AT_ONCE
    ) -> Iterator[Block]:
        """
        All rows from `first_row` on in order, at most `rows_at_once` at a time. Raises InputError for a column that is
        not there and for a vector that is NaN, infinite or zero.
        """
        self.require(*columns)
        start = 0
        for shard in self.shards:
            if start + shard.rows <= first_row:
                start += shard.rows
                continue
            with pq.ParquetFile(shard.path) as file:
                for batch in file.iter_batches(batch_size=rows_at_once, columns=["embedding", *columns]):
                    end = start + len(batch)
                    batch = batch.slice(max(0, first_row - start))
                    if len(batch):
                        yield _block(batch, columns, end - len(batch), shard)
                    start = end
        assert start == self.rows, f"{start} rows read, the sidecars say {self.rows}"

    def rows_at(self, places: Iterable[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
        """place → the named columns of that row; those that the shards do not have are left out."""
        names = [name for name in columns if name in self.columns]
        wanted, start = sorted(set(places)), 0
        rows: dict[int, dict[str, Any]] = {place: {} for place in wanted}
        for shard in self.shards:
            here = [place for place in wanted if start <= place < start + shard.rows]
            if here and names:
                table = pq.read_table(shard.path, columns=names).take([place - start for place in here])
                rows |= dict(zip(here, table.to_pylist(), strict=True))
            start += shard.rows
        return rows


def open_embeddings(folder: Path, verify: bool = True) -> Embeddings:
    """
    The shards of a folder. verify: read every byte and compare its sha256 with the sidecar.

    Raises InputError: no folder, no shards, an unfinished run (no manifest, or shards that it does not list), a sidecar
    that is missing or does not fit its shard, shards of several models, dimensions, precisions or normalisations.
    """
    if not folder.is_dir():
        raise InputError(f"--embeddings_dir {folder}: no such folder; expected one that src.embed_dataset wrote")
    paths = sorted(folder.glob("shard-*.parquet"))
    if not paths:
        raise InputError(f"--embeddings_dir {folder}: no shard-*.parquet in it; expected a folder of src.embed_dataset")
    if not (folder / MANIFEST).exists():
        raise InputError(f"{folder / MANIFEST}: not there, so the embedding is not finished; {AGAIN}")
    manifest = read_json(folder / MANIFEST)
    _refuse_other_shards(folder, manifest, paths)
    # The manifest's order: names sort wrongly from 100,000 shards on.
    paths = [folder / shard["shard"] for shard in manifest["shards"]]
    shards = [_shard(path, verify) for path in paths]
    _refuse_mixture(shards)
    if not sum(shard.rows for shard in shards):
        raise InputError(f"--embeddings_dir {folder}: its shards hold no rows; expected at least one")
    columns = tuple(pq.read_schema(paths[0]).names)
    return Embeddings(folder, tuple(shards), _model(paths), manifest.get("settings", {}), columns)


def _refuse_other_shards(folder: Path, manifest: dict[str, Any], paths: Sequence[Path]) -> None:
    shards = manifest.get("shards") if isinstance(manifest, dict) else None
    if not shards or not all(isinstance(shard, dict) and "shard" in shard for shard in shards):
        raise InputError(f"{folder / MANIFEST}: lists no shards; expected the manifest of src.embed_dataset; {AGAIN}")
    if failed := failures(manifest):
        raise InputError(f"{folder / MANIFEST}: the vectors were checked and are wrong: {failed[0]}")
    if not manifest.get("complete", False):
        raise InputError(f"{folder / MANIFEST}: the embedding is not complete; {AGAIN}, each worker's where several "
                         f"share it")  # fmt: skip
    listed = [shard["shard"] for shard in shards]
    there = [path.name for path in paths]
    if sorted(listed) != there:
        odd = sorted(set(listed) ^ set(there))
        raise InputError(f"{folder / MANIFEST}: lists {len(listed)} shards and {len(there)} are there "
                         f"({', '.join(odd[:3])}); {AGAIN}")  # fmt: skip


def _shard(path: Path, verify: bool) -> Shard:
    sidecar = path.with_suffix(".json")
    if not sidecar.exists():
        raise InputError(f"{sidecar}: not there, so {path.name} is not known to be whole; {AGAIN}")
    facts = read_json(sidecar)
    names = ("rows", "sha256", "dim", "precision", "norm_min", "norm_max")
    missing = [name for name in names if name not in facts]
    if missing:
        raise InputError(f"{sidecar}: no {missing[0]!r}; expected {', '.join(names)}")
    try:
        with pq.ParquetFile(path) as file:
            rows, kind = file.metadata.num_rows, file.schema_arrow.field("embedding").type
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise InputError(f"{path}: not readable as a shard ({error}); {AGAIN}") from None
    if rows != facts["rows"] or (verify and sha256_file(path) != facts["sha256"]):
        raise InputError(f"{path}: not what {sidecar.name} says of it (rows or sha256 differ); {AGAIN}")
    shard = Shard(path, **{name: facts[name] for name in names}, coefficient=facts.get("coefficient"))
    _check_type(shard, kind)
    return shard


def _check_type(shard: Shard, kind: pa.DataType) -> None:
    """Raises InputError unless the column holds what the sidecar's precision and dimension say."""
    if shard.precision not in PRECISIONS:
        raise InputError(f"{shard.path}: precision {shard.precision!r}; expected one of {', '.join(PRECISIONS)}")
    width = kind.list_size if pa.types.is_fixed_size_list(kind) else -1
    expected = (shard.dim + 7) // 8 if shard.precision == "binary" else shard.dim
    if width != expected:
        raise InputError(f"{shard.path}: vectors of type {kind}, and its sidecar says {shard.dim} of {shard.precision}")


def _refuse_mixture(shards: Sequence[Shard]) -> None:
    first = shards[0]
    for shard in shards:
        for name in ("dim", "precision"):
            ours, theirs = getattr(shard, name), getattr(first, name)
            if ours != theirs:
                raise InputError(
                    f"{shard.path}: {name} {ours}, and {first.path.name} has {theirs}; expected shards of one run"
                )
    filled = [shard for shard in shards if shard.rows]
    for shard in filled if first.precision in FLOATS else []:
        low, high = shard.norm_min, shard.norm_max
        if not (np.isfinite([low, high]).all() and 0 < low <= high):
            raise InputError(f"{shard.path}: norms from {low} to {high}; expected finite norms above 0")
        if _are_apart(shard, filled[0]):
            raise InputError(
                f"{shard.path}: norms from {low:.4g} to {high:.4g}, and {filled[0].path.name} has "
                f"{filled[0].norm_min:.4g} to {filled[0].norm_max:.4g}: one is normalised and one is not"
            )


def _are_apart(one: Shard, other: Shard) -> bool:
    """Whether one shard's vectors all have length 1 and none of the other's has."""
    units = [UNIT_NORMS[0] <= each.norm_min and each.norm_max <= UNIT_NORMS[1] for each in (one, other)]
    return units[0] != units[1] and (one.norm_min > other.norm_max or other.norm_min > one.norm_max)


def _model(paths: Sequence[Path]) -> str:
    names: dict[str, Path] = {}
    for path in paths:
        for name in pq.read_table(path, columns=["model"])["model"].unique().to_pylist():
            names.setdefault(name, path)
    if len(names) != 1:
        told = ", ".join(f"{name!r} in {path.name}" for name, path in list(names.items())[:3])
        raise InputError(f"{paths[0].parent}: vectors of {len(names)} models ({told}); expected those of one")
    return next(iter(names))


def _decoded(column: pa.FixedSizeListArray, shard: Shard) -> np.ndarray:
    """float32 (n, dim)."""
    if column.null_count or column.flatten().null_count:
        raise InputError(f"{shard.path}: {column.null_count or 'some'} rows without a vector; {AGAIN}")
    # flatten() honours the slice that a batch may be; .values would not.
    stored = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    if shard.precision == "binary":
        return np.unpackbits(stored, axis=1, count=shard.dim).astype(np.float32) * 2 - 1
    return stored.astype(np.float32) * np.float32(1.0 if shard.coefficient is None else shard.coefficient)


def _block(batch: pa.RecordBatch, columns: Sequence[str], start: int, shard: Shard) -> Block:
    vectors = _decoded(batch.column("embedding"), shard)
    _refuse_unusable(vectors, shard.path, start)
    return Block(start, vectors, {name: batch.column(name).to_pylist() for name in columns})


def _refuse_unusable(vectors: np.ndarray, path: Path, start: int) -> None:
    norms = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    if len(wrong):
        raise InputError(f"{path}: the vector of row {start + wrong[0]} is zero or not finite ({len(wrong)} rows "
                         f"near it are); leave such rows out")  # fmt: skip


def metadata_of(text: str | None) -> dict[str, Any]:
    """A row's `metadata`: the further fields of its source row."""
    return json.loads(text) if text else {}
