"""
The rows of an input file with the place of each, so that a wrong one can be named: readers yield (place, value).
A place is `file:line`; Parquet and Arrow have no lines, there the number is the row's, counted from 1.
"""

import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from src.common.errors import InputError
from src.common.jsonl import read_jsonl

Row = tuple[str, object]
ColumnCheck = Callable[[str, list[str]], object]
"""Called once with a table's place and column names; raises InputError when they will not do."""


def read_text(path: Path) -> str:
    """The file as UTF-8 text, a byte order mark accepted. Raises InputError: no such file, a folder, not UTF-8."""
    require_file(path)
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise InputError(f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; expected UTF-8 text") from None


def require_file(path: Path) -> None:
    """Raises InputError when there is no file at the path."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected a file")
    if not path.exists():
        raise InputError(f"{path}: no such file; expected the path of an existing file (this folder is {Path.cwd()})")


def jsonl_rows(path: Path) -> Iterator[Row]:
    """One JSON object a line, blank lines skipped. Raises InputError as `read_jsonl`."""
    for number, row in read_jsonl(path):
        yield f"{path}:{number}", row


def text_rows(path: Path) -> Iterator[Row]:
    """One string a line, blank lines skipped. Raises InputError as `read_text`."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line.removesuffix("\r")


def csv_rows(path: Path, check: ColumnCheck) -> Iterator[Row]:
    """
    One {column: cell} a record, streamed. Raises InputError: not UTF-8, malformed, a wrong number of cells, a column
    name twice.
    """
    # The csv module's default refuses a cell over 128 KiB, which a long document is.
    csv.field_size_limit(sys.maxsize)
    require_file(path)
    columns: list[str] = []
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                place, line = f"{path}:{line}", reader.line_num + 1
                if not columns:
                    columns = cells
                    _check_columns(place, columns, check)
                elif cells:
                    if len(cells) != len(columns):
                        raise InputError(f"{place}: {len(cells)} cells; expected {len(columns)}, as in the header")
                    yield place, dict(zip(columns, cells, strict=True))
    except UnicodeDecodeError:
        # A stream's error counts from its buffer's start: the whole text is decoded to name the line.
        read_text(path)
        raise
    except csv.Error as error:
        raise InputError(f"{path}:{line}: malformed CSV ({error}); expected commas and closed double quotes") from None


def arrow_rows(path: Path, check: ColumnCheck) -> Iterator[Row]:
    """One {column: value} a row of an Arrow stream or file, streamed. Raises InputError: no such file, not Arrow."""
    import pyarrow
    import pyarrow.ipc

    require_file(path)
    number = 0
    try:
        with pyarrow.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
            _check_columns(str(path), reader.schema.names, check)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                for value in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", value
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}:{number + 1}: not readable as Arrow ({error}); expected an Arrow file") from None


def parquet_rows(path: Path, check: ColumnCheck, start: int = 0) -> Iterator[Row]:
    """
    One {column: value} a row, streamed from row `start` on; the row groups before it are not read.
    Raises InputError: no such file, not Parquet.
    """
    import pyarrow
    import pyarrow.parquet

    require_file(path)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            _check_columns(str(path), table.schema_arrow.names, check)
            groups = list(range(table.num_row_groups))
            while groups and number + table.metadata.row_group(groups[0]).num_rows <= start:
                number += table.metadata.row_group(groups.pop(0)).num_rows
            for batch in table.iter_batches(batch_size=1024, row_groups=groups):
                passed = min(max(start - number, 0), len(batch))
                number += passed
                for value in batch.slice(passed).to_pylist():
                    number += 1
                    yield f"{path}:{number}", value
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}:{number + 1}: not readable as Parquet ({error}); expected a Parquet file") from None


def _check_columns(place: str, columns: list[str], check: ColumnCheck) -> None:
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise InputError(f"{place}: the column {twice[0]!r} appears twice; expected each name once")
    check(place, columns)
