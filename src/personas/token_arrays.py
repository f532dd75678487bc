"""Per-token measurements beside the results: `tokens.parquet`, one row a response."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from src.common.files import open_atomic
from src.common.jsonl import JsonlWriter, repair_torn_tail
from src.models.types import GenerationResult

FILE_NAME = "tokens.parquet"
JOURNAL_NAME = "tokens.partial.jsonl"
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("token_id", pa.list_(pa.int32())),
        ("entropy", pa.list_(pa.float32())),
        ("top_k_mass", pa.list_(pa.float32())),
    ]
)
ROWS_AT_ONCE = 256


class TokenArrays:
    """
    A journal that a kill cannot tear for long, turned into one Parquet file at the end.

    The journal's line is written before its results row, so that every row in the results has its arrays.
    """

    def __init__(self, folder: Path) -> None:
        self.parquet = folder / FILE_NAME
        self.journal = folder / JOURNAL_NAME
        repair_torn_tail(self.journal)
        self._writer = JsonlWriter(self.journal)

    def add(self, result: GenerationResult) -> None:
        """Note one response's arrays: token ids, entropy (nats) and top-k mass, each as long as the response."""
        values = (result.id, result.token_ids, result.entropy, result.top_k_mass)
        self._writer.write(dict(zip(SCHEMA.names, values, strict=True)))

    def close(self) -> None:
        self._writer.close()

    def finish(self, ids: Iterable[str]) -> None:
        """Write `tokens.parquet` with the arrays of `ids` in that order and remove the journal."""
        self.close()
        places = self._journal_places()
        earlier = _Earlier(self.parquet)
        with (
            open_atomic(self.parquet, "wb") as file,
            pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer,
            self.journal.open("rb") as journal,
        ):
            for group in _groups(ids):
                rows = [_journal_row(journal, places[i]) if i in places else earlier.row(i) for i in group]
                writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
        self.journal.unlink()

    def _journal_places(self) -> dict[str, int]:
        # Of two lines with one id the later stands: the earlier was written just before a kill, its row never was.
        places, offset = {}, 0
        with self.journal.open("rb") as file:
            for line in file:
                places[json.loads(line)["id"]] = offset
                offset += len(line)
        return places


class _Earlier:
    """Rows of the Parquet file that an earlier, smaller run of the folder finished with."""

    def __init__(self, path: Path) -> None:
        self.table = pq.read_table(path) if path.exists() else pa.Table.from_pylist([], schema=SCHEMA)
        self.places = {row_id: i for i, row_id in enumerate(self.table["id"].to_pylist())}

    def row(self, row_id: str) -> dict[str, object]:
        assert row_id in self.places, f"no token arrays for row {row_id}"
        return self.table.slice(self.places[row_id], 1).to_pylist()[0]


def _journal_row(journal: BinaryIO, offset: int) -> dict[str, object]:
    journal.seek(offset)
    return json.loads(journal.readline())


def _groups(ids: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    for row_id in ids:
        group.append(row_id)
        if len(group) == ROWS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group
