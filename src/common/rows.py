"""
The rows that every command reads: prompts, personas and chats. What is wrong with one is an InputError of the form
`file:line: what is wrong; expected …`.
"""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from src.common.errors import InputError
from src.common.hub_rows import hub_rows
from src.common.json_rows import json_rows
from src.common.row_files import ColumnCheck, Row, csv_rows, jsonl_rows, parquet_rows, require_file, text_rows

TEXT_KEYS = ("prompt", "question", "text")
PERSONA_KEYS = ("persona", "category", "article")
MESSAGE_KEYS = ("role", "content")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Prompt:
    """One prompt. The id is the one given, or the row's index as text: "0", "1", …"""

    id: str
    text: str


@dataclass(frozen=True)
class Persona:
    """Who the model is told to be. The article is put before the name; "" and "none" mean that there is none."""

    persona: str
    category: str
    article: str


@dataclass(frozen=True)
class Chat:
    """A conversation: messages of {"role", "content"}, the roles being system, user and assistant."""

    id: str
    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Record:
    """A row of any columns; the id is the one given, or the row's index as text. `place` is its `file:line`."""

    id: str
    place: str
    values: dict[str, object]

    def text(self, column: str) -> str:
        """A column's text. Raises InputError where the row lacks the column, and where that is blank or no text."""
        if column not in self.values:
            meant = _meant(column, self.values)
            raise InputError(f"{self.place}: no column {column!r}{meant}; it has {_quoted(self.values)}")
        return filled_text(self.place, column, self.values[column])


def read_records(source: str | Path, limit: int | None = None) -> list[Record]:
    """
    The rows of any table that `read_prompts` reads, with all their columns; a line of text is a row of `prompt` alone.
    Raises InputError as `read_prompts` does, but for the columns: none is required.
    """
    rows = _any_rows(source, lambda place, names: None)
    rows = islice(rows, limit) if _is_hub(source) else rows
    records = [_record(place, value, index) for index, (place, value) in enumerate(rows)]
    _require_some(source, records, "rows")
    _refuse_twice(((record.place, record.id) for record in records), "id")
    return records[:limit]


def _record(place: str, value: object, index: int) -> Record:
    row = {"prompt": value} if isinstance(value, str) else _object(place, value, ("id",))
    return Record(row_id(place, row, index), place, row)


def read_messages(place: str, value: object) -> tuple[dict[str, str], ...]:
    """A conversation out of a row's column. Raises InputError as `read_chats` does for its `messages`."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{place}: messages is {_shown(value)}; expected a list of at least one message")
    return tuple(_message(place, number, each) for number, each in enumerate(value, 1))


def read_prompts(source: str | Path, limit: int | None = None) -> list[Prompt]:
    """
    The prompts of a JSON list, JSONL, CSV, Parquet or text file, or of `hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]`; at most
    `limit` of them. A row is the text itself, or has it under `prompt`, `question` or `text` (the first of these that
    is there) beside an optional `id` and columns that are not read.
    Raises InputError: no such file, a folder, not UTF-8, malformed, empty, no key for the text, a text or an id that is
    blank or not text, an id twice, an unknown hub dataset, a limit below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"{source}: a limit of {limit} prompts; expected at least 1")
    # The whole of a file is checked, whatever the limit; a hub dataset may have no end.
    rows = _any_rows(source, _text_key) if not _is_hub(source) else islice(_any_rows(source, _text_key), limit)
    placed = [(place, _prompt(place, value, index)) for index, (place, value) in enumerate(rows)]
    _require_some(source, placed, "prompts")
    _refuse_twice(((place, prompt.id) for place, prompt in placed), "id")
    return [prompt for _, prompt in placed][:limit]


def read_personas(path: str | Path) -> list[Persona]:
    """
    The personas of a JSON list or a JSONL file: objects of exactly `persona`, `category` and `article`.
    Raises InputError: no such file, a folder, not UTF-8, malformed, empty, a missing or unknown key, a value that is
    not text, a blank persona or category, white space around a value, a persona twice.
    """
    placed = [(place, _persona(place, value)) for place, value in _json_or_jsonl(Path(path), "personas")]
    _require_some(path, placed, "personas")
    _refuse_twice(((place, persona.persona) for place, persona in placed), "persona")
    return [persona for _, persona in placed]


def read_chats(path: str | Path) -> list[Chat]:
    """
    The chats of a JSON list or a JSONL file: objects with `messages`, a list of {"role", "content"}, and perhaps `id`.
    Raises InputError: no such file, a folder, not UTF-8, malformed, empty, no messages, a missing or unknown key in a
    message, an unknown role, a content that is blank or not text, an id twice.
    """
    rows = enumerate(_json_or_jsonl(Path(path), "chats"))
    placed = [(place, parse_chat(place, value, index)) for index, (place, value) in rows]
    _require_some(path, placed, "chats")
    _refuse_twice(((place, chat.id) for place, chat in placed), "id")
    return [chat for _, chat in placed]


def _is_hub(source: str | Path) -> bool:
    return str(source).startswith("hub:")


def _any_rows(source: str | Path, check: ColumnCheck) -> Iterator[Row]:
    if _is_hub(source):
        return hub_rows(str(source), check)
    path = Path(source)
    require_file(path)
    match path.suffix.lower():
        case ".json" | ".jsonl" | ".ndjson":
            return _json_or_jsonl(path, "rows")
        case ".csv":
            return csv_rows(path, check)
        case ".parquet":
            return parquet_rows(path, check)
        case ".txt":
            return text_rows(path)
    raise InputError(f"{path}: not a format for rows; expected .json, .jsonl, .csv, .parquet, .txt or hub:NAME")


def _json_or_jsonl(path: Path, what: str) -> Iterator[Row]:
    require_file(path)
    match path.suffix.lower():
        case ".json":
            return json_rows(path)
        case ".jsonl" | ".ndjson":
            return jsonl_rows(path)
    raise InputError(f"{path}: not a format for {what}; expected .json or .jsonl")


def _prompt(place: str, value: object, index: int) -> Prompt:
    if not isinstance(value, dict):
        return Prompt(str(index), filled_text(place, "the prompt", value))
    key = _text_key(place, list(value))
    return Prompt(row_id(place, value, index), filled_text(place, key, value[key]))


def _persona(place: str, value: object) -> Persona:
    row = _object(place, value, PERSONA_KEYS)
    _exact_keys(place, row, PERSONA_KEYS)
    texts = {key: _text(place, key, row[key]) for key in PERSONA_KEYS}
    for key, text in texts.items():
        if key != "article":
            filled_text(place, key, text)
        if text != text.strip():
            raise InputError(f"{place}: {key} {text!r} has white space around it; expected {text.strip()!r}")
    return Persona(**texts)


def parse_chat(place: str, value: object, index: int) -> Chat:
    """One chat; `index` names it where it has no id. Raises InputError that begins with `place`, as `read_chats`."""
    row = _object(place, value, ("messages",))
    if "messages" not in row:
        raise InputError(f"{place}: {_key_problem(list(row), ('messages',))}")
    return Chat(row_id(place, row, index), read_messages(place, row["messages"]))


def _message(place: str, number: int, value: object) -> dict[str, str]:
    place = f"{place}: message {number}"
    row = _object(place, value, MESSAGE_KEYS)
    _exact_keys(place, row, MESSAGE_KEYS)
    role = _text(place, "role", row["role"])
    if role not in ROLES:
        raise InputError(f'{place}: role is "{role}"{_meant(role, ROLES)}; expected {", ".join(ROLES)}')
    return {"role": role, "content": filled_text(place, "content", row["content"])}


def row_id(place: str, row: dict[str, object], index: int) -> str:
    """The id of a row as text, its index where it has none. Raises InputError for one that is no text or number."""
    value = row.get("id")
    if value is None:
        return str(index)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return filled_text(place, "id", value)


def _object(place: str, value: object, keys: tuple[str, ...]) -> dict[str, object]:
    if not isinstance(value, dict):
        raise InputError(f"{place}: {_shown(value)}; expected an object with {_quoted(keys)}")
    return value


def _text(place: str, what: str, value: object) -> str:
    if not isinstance(value, str):
        raise InputError(f"{place}: {what} is {_shown(value)}; expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{place}: {what} holds half of a surrogate pair; expected whole characters") from None
    return value


def filled_text(place: str, what: str, value: object) -> str:
    """The value, which has to be text and not blank. Raises InputError that names `what`."""
    if not _text(place, what, value).strip():
        raise InputError(f"{place}: {what} is {'blank' if value else 'empty'}; expected text")
    return value


def _text_key(place: str, names: list[str]) -> str:
    for key in TEXT_KEYS:
        if key in names:
            return key
    raise InputError(f"{place}: {_key_problem(names, TEXT_KEYS, ' or ')}")


def _exact_keys(place: str, row: dict[str, object], keys: tuple[str, ...]) -> None:
    if set(row) != set(keys):
        raise InputError(f"{place}: {_key_problem(list(row), keys)}")


def _key_problem(found: list[str], expected: tuple[str, ...], joint: str = ", ") -> str:
    missing = [key for key in expected if key not in found]
    unknown = [key for key in found if key not in expected]
    meant = "".join(_meant(key, missing or expected, f', is "{key}" meant to be ') for key in unknown)
    what = f"no key {_quoted(missing, joint)} in {_quoted(found) or '{}'}" if missing else f"unknown {_quoted(unknown)}"
    return f"{what}{meant}; expected {_quoted(expected, joint)}"


def _meant(word: str, words: Iterable[str], lead: str = ", perhaps ") -> str:
    nearest = difflib.get_close_matches(word, list(words), n=1)
    return f'{lead}"{nearest[0]}"' if nearest else ""


def _quoted(keys: Iterable[str], joint: str = ", ") -> str:
    return joint.join(f'"{key}"' for key in keys)


def _shown(value: object) -> str:
    """The value in a few words, for a message."""
    if value is None:
        return "null"
    kinds = {int: "the number", float: "the number", str: "the text", list: "the list", dict: "the object"}
    shown = repr(value)
    return f"{kinds.get(type(value), 'the value')} {shown if len(shown) <= 40 else shown[:39] + '…'}"


def _require_some(source: str | Path, rows: list, what: str) -> None:
    if not rows:
        raise InputError(f"{source}:1: no {what} in it; expected at least one")


def _refuse_twice(placed: Iterable[tuple[str, str]], what: str) -> None:
    seen: dict[str, str] = {}
    for place, value in placed:
        if value in seen:
            raise InputError(f"{place}: {what} {value!r} is already at {seen[value]}; expected each once")
        seen[value] = place
