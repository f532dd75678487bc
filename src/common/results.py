"""results.jsonl: the rows of a run, each on disk as soon as it is there, and what names and seeds a row."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from src.common.errors import InputError
from src.common.jsonl import JsonlWriter, read_jsonl, repair_torn_tail, round_fields, write_jsonl_atomic
from src.common.rows import Prompt

Row = dict[str, object]
FILE_NAME = "results.jsonl"


class Results:
    """The rows of a run: those that an earlier start left, and those that this one adds."""

    def __init__(self, folder: Path, measured: Iterable[str] = (), name: str = FILE_NAME) -> None:
        """measured: the fields to round. Raises InputError for a row without an id, or with one that is there twice."""
        self.path = folder / name
        self.measured = tuple(measured)
        repair_torn_tail(self.path)
        self.rows: dict[str, Row] = {}
        if self.path.exists():
            for number, row in read_jsonl(self.path):
                if row.get("id") in self.rows or "id" not in row:
                    raise InputError(f"{self.path}:{number}: a row without an id or twice; expected each id once")
                self.rows[str(row["id"])] = row
        self._writer = JsonlWriter(self.path)

    def refuse_other_prompts(self, asked: Mapping[str, Prompt]) -> None:
        """
        asked: row id → what the row must answer. Raises InputError where a row answers another text: the source of the
        prompts has changed.
        """
        for row_id, prompt in asked.items():
            row = self.rows.get(row_id)
            if row is not None and row["prompt"] != prompt.text:
                raise InputError(
                    f"{self.path}: the row of prompt {prompt.id!r} answers {str(row['prompt'])[:60]!r}, "
                    f"and the prompt is now {prompt.text[:60]!r}; choose another --output_dir"
                )

    def add(self, row: Row) -> None:
        row = round_fields(row, self.measured)
        self._writer.write(row)
        self.rows[str(row["id"])] = row

    def sync(self) -> None:
        """All rows so far on the disk itself, for what must not get there before them."""
        self._writer.sync()

    def drop(self, row_ids: Iterable[str]) -> None:
        """Forget rows, in the file too: they are to be made again."""
        gone = set(row_ids)
        if gone & self.rows.keys():
            self._writer.close()
            self.rows = {key: row for key, row in self.rows.items() if key not in gone}
            write_jsonl_atomic(self.path, self.rows.values())
            self._writer = JsonlWriter(self.path)

    def finish(self, order: Sequence[str]) -> None:
        """Rewrite the file in the order of `order`; rows of an earlier, larger call come after."""
        self._writer.close()
        listed = dict.fromkeys(order)
        self.rows = {key: self.rows[key] for key in [*listed, *(k for k in self.rows if k not in listed)]}
        write_jsonl_atomic(self.path, self.rows.values())


def make_id(*parts: str | int) -> str:
    """16 hex digits that name a row by what it is about, the same in every run and on every machine."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()[:16]


def row_seed(seed: int, row_id: str) -> int:
    """A row's own seed in 0 … 2³² − 1, from the run's seed and the row's id."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row_id}".encode()).digest()[:4])
