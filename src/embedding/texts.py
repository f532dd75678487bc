"""The text of a row: a field as it is, or turns of a conversation; which rows are chosen, and what else they hold."""

import json
import math
from collections.abc import Sequence
from datetime import date, timedelta
from datetime import time as timestamp
from decimal import Decimal
from typing import Any
from uuid import UUID

from src.common.errors import InputError
from src.common.files import encode_json
from src.common.row_hash import is_chosen
from src.embedding.reading import SourceRow
from src.embedding.records import TextRow
from src.embedding.settings import TextSettings

FIELDS = {"none": ("text",), "response": ("response",)}
TURN_FIELDS = ("messages", "conversation", "conversations")
ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}
"""Other names for the roles, as ShareGPT's files have them."""


class BadRow(ValueError):
    """Why a row has no text."""


def read_texts(rows: Sequence[SourceRow], first: int, settings: TextSettings) -> tuple[list[TextRow], int, int]:
    """
    (rows with a text, number of bad ones, number that sampling left out) of dataset rows from row `first` on.
    Raises InputError for bad rows unless they are to be skipped, and always where the very first row lacks the field.
    """
    found, bad, sampled_out = [], [], 0
    for row_index, row in enumerate(rows, start=first):
        if not is_chosen(settings.seed, row_index, settings.fraction):
            sampled_out += 1
            continue
        try:
            found.append(_text_row(row, row_index, settings))
        except BadRow as error:
            bad.append(f"{row.place}: {error}")
    if bad and not settings.skip_bad_rows:
        more = f" (and {len(bad) - 1} more bad rows up to row {first + len(rows)})" if len(bad) > 1 else ""
        raise InputError(f"{bad[0]}{more}; mend it, or leave such rows out with --skip_bad_rows")
    return found, len(bad), sampled_out


def text_field(row: SourceRow, settings: TextSettings) -> str:
    """The name of the field that holds the text. Raises InputError, listing the fields, where the row has none."""
    value = row.value if isinstance(row.value, dict) else {}
    names = (settings.text_field,) if settings.text_field else FIELDS.get(settings.extract, TURN_FIELDS)
    for name in names:
        if name in value:
            return name
    fields = ", ".join(value) or "none"
    raise InputError(f"{row.place}: no field {' or '.join(names)}; its fields are {fields}; name one with --text_field")


def _text_row(row: SourceRow, row_index: int, settings: TextSettings) -> TextRow:
    assert settings.text_field is not None, "the field is found before the rows are read"
    if not isinstance(row.value, dict):
        raise BadRow(f"a JSON {type(row.value).__name__}; expected an object")
    if settings.text_field not in row.value:
        raise BadRow(f"no field {settings.text_field!r} in {', '.join(row.value) or 'it'}")
    value = row.value[settings.text_field]
    text = _checked(_EXTRACTORS[settings.extract](value), settings.text_field)
    given = row.value.get("id")
    has_id = isinstance(given, str | int) and not isinstance(given, bool)
    stored = (settings.text_field, "id") if has_id else (settings.text_field,)
    others = {name: item for name, item in row.value.items() if name not in stored}
    row_id = _checked(str(given), "id") if has_id else str(row_index)
    return TextRow(row_index, row_id, row.source, text, _json(others))


def _checked(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is {_shown(value)}; expected text")
    if not value.strip():
        raise BadRow(f"{name} is empty; expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{name} holds half of a surrogate pair; expected whole characters") from None
    return value


def _shown(value: object) -> str:
    kind = {"NoneType": "null", "dict": "an object", "list": "a list"}.get(type(value).__name__)
    shown = repr(value)
    return kind or f"the {type(value).__name__} {shown if len(shown) <= 40 else shown[:39] + '…'}"


def _turns(value: object) -> list[tuple[str, str]]:
    """(role, text) of each message of a conversation."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"the conversation is {_shown(value) if value != [] else 'empty'}; expected a list of messages")
    return [_turn(message) for message in value]


def _turn(message: object) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise BadRow(f"a message is {_shown(message)}; expected an object")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    if not isinstance(role, str) or not isinstance(content, str | None):
        raise BadRow(f"a message has role {_shown(role)} and content {_shown(content)}; expected text")
    return ROLES.get(role, role), content or ""


def _of_role(value: object, role: str, position: int) -> str:
    texts = [text for each, text in _turns(value) if each == role]
    if not texts:
        raise BadRow(f"the conversation has no turn of the {role}")
    return texts[position]


_EXTRACTORS: dict[str, Any] = {
    "none": lambda value: value,
    "response": lambda value: value,
    "first_assistant": lambda value: _of_role(value, "assistant", 0),
    "last_user": lambda value: _of_role(value, "user", -1),
    "all_turns": lambda value: "\n\n".join(f"{role}: {text}" for role, text in _turns(value)),
}


def _json(value: object) -> str:
    try:
        return encode_json(value)
    except (TypeError, ValueError):
        return encode_json(json.loads(json.dumps(_plain(value))))


def _plain(value: object) -> object:
    """
    A value that JSON can hold: dates and decimals become text, bytes hexadecimal, NaN and infinity null, and what has
    no such form (an image) the name of its type, since its text may hold an address of memory.
    """
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, date | timestamp | timedelta | Decimal | UUID):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else f"<{type(value).__name__}>"
