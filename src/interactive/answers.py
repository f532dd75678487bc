"""Answers on a screen: label, text as it comes, thinking dimmed, tokens coloured by their entropy, two side by side."""

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Protocol

from src.interactive.session import Answer, ChatSession
from src.models.streaming import TextStream

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
LABEL, DIM, PLAIN = "bold", "#888888 italic", ""
ENTROPY_COLORS = ((0.5, "#1a9850"), (1.0, "#7aa41c"), (2.0, "#c9a300"), (3.0, "#e8702a"), (float("inf"), "#d73027"))
"""Upper bound in nats, colour."""
LEAST_COLUMNS = 60
"""Narrower than this, two answers stand one below the other."""


class Screen(Protocol):
    """Where answers are shown."""

    def write(self, text: str, style: str = ...) -> None: ...

    def say(self, lines: Sequence[str]) -> None: ...

    def columns(self) -> int | None: ...


def harmless(text: str) -> str:
    """The text with control characters made visible: what a model writes must not steer the terminal."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def entropy_color(entropy: float) -> str:
    """The style of a token with this entropy in nats."""
    return next(color for bound, color in ENTROPY_COLORS if entropy < bound or bound == float("inf"))


def show_legend(screen: Screen) -> None:
    """What the colours mean."""
    screen.write("entropy in nats: ", DIM)
    lower = 0.0
    for bound, color in ENTROPY_COLORS:
        screen.write(f"{lower:g} to {bound:g} " if bound < float("inf") else f"above {lower:g}", color)
        lower = bound
    screen.write("\n")


class AnswerPrinter:
    """Shows one answer while it is made."""

    def __init__(self, session: ChatSession, screen: Screen) -> None:
        self._session = session
        self._screen = screen
        self._text = TextStream(session.model.decode)
        self._tokens: list[int] = []
        self._held: list[float] = []
        self._style = PLAIN
        self._header = ""

    def begin(self, header: str) -> None:
        """header: what the prompt ends with."""
        self._header = header
        self._screen.write(f"{harmless(self._session.label)}: ", LABEL)

    def add(self, name: str, token: int, entropy: float) -> None:
        """One more token. Text whose character is not finished waits, and is coloured by the highest entropy in it."""
        self._tokens.append(token)
        self._held.append(entropy)
        self._style = self._style_now()
        text = self._text.add(token)
        if text:
            self._screen.write(harmless(text), self._style)
            self._held = []

    def finish(self, answer: Answer) -> None:
        """The rest of the text, and what there is to say of how it ended."""
        self._screen.write(harmless(self._text.rest()), self._style)
        self._screen.write("\n")
        if self._session.manner.entropy and answer.result.entropy:
            n = len(answer.result.entropy)
            self._screen.say([f"mean entropy {fmean(answer.result.entropy):.4g} nats over {n} tokens"])
        self._screen.say(ending(answer, self._session))

    def _style_now(self) -> str:
        if self._session.manner.entropy:
            return entropy_color(max(self._held))
        reader = self._session.reader
        if reader.marks is None:
            return PLAIN
        inside = reader.read(self._tokens, self._header).num_tokens == len(self._tokens)
        return DIM if inside else PLAIN


def ending(answer: Answer, session: ChatSession) -> list[str]:
    """What to say of an answer that did not end by itself."""
    n = len(answer.result.token_ids)
    if answer.result.finish_reason == "interrupted":
        said = [f"stopped after {n} tokens" if n else "stopped before the first token"]
    elif answer.fills_context:
        said = [f"the context of {session.model.context_length} tokens is full; /clear begins anew"]
    elif answer.result.finish_reason == "length":
        said = [f"cut at {n} tokens; /tokens N allows more"]
    else:
        said = []
    if not answer.is_kept:
        why = "the thinking did not end" if answer.span.truncated and n else "there is no text"
        said.append(f"{why}, so that question and answer are not kept; /retry asks again")
    return said


def show_pair(question: str, steered: Answer, unsteered: Answer, screen: Screen) -> None:
    """Two answers side by side, or one below the other where the screen is narrow or none."""
    answers = {"steered": steered, "unsteered": unsteered}
    texts = {name: harmless(answer.result.text) for name, answer in answers.items()}
    width = screen.columns()
    if width is None or width < LEAST_COLUMNS:
        for name, text in texts.items():
            screen.write(f"{name}: ", LABEL)
            screen.write(f"{text}\n")
    else:
        screen.write(_table(harmless(question), texts, width))
    for name, answer in answers.items():
        if answer.result.finish_reason != "stop":
            how = "stopped" if answer.result.finish_reason == "interrupted" else "cut"
            screen.say([f"{name}: {how} after {len(answer.result.token_ids)} tokens"])


def _table(question: str, texts: dict[str, str], width: int) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Text, not markup: an answer may hold square brackets.
    table = Table(title=Text(question), title_justify="left", box=SIMPLE_HEAD, expand=True, padding=(0, 2, 0, 0))
    for name in texts:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*map(Text, texts.values()))
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()
