"""Datasets as Arrow batches with one schema, streamed: Parquet, JSONL and CSV files, local datasets, the hub's."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from src.common.errors import InputError
from src.common.files import sha256_file
from src.common.hub_rows import open_hub_split
from src.common.row_files import Row, csv_rows, jsonl_rows, require_file

if TYPE_CHECKING:
    from datasets import IterableDataset

Item = TypeVar("Item")
ROWS_AT_ONCE = 256
CONVERSION_ERRORS = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError)
SUFFIXES = {"parquet": (".parquet",), "jsonl": (".jsonl", ".ndjson"), "csv": (".csv",)}


@dataclass(frozen=True)
class TableSource:
    """A dataset that can be streamed."""

    schema: pa.Schema
    batches: Callable[[], Iterator[pa.RecordBatch]]
    """All rows in order, in small batches of that schema; each call begins anew."""
    rows: int | None
    """Their number, where it is known without streaming."""
    split: str
    facts: dict[str, Any] = field(default_factory=dict)
    """Revision, licence, the files it is made of."""


def open_files(path: Path, kind: str) -> TableSource:
    """
    A Parquet, JSONL or CSV file, or a folder of them in order of name. Cells of CSV are text, as they stand; types of
    JSONL are those that hold every row, found in a first pass. Raises InputError: no such file, malformed rows, a field
    whose values no one type holds.
    """
    files = files_of(path, kind)
    facts = {"files": {str(file): {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in files}}
    schemas, counts = zip(*(_SCHEMAS[kind](file) for file in files), strict=True)
    schema = merged_schemas(schemas, [str(file) for file in files])
    rows = None if None in counts else sum(counts)

    def batches() -> Iterator[pa.RecordBatch]:
        for file in files:
            yield from _BATCHES[kind](file, schema)

    return TableSource(schema, batches, rows, "train", facts)


def files_of(path: Path, kind: str) -> list[Path]:
    """The file, or those of a folder in order of name. Raises InputError for none."""
    if not path.is_dir():
        require_file(path)
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES[kind] and file.is_file())
    if not files:
        raise InputError(f"--name {path}: no {' or '.join(SUFFIXES[kind])} file in it; expected some")
    return files


def open_dataset(name: str, subset: str | None, split: str | None, revision: str | None) -> TableSource:
    """A dataset that the `datasets` library knows, of the hub or a folder. Raises InputError as `open_hub_split`."""
    chosen, stream = open_hub_split(f"--name {name}", name, subset, split, revision)
    place = f"--name {name}, split {chosen}"
    first = next(_stream_batches(stream, place), None)
    if first is None:
        raise InputError(f"{place}: no rows in it; expected at least one")
    # Features are the library's word on the types; without them the types of the first rows are held to.
    schema = (stream.features.arrow_schema if stream.features else first.schema).remove_metadata()

    def batches() -> Iterator[pa.RecordBatch]:
        number = 0
        for batch in _stream_batches(stream, place):
            here = f"{place}: rows {number + 1} to {number + len(batch)}"
            if merged_schemas([schema, batch.schema.remove_metadata()], [here]) != schema:
                raise InputError(f"{here}: fields of other types than the first rows have; a file of it can be read "
                                 f"with --source jsonl, parquet or csv")  # fmt: skip
            yield _filled(batch, schema)
            number += len(batch)

    return TableSource(schema, batches, None, chosen)


def _stream_batches(stream: "IterableDataset", place: str) -> Iterator[pa.RecordBatch]:
    number = 0
    try:
        for table in stream.with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
            yield from table.combine_chunks().to_batches()
            number += len(table)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        told = str(error).strip().split("\n")[0]
        raise InputError(f"{place}: row {number + 1} or one soon after: {told}; expected readable rows") from error


def _parquet_schema(path: Path) -> tuple[pa.Schema, int]:
    try:
        with pq.ParquetFile(path) as file:
            return file.schema_arrow.remove_metadata(), file.metadata.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not readable as Parquet ({error}); expected a Parquet file") from None


def _parquet_batches(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                yield _filled(batch, schema)
                number += len(batch)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}:{number + 1}: this row or one soon after: {error}; expected readable rows") from None


def _filled(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch with the columns of the schema: those that it lacks are null."""
    columns = [
        batch.column(name).cast(kind) if name in batch.schema.names else pa.nulls(len(batch), kind)
        for name, kind in zip(schema.names, schema.types, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _jsonl_schema(path: Path) -> tuple[pa.Schema, int]:
    merged, count = pa.schema([]), 0
    for rows in _groups(jsonl_rows(path)):
        merged = merged_schemas([merged, _converted(rows, None).schema], [str(path), f"{rows[0][0]} or soon after"])
        count += len(rows)
    return merged, count


def _csv_schema(path: Path) -> tuple[pa.Schema, None]:
    names: list[str] = []
    # The check sees the header also where no row follows it.
    next(csv_rows(path, lambda place, columns: names.extend(columns)), None)
    return pa.schema([(name, pa.string()) for name in names]), None


def _row_batches(rows: Iterator[Row], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for group in _groups(rows):
        yield _converted(group, schema)


def _groups(items: Iterable[Item]) -> Iterator[list[Item]]:
    iterator = iter(items)
    while group := list(islice(iterator, ROWS_AT_ONCE)):
        yield group


def _converted(rows: Sequence[Row], schema: pa.Schema | None) -> pa.RecordBatch:
    """Without a schema: of the types that Arrow finds. Raises InputError naming the first row that does not go in."""
    values = [value for _, value in rows]
    names = schema.names if schema else dict.fromkeys(name for value in values for name in value)
    columns = {}
    for name in names:
        column = [value.get(name) for value in values]
        kind = schema.field(name).type if schema else None
        try:
            columns[name] = pa.array(column, kind)
        except CONVERSION_ERRORS as error:
            place = rows[_first_wrong(column, kind)][0]
            raise InputError(f"{place}: {name}: {error}; expected values of one type that Arrow has") from None
    return pa.RecordBatch.from_pydict(columns, schema=schema) if columns else pa.RecordBatch.from_pylist([])


def _first_wrong(column: Sequence[object], kind: pa.DataType | None) -> int:
    for number in range(len(column)):
        try:
            pa.array(column[: number + 1], kind)
        except CONVERSION_ERRORS:
            return number
    raise AssertionError("the column as a whole was refused and every beginning of it was not")


def merged_schemas(schemas: Sequence[pa.Schema], places: Sequence[str]) -> pa.Schema:
    """
    The schema that holds the rows of all: whole numbers become floats beside floats, a field is null where it is not.
    Raises InputError, with the last place, for a field of types that no one type holds.
    """
    try:
        return pa.unify_schemas(list(schemas), promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        told = str(error).replace("Unable to merge: ", "")
        raise InputError(f"{' and '.join(places)}: {told}; expected one type a field") from None


_SCHEMAS = {"parquet": _parquet_schema, "jsonl": _jsonl_schema, "csv": _csv_schema}
_BATCHES = {
    "parquet": _parquet_batches,
    "jsonl": lambda path, schema: _row_batches(jsonl_rows(path), schema),
    "csv": lambda path, schema: _row_batches(csv_rows(path, lambda place, columns: None), schema),
}
