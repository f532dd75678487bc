"""
Rows of a dataset as conversations: chats, input and output, prompt and completion, preferences. The same conversation
is the same whatever format it came in.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from src.common.errors import InputError
from src.common.row_files import Row
from src.common.rows import filled_text, parse_chat, row_id

Message = dict[str, str]
PAIRS = (("input", "output"), ("prompt", "completion"))
PREFERENCE = ("prompt", "chosen", "rejected")
EXPECTED = 'expected "messages", "input" and "output", "prompt" and "completion", or "prompt", "chosen" and "rejected"'
# Columns that would change what is asked: a row that has one is not read as if it had none.
UNREAD = ("instruction", "system", "context", "history", "tools", "images", "image", "conversations")
KNOWN = ("id", "messages", "input", "output", "completion", *PREFERENCE)


@dataclass(frozen=True)
class Conversation:
    """What is asked, and what is to be answered."""

    place: str
    """`file:line`"""
    messages: tuple[Message, ...]
    """{"role", "content"}: a system message perhaps, then user and assistant in turn, the assistant last."""
    rejected: str | None = None
    """The answer that is not preferred to the last one, in rows of preferences."""
    others: tuple[str, ...] = ()
    """Columns that are not read."""
    id: str = ""
    """The row's own, or its index."""


def conversations(rows: Iterator[Row], *, preferences: bool = False) -> Iterator[Conversation]:
    """
    The conversations of rows. Raises InputError, `file:line: what is wrong; expected …`: no or two kinds of keys, a
    key that would change what is asked, roles not in turn, a text that is blank or no text; preferences where there are
    to be none, or none where there are to be some.
    """
    for index, (place, value) in enumerate(rows):
        yield conversation(place, value, index, preferences)


def conversation(place: str, value: object, index: int, preferences: bool = False) -> Conversation:
    """One row, as `conversations`."""
    if not isinstance(value, dict):
        raise InputError(f"{place}: no object; {EXPECTED}")
    # Tables give every row every column.
    row = {key: item for key, item in value.items() if item is not None}
    kind = _kind(place, row)
    if preferences != (kind == PREFERENCE):
        found = ", ".join(map(repr, kind))
        want = "--objective dpo needs prompt, chosen and rejected" if preferences else "they are for --objective dpo"
        raise InputError(f"{place}: a row of {found}; {want}")
    others = tuple(key for key in row if key not in KNOWN)
    messages, rejected = _messages(place, row, kind, index)
    _check_turns(place, messages)
    return Conversation(place, messages, rejected, others, row_id(place, row, index))


def _kind(place: str, row: dict) -> tuple[str, ...]:
    for key in UNREAD:
        if key in row:
            raise InputError(f"{place}: the key {key!r} is not read here, and would change the row; {EXPECTED}")
    kinds = [("messages",), *PAIRS, PREFERENCE]
    found = [kind for kind in kinds if all(key in row for key in kind)]
    if len(found) != 1:
        raise InputError(f"{place}: {'two kinds of keys' if found else 'keys'} {', '.join(map(repr, row))}; {EXPECTED}")
    return found[0]


def _messages(place: str, row: dict, kind: tuple[str, ...], index: int) -> tuple[tuple[Message, ...], str | None]:
    if kind == ("messages",):
        return parse_chat(place, _bare(row), index).messages, None
    prompt = _turns(place, kind[0], row[kind[0]], "user", index)
    answer = _turns(place, kind[1], row[kind[1]], "assistant", index)
    rejected = None
    if kind == PREFERENCE:
        others = _turns(place, kind[2], row[kind[2]], "assistant", index)
        answer, others = (_without(turns, prompt) for turns in (answer, others))
        if len(answer) != 1 or len(others) != 1 or others[0]["role"] != "assistant":
            raise InputError(f"{place}: chosen and rejected differ in more than one answer; expected one answer each")
        rejected = others[0]["content"]
        if rejected == answer[0]["content"]:
            raise InputError(f"{place}: chosen and rejected are the same; expected two answers")
    return (*prompt, *answer), rejected


def _turns(place: str, key: str, value: object, role: str, index: int) -> tuple[Message, ...]:
    """A text as one message of a role, a list of messages as it is."""
    if isinstance(value, list):
        return parse_chat(f"{place}: {key}", _bare({"messages": value}), index).messages
    return ({"role": role, "content": filled_text(place, key, value)},)


def _bare(row: dict) -> dict:
    """Only the messages, keys without a value left out, which tables give every message."""
    messages = row["messages"]
    if isinstance(messages, list):
        messages = [
            {k: v for k, v in each.items() if v is not None} if isinstance(each, dict) else each for each in messages
        ]
    return {"messages": messages}


def _without(turns: tuple[Message, ...], prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns behind the prompt, where it is repeated in front of them."""
    return turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns


def _check_turns(place: str, messages: tuple[Message, ...]) -> None:
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        raise InputError(
            f"{place}: the roles are {', '.join(roles)}; expected user and assistant in turn, the user first and the "
            f"assistant last, after at most one system message"
        )
