"""
The rows of an input file with the place of each, so that a wrong one can be named: readers yield (place, value).
A place is `file:line`; Parquet and hub datasets have no lines, there the number is the row's, counted from 1.
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from src.common.errors import InputError
from src.common.jsonl import read_jsonl

Row = tuple[str, object]
ColumnCheck = Callable[[str, list[str]], object]
"""Called once with a table's place and column names; raises InputError when they will not do."""

JSON_WHITE_SPACE = " \t\n\r"
JSON_NAMES = {"{": "an object (one object a line is JSONL: name it .jsonl)", '"': "a string", "": "empty"}


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


def json_rows(path: Path) -> Iterator[Row]:
    """The elements of a JSON list. Raises InputError: not a list, malformed, NaN, a key twice in one object."""
    text = read_text(path)
    position = _after_white_space(text, 0)
    line, counted = 1 + text.count("\n", 0, position), position
    if text[position : position + 1] != "[":
        found = JSON_NAMES.get(text[position : position + 1], "not a list")
        raise InputError(f"{path}:{line}: the top level is {found}; expected a JSON list")
    position = _after_white_space(text, position + 1)
    closed = text[position : position + 1] == "]"
    while not closed:
        line, counted = line + text.count("\n", counted, position), position
        value, position = _decode(text, position, path, line)
        yield f"{path}:{line}", value
        position = _after_white_space(text, position)
        if text[position : position + 1] not in {",", "]"}:
            line += text.count("\n", counted, position)
            raise InputError(f'{path}:{line}: the list is not closed here; expected "," or "]"')
        closed = text[position] == "]"
        position = position if closed else _after_white_space(text, position + 1)
    position = _after_white_space(text, position + 1)
    if position < len(text):
        raise InputError(f"{path}:{1 + text.count(chr(10), 0, position)}: text after the list; expected the file's end")


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
    """One {column: cell} a record. Raises InputError: malformed, a wrong number of cells, a column name twice."""
    # The csv module's default refuses a cell over 128 KiB, which a long document is.
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    columns: list[str] = []
    line = 1
    try:
        for cells in reader:
            place, line = f"{path}:{line}", reader.line_num + 1
            if not columns:
                columns = cells
                _check_columns(place, columns, check)
            elif cells:
                if len(cells) != len(columns):
                    raise InputError(f"{place}: {len(cells)} cells; expected {len(columns)}, as in the header")
                yield place, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}:{line}: malformed CSV ({error}); expected commas and closed double quotes") from None


def parquet_rows(path: Path, check: ColumnCheck) -> Iterator[Row]:
    """One {column: value} a row, streamed. Raises InputError: no such file, not Parquet."""
    import pyarrow
    import pyarrow.parquet

    require_file(path)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            _check_columns(str(path), table.schema_arrow.names, check)
            for batch in table.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", value
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}:{number + 1}: not readable as Parquet ({error}); expected a Parquet file") from None


def hub_rows(source: str, check: ColumnCheck) -> Iterator[Row]:
    """
    The rows of `hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]`, streamed: nothing is downloaded beyond what is read. NAME may be a
    local folder. A row is {column: value}, with COLUMN's value also under "prompt".
    Raises InputError: unknown name, configuration, split or column; a hub that cannot be reached; unreadable data.
    """
    name, config, split, column = _hub_parts(source)
    rows = _open_hub_split(source, name, config, split)
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            if number == 1:
                _check_hub_columns(source, list(row), column, check)
            yield f"{source}:{number}", {**row, "prompt": row[column]} if column else row
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}:{number + 1}: not readable ({_first_line(error)}); expected rows") from None


def _hub_parts(source: str) -> tuple[str, str | None, str | None, str | None]:
    name, *rest = source.removeprefix("hub:").split(":")
    if not name or len(rest) > 3:
        raise InputError(f"{source}: not a hub dataset; expected hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]")
    config, split, column = (part or None for part in [*rest, "", "", ""][:3])
    return name, config, split, column


def _open_hub_split(source: str, name: str, config: str | None, split: str | None) -> Iterable[dict[str, object]]:
    import datasets

    try:
        splits = datasets.load_dataset(name, config, streaming=True)
    except ConnectionError as error:
        remedy = "expected a reachable hub, a dataset fetched with src.download_dataset, or a local file or folder"
        raise InputError(f"{source}: {_first_line(error)}; {remedy}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: {_first_line(error)}; expected hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]") from None
    wanted = split or ("train" if len(splits) > 1 else next(iter(splits)))
    if wanted not in splits:
        raise InputError(f"{source}: no split {wanted!r}; expected one of: {', '.join(map(str, splits))}")
    return splits[wanted]


def _check_hub_columns(source: str, columns: list[str], column: str | None, check: ColumnCheck) -> None:
    if column is None:
        check(source, columns)
    elif column not in columns:
        raise InputError(f"{source}: no column {column!r}; expected one of: {', '.join(columns)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _check_columns(place: str, columns: list[str], check: ColumnCheck) -> None:
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise InputError(f"{place}: the column {twice[0]!r} appears twice; expected each name once")
    check(place, columns)


def _after_white_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in JSON_WHITE_SPACE:
        position += 1
    return position


def _decode(text: str, position: int, path: Path, line: int) -> tuple[object, int]:
    """The JSON value at `position`, which is on `line`, and its end."""
    try:
        return DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}: malformed JSON ({error.msg}, column {error.colno}); expected JSON"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}:{line}: {error}; expected plain JSON") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _object_of(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return row


DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object_of)
