"""Conversations into files, a split at a time and a row at a time, and what a card says of them."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from src.common.errors import InputError
from src.common.files import encode_json, open_atomic
from src.common.jsonl import encode_row
from src.training.rows import Conversation, conversations
from src.training.sources import Source

PREVIEWED = 3
ROWS_AT_ONCE = 1024
Row = dict[str, Any]


@dataclass
class Counts:
    """What a card says of a split."""

    rows: int = 0
    messages: int = 0
    characters: int = 0
    shortest: int | None = None
    longest: int = 0
    """Characters of a row."""
    not_carried: set[str] = field(default_factory=set)
    """Columns that are in no output."""
    preview: list[Row] = field(default_factory=list)

    def add(self, conversation: Conversation, row: Row) -> None:
        size = sum(len(m["content"]) for m in conversation.messages) + len(conversation.rejected or "")
        self.rows += 1
        self.messages += len(conversation.messages)
        self.characters += size
        self.shortest = size if self.shortest is None else min(size, self.shortest)
        self.longest = max(size, self.longest)
        self.not_carried.update(conversation.others)
        if len(self.preview) < PREVIEWED:
            self.preview.append(row)

    def card(self) -> Row:
        """As JSON."""
        return {
            "rows": self.rows, "messages": self.messages, "characters": self.characters,
            "shortest_row": self.shortest, "longest_row": self.longest,
            "columns_not_carried": sorted(self.not_carried), "preview": self.preview,
        }  # fmt: skip


def is_preference(source: Source) -> bool:
    """Whether the first training row has a rejected answer."""
    _, value = next(source.splits["train"]())
    return isinstance(value, dict) and value.get("rejected") is not None


def write_splits(
    folder: Path, to: str, source: Source, counts: dict[str, Counts], preferences: bool, limit: int | None
) -> list[str]:
    """The files' names. Raises InputError for a row that is malformed, or that the format cannot hold."""

    def rows(split: str) -> Iterator[Row]:
        for conversation in conversations(islice(source.splits[split](), limit), preferences=preferences):
            row = {"id": conversation.id, **_row(conversation, to)}
            counts[split].add(conversation, row)
            yield row

    if to == "instruct_json":
        with open_atomic(folder / "dataset.json") as file:
            _write_json(file, {split: rows(split) for split in source.splits})
        return ["dataset.json"]
    suffix = {"chat_json": "json", "parquet": "parquet", "arrow": "arrow"}.get(to, "jsonl")
    names = {split: f"{split}.{suffix}" for split in source.splits}
    for split, name in names.items():
        write = {"json": _write_list, "jsonl": _write_lines}.get(suffix)
        if write:
            write(folder / name, rows(split))
        else:
            _write_table(folder / name, suffix, rows(split))
    return list(names.values())


def _row(conversation: Conversation, to: str) -> Row:
    messages = [dict(message) for message in conversation.messages]
    if conversation.rejected is not None:
        return _preference(conversation, messages, to)
    if to in ("instruct_json", "prompt_jsonl"):
        names = ("input", "output") if to == "instruct_json" else ("prompt", "completion")
        if len(messages) == 2:
            return dict(zip(names, (message["content"] for message in messages), strict=True))
        if to == "prompt_jsonl":
            return {"prompt": messages[:-1], "completion": messages[-1:]}
        raise InputError(
            f"{conversation.place}: {len(messages)} messages; {to} holds one input and one output: take chat_json"
        )
    return {"messages": messages}


def _preference(conversation: Conversation, messages: list[Row], to: str) -> Row:
    if to == "instruct_json":
        raise InputError(f"{conversation.place}: a preference; {to} holds none: take prompt_jsonl, parquet or arrow")
    return {
        "prompt": messages[:-1],
        "chosen": messages[-1:],
        "rejected": [{"role": "assistant", "content": conversation.rejected}],
    }


def _write_json(file: Any, splits: dict[str, Iterator[Row]]) -> None:
    """One object of lists, a row a line, so that an error's line number is the row."""
    for number, (split, rows) in enumerate(splits.items()):
        file.write(("{\n" if number == 0 else ",\n") + json.dumps(split) + ": [")
        for index, row in enumerate(rows):
            file.write((",\n" if index else "\n") + encode_json(row))
        file.write("\n]")
    file.write("\n}\n")


def _write_list(path: Path, rows: Iterator[Row]) -> None:
    with open_atomic(path) as file:
        for index, row in enumerate(rows):
            file.write((",\n" if index else "[\n") + encode_json(row))
        file.write("\n]\n")


def _write_lines(path: Path, rows: Iterator[Row]) -> None:
    with open_atomic(path, "wb") as file:
        for row in rows:
            file.write(encode_row(row))


def _write_table(path: Path, suffix: str, rows: Iterator[Row]) -> None:
    import pyarrow
    import pyarrow.parquet

    with open_atomic(path, "wb") as file, ExitStack() as stack:
        writer = schema = None
        while some := list(islice(rows, ROWS_AT_ONCE)):
            batch = pyarrow.RecordBatch.from_pylist(some, schema=schema)
            if writer is None:
                schema = batch.schema
                make = pyarrow.parquet.ParquetWriter if suffix == "parquet" else pyarrow.ipc.new_stream
                writer = stack.enter_context(make(file, schema))
            # Both writers' own method for one batch; Parquet's closes no row group otherwise.
            writer.write_batch(batch)
