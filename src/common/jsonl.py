"""
JSONL: one JSON object a line, appended as it is made. Lines end at the byte \\n alone: a response may well hold U+2028,
at which str.splitlines would cut it.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

from src.common.errors import InputError
from src.common.files import encode_json, open_atomic

SECONDS_BETWEEN_SYNCS = 5.0
EXPECTED = "expected one JSON object a line"


def encode_row(row: Mapping[str, Any]) -> bytes:
    """One line of JSONL. Raises ValueError for NaN and infinity, which are not JSON."""
    return encode_json(row).encode() + b"\n"


def read_jsonl(path: Path, *, in_progress: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """
    Yields (line number from 1, object), skipping blank lines and, in a file that is still `in_progress`, a last line
    without its newline.
    Raises InputError (`path:line: what is wrong; expected …`) for a missing file and for a line that is no JSON object.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a JSONL file") from error
    with file:
        for number, line in enumerate(file, start=1):
            is_torn = in_progress and not line.endswith(b"\n")
            if line.strip() and not is_torn:
                yield number, decode_row(line, f"{path}:{number}")


def decode_row(line: bytes, place: str) -> dict[str, Any]:
    """The object that a line holds. Raises InputError, with the place, where it holds none."""
    try:
        row = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 at byte {error.start}; {EXPECTED}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: {error.msg} at column {error.colno}; {EXPECTED}") from error
    except ValueError as error:
        raise InputError(f"{place}: {error}; {EXPECTED}") from error
    if not isinstance(row, dict):
        raise InputError(f"{place}: a JSON {type(row).__name__}; {EXPECTED}")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def repair_torn_tail(path: Path) -> int:
    """
    Cuts off a last line that a kill left half written, and ends a whole last line that lacks its newline. Returns the
    number of bytes cut off; a missing file is left missing.
    Raises InputError for a broken line before the last: it was not torn by a kill, and is never dropped.
    """
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        whole, unended, torn = 0, False, None
        for number, line in enumerate(file, start=1):
            if torn is not None:
                raise torn
            try:
                if line.strip():
                    decode_row(line, f"{path}:{number}")
                whole += len(line)
                unended = not line.endswith(b"\n")
            except InputError as error:
                torn = error
        size = file.tell()
        file.truncate(whole)
        if unended:
            file.seek(whole)
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())
    return size - whole


class JsonlWriter:
    """
    Appends rows, each by one write, so that a kill tears at most the last line. Rows reach the disk itself every few
    seconds and at `close()`.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")
        self._synced_at = time.monotonic()

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row. Raises ValueError for NaN and infinity, which are not JSON."""
        self._file.write(encode_row(row))
        self._file.flush()
        if time.monotonic() - self._synced_at >= SECONDS_BETWEEN_SYNCS:
            self.sync()

    def close(self) -> None:
        if not self._file.closed:
            self.sync()
            self._file.close()

    def sync(self) -> None:
        """The rows so far onto the disk itself."""
        os.fsync(self._file.fileno())
        self._synced_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def write_jsonl_atomic(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes all rows to a file that appears whole."""
    with open_atomic(path, "wb") as file:
        for row in rows:
            file.write(encode_row(row))


def round_measured(value: float | None) -> float | None:
    """
    A measured number as it is written: 4 decimals, and 4 significant digits below 0.1; None for NaN and infinity.
    """
    if value is None or not math.isfinite(value):
        return None
    exact = float(value)
    rounded = round(exact, 4) if abs(exact) >= 0.1 else float(f"{exact:.4g}")
    return rounded + 0.0  # an entropy of zero is often computed as -0.0


def round_fields(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A copy of the row with `round_measured` applied to the named fields that it has."""
    return dict(row) | {name: round_measured(row[name]) for name in names if name in row}
