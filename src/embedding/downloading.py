"""A stream of Arrow batches → one Parquet file of all rows or of a sample, and what its columns hold."""

import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from src.common.errors import InputError
from src.common.files import TEMPORARY_SUFFIX, open_atomic
from src.common.jsonl import round_measured
from src.common.row_hash import is_chosen, row_hash
from src.embedding.tables import TableSource

ROWS_A_GROUP = 8192
BYTES_A_GROUP = 64 << 20
SPOOL = ".spool.tmp"


class FieldFacts:
    """What a column holds, gathered batch by batch."""

    def __init__(self, kind: pa.DataType) -> None:
        self.kind = kind
        self.rows = self.nulls = 0
        self._measured, self._sum = 0, 0.0
        self._least: float | None = None
        self._most: float | None = None

    @property
    def unit(self) -> str | None:
        """What is measured of a value: the characters of text, the items of a list, a number itself."""
        types = pa.types
        if types.is_string(self.kind) or types.is_large_string(self.kind):
            return "characters"
        if types.is_list(self.kind) or types.is_large_list(self.kind):
            return "items"
        return "value" if types.is_integer(self.kind) or types.is_floating(self.kind) else None

    def add(self, column: pa.Array) -> None:
        self.rows += len(column)
        self.nulls += column.null_count
        if self.unit is None or column.null_count == len(column):
            return
        sizes = {"characters": pc.utf8_length, "items": pc.list_value_length, "value": lambda values: values}
        measured = sizes[self.unit](column).drop_null()
        if pa.types.is_floating(measured.type):
            measured = measured.filter(pc.is_finite(measured))
        if not len(measured):
            return
        least, most = pc.min_max(measured).as_py().values()
        self._least = least if self._least is None else min(self._least, least)
        self._most = most if self._most is None else max(self._most, most)
        # Unsafe only of whole numbers beyond 2⁵³, whose mean is rounded anyway.
        self._sum += pc.sum(measured.cast(pa.float64(), safe=False)).as_py()
        self._measured += len(measured)

    def told(self) -> dict[str, Any]:
        """{"type", "nulls"} and, of what has a size, {"characters" | "items" | "value": {min, mean, max}}."""
        about: dict[str, Any] = {"type": str(self.kind), "nulls": self.nulls}
        if self._measured:
            ends = (self._least, self._sum / self._measured, self._most)
            about[self.unit] = dict(zip(("min", "mean", "max"), map(_rounded, ends), strict=True))
        return about


def _rounded(value: float) -> float | int | None:
    return value if isinstance(value, int) else round_measured(value)


class Smallest:
    """The `count` rows with the smallest hashes of all offered so far; memory is that of their indices."""

    def __init__(self, seed: int, count: int) -> None:
        self.seed, self.count = seed, count
        self._heap: list[tuple[int, int]] = []

    def offer(self, index: int) -> bool:
        """Whether the row is among them, for now."""
        entry = (-row_hash(self.seed, index), -index)
        if len(self._heap) < self.count:
            heapq.heappush(self._heap, entry)
            return True
        return heapq.heappushpop(self._heap, entry) != entry

    def chosen(self) -> set[int]:
        """Their indices."""
        return {-index for _, index in self._heap}


def write_rows(
    source: TableSource, path: Path, seed: int, num_rows: int | None, fraction: float
) -> tuple[dict[str, Any], int, int]:
    """
    Writes the rows, in order, to a file that appears whole. Returns (field → what it holds, rows written, rows read).

    num_rows: exactly so many, those with the smallest hashes. How many there are need not be known: each row that is
    among them when it comes is put aside on the disk, num_rows · (1 + ln(rows / num_rows)) rows in all, and of those
    the final ones are kept. Raises InputError where there are fewer, and where nothing is left.
    """
    spool = path.parent / SPOOL
    for left in (spool, *path.parent.glob(f".{path.name}.*{TEMPORARY_SUFFIX}")):
        # What a kill left; the run's folder is ours alone.
        left.unlink(missing_ok=True)
    if num_rows is None:
        batches = _Counted(source.batches())
        told, n_written = _write(path, source.schema, _fraction(batches, seed, fraction))
        n_read = batches.n_rows
    else:
        try:
            chosen, places, n_read = _put_aside(source, spool, seed, num_rows)
            told, n_written = _write(path, source.schema, _kept(spool, places, chosen))
        finally:
            spool.unlink(missing_ok=True)
    return told, n_written, n_read


class _Counted:
    """Batches, with the number of rows that have passed."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self.n_rows = 0

    def __iter__(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        for batch in self._batches:
            start, self.n_rows = self.n_rows, self.n_rows + len(batch)
            yield start, batch


def _fraction(batches: _Counted, seed: int, fraction: float) -> Iterator[pa.RecordBatch]:
    for start, batch in batches:
        yield (
            batch
            if fraction >= 1
            else batch.filter(pa.array([is_chosen(seed, start + i, fraction) for i in range(len(batch))], pa.bool_()))
        )


def _put_aside(source: TableSource, spool: Path, seed: int, num_rows: int) -> tuple[set[int], list[int], int]:
    """(indices of the sample, indices of the rows in the spool, rows read)."""
    smallest, places, batches = Smallest(seed, num_rows), [], _Counted(source.batches())
    with pq.ParquetWriter(spool, source.schema, compression="zstd") as writer:
        for group in _groups(_offered(batches, smallest, places)):
            writer.write_table(group)
    if batches.n_rows < num_rows:
        raise InputError(f"--num_rows {num_rows}: it has {batches.n_rows} rows; leave it out for all of them")
    return smallest.chosen(), places, batches.n_rows


def _offered(batches: _Counted, smallest: Smallest, places: list[int]) -> Iterator[pa.RecordBatch]:
    for start, batch in batches:
        kept = [i for i in range(len(batch)) if smallest.offer(start + i)]
        places += [start + i for i in kept]
        if kept:
            yield batch.take(pa.array(kept, pa.int64()))


def _kept(spool: Path, places: list[int], chosen: set[int]) -> Iterator[pa.RecordBatch]:
    start = 0
    with pq.ParquetFile(spool) as file:
        for batch in file.iter_batches(batch_size=1024):
            here = places[start : start + len(batch)]
            start += len(batch)
            yield batch.filter(pa.array([place in chosen for place in here], pa.bool_()))


def _write(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> tuple[dict[str, Any], int]:
    facts = {name: FieldFacts(kind) for name, kind in zip(schema.names, schema.types, strict=True)}
    n_rows = 0
    try:
        with open_atomic(path, "wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for group in _groups(batches):
                writer.write_table(group)
                n_rows += len(group)
                for name, each in facts.items():
                    for chunk in group[name].chunks:
                        each.add(chunk)
            if not n_rows:
                raise InputError(f"{path}: no rows would be in it; expected at least one")
    except pa.ArrowNotImplementedError as error:
        raise InputError(f"{path}: {error}; leave such a field out") from None
    return {name: each.told() for name, each in facts.items()}, n_rows


def _groups(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """
    Tables of ROWS_A_GROUP rows, or of fewer where those are large. Cut by rows alone, so that the file's bytes do not
    depend on the batches unless rows are larger than 8 KiB on average.
    """
    held: list[pa.RecordBatch] = []
    for batch in batches:
        while len(batch):
            room = ROWS_A_GROUP - sum(map(len, held))
            held.append(batch.slice(0, room))
            batch = batch.slice(room)
            if sum(map(len, held)) == ROWS_A_GROUP or sum(each.nbytes for each in held) >= BYTES_A_GROUP:
                yield pa.Table.from_batches(held)
                held = []
    if held:
        yield pa.Table.from_batches(held)
