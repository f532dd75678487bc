"""The loop of a chat: a line is a command or a question, until there are no more."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from src.common.errors import InputError
from src.interactive.answers import AnswerPrinter, show_legend, show_pair
from src.interactive.commands import COMMANDS, command_of
from src.interactive.session import Answer, ChatSession, Watch


class Place(Protocol):
    """Where a chat happens: a terminal, or two pipes."""

    def lines(self) -> Iterator[str]: ...

    def answering(self) -> AbstractContextManager[Callable[[], bool]]: ...

    def refuse(self, error: InputError) -> None: ...

    def write(self, text: str, style: str = ...) -> None: ...

    def say(self, lines: Sequence[str]) -> None: ...

    def columns(self) -> int | None: ...


def converse(session: ChatSession, place: Place) -> None:
    """
    Go through the lines of `place` until they end or one is /quit. What is wrong with a line is told to `place`, which
    goes on or raises it again; the session is then as it was before the line.
    """
    for line in place.lines():
        try:
            if not _follow(line, session, place):
                return
        except InputError as error:
            place.refuse(error)


def _follow(line: str, session: ChatSession, place: Place) -> bool:
    """Do what one line says; returns whether the chat goes on."""
    if not line.startswith("/"):
        _answer(place, session, lambda watch: session.ask(line.strip(), watch))
        return True
    name, argument = command_of(line)
    if name == "quit":
        return False
    if name == "retry":
        if session.manner.temperature == 0:
            place.say(["at temperature 0 the answer stays the same; /temp X changes that"])
        _answer(place, session, session.retry)
    elif name == "compare":
        _compare(place, session, argument or None)
    else:
        run = COMMANDS[name].run
        assert run is not None, f"nothing does /{name}"
        place.say(run(session, argument))
        if name == "entropy" and session.manner.entropy:
            show_legend(place)
    return True


def _answer(place: Place, session: ChatSession, ask: Callable[[Watch], Answer]) -> None:
    printer = AnswerPrinter(session, place)
    with place.answering() as should_stop:
        answer = ask(Watch(on_begin=printer.begin, on_token=printer.add, should_stop=should_stop))
    printer.finish(answer)


def _compare(place: Place, session: ChatSession, question: str | None) -> None:
    place.say(["answering with and without steering …"])
    with place.answering() as should_stop:
        question, steered, unsteered = session.compare(question, Watch(should_stop=should_stop))
    show_pair(question, steered, unsteered, place)
