"""Chats as files: one chat a file, in the form that every command reads as chats, with who answered and how."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.common.errors import InputError
from src.common.files import encode_json, write_text_atomic
from src.common.jsonl import read_jsonl
from src.common.rows import read_chats
from src.interactive.session import ChatSession

SUFFIX = ".jsonl"


def save(session: ChatSession, path: Path, earlier: Path | None) -> Path:
    """
    Write the conversation; returns the path, with `.jsonl` where it had no ending. earlier: the file that this session
    wrote before, the only one that is replaced. Raises InputError: nothing to save, another ending, a file that is
    there, a folder that cannot be written.
    """
    path = path if path.suffix else path.with_name(path.name + SUFFIX)
    if path.suffix != SUFFIX:
        raise InputError(f"/save {path}: expected a name that ends in {SUFFIX}")
    if not session.messages:
        raise InputError("/save: nothing was asked yet; there is nothing to save")
    if path.exists() and path != earlier:
        raise InputError(f"/save {path}: there is such a file already; choose another name")
    manner = session.manner
    system = [{"role": "system", "content": manner.system}] if manner.system else []
    row = {
        "id": path.stem,
        "messages": [*system, *session.messages],
        "persona": manner.persona,
        "article": manner.article,
        "thinking_mode": manner.thinking,
        "temperature": manner.temperature,
        "max_tokens": manner.max_tokens,
        "seed": session.config.seed,
        "steer": session.steering.told,
        "model_id": session.config.model_id,
        "model_fingerprint": session.model.facts.get("model_fingerprint"),
    }
    try:
        write_text_atomic(path, encode_json(row) + "\n")
    except OSError as error:
        raise InputError(f"/save {path}: {error.strerror}; choose a folder that exists and can be written") from error
    return path


def load(session: ChatSession, path: Path) -> list[str]:
    """
    Go on with a saved chat: its conversation, persona and system message. Returns what to tell: interventions and the
    model are not taken from the file, and where they differ that is said.

    Raises InputError for a file that is no chat, that holds several, or whose last message is no answer; the
    conversation is then as it was.
    """
    chats = read_chats(path)
    row = next(row for _, row in read_jsonl(path)) if path.suffix == SUFFIX else {}
    if len(chats) != 1:
        raise InputError(f"/load {path}: {len(chats)} chats; expected one")
    messages = [dict(message) for message in chats[0].messages]
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
    if [m["role"] for m in messages] != ["user", "assistant"] * (len(messages) // 2) or not messages:
        raise InputError(f"/load {path}: expected questions and answers in turn, an answer the last")
    persona, article = (_text(path, row, name) for name in ("persona", "article"))
    session.change(persona=persona, article=article or "", system=system)
    session.go_on_with(messages)
    return [f"{len(messages) // 2} questions and answers with {session.label}", *_differences(session, row)]


def _text(path: Path, row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise InputError(f"/load {path}: {name} is {value!r}; expected text")
    return value or None


def _differences(session: ChatSession, row: Mapping[str, Any]) -> list[str]:
    found = []
    saved, ours = row.get("model_fingerprint"), session.model.facts.get("model_fingerprint")
    if saved and saved != ours:
        found.append(f"it was had with another model, {row.get('model_id')}")
    if row.get("steer", []) != session.steering.told:
        then, now = (", ".join(map(str, told)) or "nothing" for told in (row.get("steer") or [], session.steering.told))
        found.append(f"its answers were steered by {then}, the next ones by {now}")
    return found
