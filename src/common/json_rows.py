"""The elements of JSON lists with the line of each, so that a wrong one can be named."""

import json
from collections.abc import Generator, Iterator
from pathlib import Path

from src.common.errors import InputError
from src.common.row_files import Row, read_text

JSON_WHITE_SPACE = " \t\n\r"
JSON_NAMES = {"{": "an object (one object a line is JSONL: name it .jsonl)", '"': "a string", "": "empty"}


def json_rows(path: Path) -> Iterator[Row]:
    """The elements of a JSON list. Raises InputError: not a list, malformed, NaN, a key twice in one object."""
    text = read_text(path)
    position = _after_white_space(text, 0)
    line = 1 + text.count("\n", 0, position)
    if text[position : position + 1] != "[":
        found = JSON_NAMES.get(text[position : position + 1], "not a list")
        raise InputError(f"{path}:{line}: the top level is {found}; expected a JSON list")
    position = yield from _elements(text, position, path)
    _refuse_rest(text, position, path, "list")


def json_lists(path: Path) -> dict[str, list[Row]]:
    """
    The lists of a JSON object, {"train": [...], "test": [...]}, each element with its place. Raises InputError: not an
    object, a value that is no list, a key twice, malformed, NaN.
    """
    text = read_text(path)
    lists: dict[str, list[Row]] = {}
    position = _after_white_space(text, 0)
    if text[position : position + 1] != "{":
        raise InputError(f"{_place(text, position, path)}: the top level is no object; expected lists by name")
    position = _after_white_space(text, position + 1)
    closed = text[position : position + 1] == "}"
    while not closed:
        place = _place(text, position, path)
        name, position = _decode(text, position, path, 1 + text.count("\n", 0, position))
        position = _after_white_space(text, position)
        if not isinstance(name, str) or text[position : position + 1] != ":":
            raise InputError(f'{place}: no name of a list here; expected "name": [...]')
        position = _after_white_space(text, position + 1)
        if text[position : position + 1] != "[" or name in lists:
            problem = "appears twice" if name in lists else "is no list"
            raise InputError(f"{place}: {name!r} {problem}; expected each list once")
        lists[name], position = _listed(text, position, path)
        position = _after_white_space(text, position)
        if text[position : position + 1] not in {",", "}"}:
            raise InputError(f'{_place(text, position, path)}: the object is not closed here; expected "," or "}}"')
        closed = text[position] == "}"
        position = position if closed else _after_white_space(text, position + 1)
    _refuse_rest(text, position + 1, path, "object")
    return lists


def _place(text: str, position: int, path: Path) -> str:
    return f"{path}:{1 + text.count(chr(10), 0, position)}"


def _listed(text: str, position: int, path: Path) -> tuple[list[Row], int]:
    rows, elements = [], _elements(text, position, path)
    while True:
        try:
            rows.append(next(elements))
        except StopIteration as end:
            return rows, end.value


def _elements(text: str, position: int, path: Path) -> Generator[Row, None, int]:
    """The elements of the list that begins at `position`; returns where it ends."""
    line, counted = 1 + text.count("\n", 0, position), position
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
    return position + 1


def _refuse_rest(text: str, position: int, path: Path, what: str) -> None:
    position = _after_white_space(text, position)
    if position < len(text):
        raise InputError(f"{_place(text, position, path)}: text after the {what}; expected the file's end")


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
