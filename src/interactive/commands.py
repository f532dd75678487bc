"""What a line that begins with / does to a session. Each command is a function (session, argument) → lines to show."""

import difflib
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from src.common.errors import InputError
from src.common.interventions import parse_steer
from src.common.system_prompts import parted
from src.interactive.saved import load, save
from src.interactive.session import ChatSession


class Command(NamedTuple):
    """One command, without its slash."""

    usage: str
    help: str
    run: Callable[[ChatSession, str], list[str]] | None
    """None for those that answer or end the chat, which the conversation itself sees to."""


def command_of(line: str) -> tuple[str, str]:
    """(name, argument) of a line that begins with /. Raises InputError for an unknown name, with the nearest one."""
    name, _, argument = line[1:].strip().partition(" ")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        meant = f"; did you mean /{near[0]}?" if near else ""
        raise InputError(f"/{name}: no such command{meant} (/help lists them; a text may begin with a blank and /)")
    return name, unquoted(argument)


def unquoted(text: str) -> str:
    """The text without one pair of quotes around all of it, so that `""` is an empty string."""
    text = text.strip()
    is_quoted = len(text) >= 2 and text[0] in "\"'" and text.find(text[0], 1) == len(text) - 1
    return text[1:-1] if is_quoted else text


def _help(session: ChatSession, argument: str) -> list[str]:
    width = max(len(command.usage) for command in COMMANDS.values())
    return [f"{command.usage.ljust(width)}  {command.help}" for command in COMMANDS.values()] + [
        "ESC or Ctrl-C stops an answer and keeps its text; Ctrl-C twice leaves. Alt-Enter begins a new line."
    ]


def _clear(session: ChatSession, argument: str) -> list[str]:
    session.clear()
    return ["a new conversation"]


def _persona(session: ChatSession, argument: str) -> list[str]:
    persona, article = parted(argument)
    session.change(persona=persona, article=article)
    return [f"the persona is {session.label}" if persona else "no persona", *_anew(session)]


def _system(session: ChatSession, argument: str) -> list[str]:
    session.change(system=argument or None)
    return ["the system message is set" if argument else "no system message", *_anew(session)]


def _anew(session: ChatSession) -> list[str]:
    session.clear()
    return ["a new conversation begins"]


def _thinking(session: ChatSession, argument: str) -> list[str]:
    session.change(thinking=True)
    known = session.reader.marks is not None
    return ["thinking before answers" if known else "asked for, but this model's template knows no thinking"]


def _no_thinking(session: ChatSession, argument: str) -> list[str]:
    session.change(thinking=False)
    return ["no thinking before answers"]


def _tokens(session: ChatSession, argument: str) -> list[str]:
    if not (argument.isascii() and argument.isdigit() and int(argument) >= 1):
        raise InputError(f"/tokens {argument}: expected a whole number, at least 1")
    session.change(max_tokens=int(argument))
    return [f"up to {int(argument)} tokens an answer"]


def _temperature(session: ChatSession, argument: str) -> list[str]:
    try:
        value = float(argument)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise InputError(f"/temp {argument}: expected 0 or a positive number")
    session.change(temperature=value)
    return [f"temperature {value:g}" + (" (the likeliest token)" if value == 0 else "")]


def _steer(session: ChatSession, argument: str) -> list[str]:
    if argument:
        session.steer([parse_steer(argument)], [argument])
    return steering_lines(session)


def _unsteer(session: ChatSession, argument: str) -> list[str]:
    session.unsteer()
    return ["nothing steers" + (", earlier answers stay in the conversation" if session.messages else "")]


def steering_lines(session: ChatSession) -> list[str]:
    """What steers, a line each."""
    return [f"steering by {told}" for told in session.steering.told] or ["nothing steers"]


def _entropy(session: ChatSession, argument: str) -> list[str]:
    session.change(entropy=not session.manner.entropy)
    return ["tokens are coloured by entropy" if session.manner.entropy else "no colours"]


def _model(session: ChatSession, argument: str) -> list[str]:
    manner, model = session.manner, session.model
    known = {"model": session.config.model_id} | {name: value for name, value in model.facts.items() if value}
    shown = [f"{name.replace('_', ' ')}: {value}" for name, value in known.items()]
    return [
        *shown,
        f"layers: {model.n_layers}, context: {model.context_length or 'without a bound'}",
        f"persona: {manner.persona or 'none'}, system message: {manner.system or 'none'}",
        f"temperature {manner.temperature:g}, up to {manner.max_tokens} tokens, "
        f"thinking {'on' if manner.thinking else 'off'}",
        *steering_lines(session),
    ]


def _save(session: ChatSession, argument: str) -> list[str]:
    if not argument:
        raise InputError("/save: expected a file name, for example /save talk.jsonl")
    session.saved = save(session, _path("/save", argument), session.saved)
    return [f"wrote {session.saved}"]


def _load(session: ChatSession, argument: str) -> list[str]:
    if not argument:
        raise InputError("/load: expected the name of a saved chat, for example /load talk.jsonl")
    return load(session, _path("/load", argument))


def _path(command: str, argument: str) -> Path:
    try:
        path = Path(argument).expanduser()
    except RuntimeError as error:
        raise InputError(f"{command} {argument}: {error}; write the folder out") from error
    if not path.name or "\0" in argument:
        raise InputError(f"{command} {argument}: no name of a file; expected one, for example talk.jsonl")
    return path


COMMANDS = {
    "help": Command("/help", "this list", _help),
    "clear": Command("/clear", "a new conversation", _clear),
    "persona": Command("/persona NAME", 'who answers; "" for nobody in particular', _persona),
    "system": Command("/system TEXT", 'the system message; "" for none', _system),
    "thinking": Command("/thinking", "thinking before answers, where the model knows it", _thinking),
    "nothinking": Command("/nothinking", "no thinking before answers", _no_thinking),
    "tokens": Command("/tokens N", "at most N tokens an answer", _tokens),
    "temp": Command("/temp X", "sampling temperature; 0 takes the likeliest token", _temperature),
    "steer": Command("/steer FILE:LAYERS:COEF", "add directions to the hidden states; several act together", _steer),
    "unsteer": Command("/unsteer", "no interventions", _unsteer),
    "compare": Command("/compare [QUESTION]", "steered and unsteered answers side by side; not kept", None),
    "entropy": Command("/entropy", "colours for the entropy of tokens, on or off", _entropy),
    "model": Command("/model", "the model and all settings", _model),
    "save": Command("/save FILE", "write the conversation as JSONL", _save),
    "load": Command("/load FILE", "go on with a saved conversation", _load),
    "retry": Command("/retry", "the last question again, with other draws", None),
    "quit": Command("/quit", "leave (also Ctrl-D)", None),
}
