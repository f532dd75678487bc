"""A chat in a terminal: line editing, keys that stop an answer, styled text. prompt_toolkit does what it can."""

import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest

from prompt_toolkit import PromptSession, print_formatted_text
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.input import Input, create_input
from prompt_toolkit.input.typeahead import store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPress, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import create_output

from src.common.errors import InputError
from src.interactive.answers import DIM, harmless

PROMPT = "you: "
SECONDS_OF_A_SEQUENCE = 0.05
"""An arrow key is ESC and more bytes at once; ESC with nothing behind it for so long is the ESC key."""
ERROR = "ansired"
TYPED_AHEAD = (Keys.ControlM, Keys.ControlJ, Keys.ControlH)


class Terminal:
    """Reads questions and shows answers on standard input and output, which must be a terminal's."""

    def __init__(self, commands: Sequence[str]) -> None:
        self._input = create_input()
        self._output = create_output()
        self._prompt: PromptSession[str] = PromptSession(
            input=self._input, output=self._output, key_bindings=_bindings(), complete_while_typing=False,
            completer=WordCompleter([f"/{name}" for name in commands], sentence=True),
        )  # fmt: skip
        self._interrupted = False

    def lines(self) -> Iterator[str]:
        """Lines as they are typed, blank ones left out, until Ctrl-D or the second Ctrl-C with no line between."""
        while True:
            try:
                line = self._prompt.prompt(PROMPT)
            except EOFError:
                return
            except KeyboardInterrupt:
                if self._interrupted:
                    return
                self._interrupted = True
                self.say(["Ctrl-C again leaves"])
                continue
            self._interrupted = False
            if _has_surrogates(line):
                self.refuse(InputError("the line holds bytes that are not UTF-8; expected text"))
            elif line.strip():
                yield line

    @contextmanager
    def answering(self) -> Iterator[Callable[[], bool]]:
        """Within the context keys are watched; yields what says whether the answer is to stop."""
        keys = KeyWatch(self._input)
        before = signal.signal(signal.SIGINT, lambda number, frame: keys.interrupt())
        try:
            with self._input.raw_mode():
                try:
                    yield keys.should_stop
                finally:
                    keys.close()
        finally:
            signal.signal(signal.SIGINT, before)
            self._interrupted = keys.interrupted

    def write(self, text: str, style: str = "") -> None:
        if text:
            print_formatted_text(FormattedText([(style, text)]), end="", flush=True, output=self._output)

    def say(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(f"· {harmless(line)}\n", DIM)

    def refuse(self, error: InputError) -> None:
        self.write(f"{harmless(str(error))}\n", ERROR)

    def columns(self) -> int:
        """As wide as the window is now."""
        return self._output.get_size().columns


class KeyWatch:
    """What is typed while an answer is made: ESC and Ctrl-C stop it, text is kept for the next prompt."""

    def __init__(self, source: Input) -> None:
        self._source = source
        self._stopped = False
        self._heard_at = time.monotonic()
        self.interrupted = False
        """Whether it was Ctrl-C."""

    def should_stop(self) -> bool:
        """Look, without waiting, whether ESC or Ctrl-C was pressed since the beginning."""
        if not self._stopped:
            self._take(self._pressed())
        return self._stopped

    def interrupt(self) -> None:
        """As if Ctrl-C was pressed."""
        self._stopped = self.interrupted = True

    def close(self) -> None:
        """Give up the beginning of a key that never came whole."""
        self._source.flush_keys()

    def _pressed(self) -> list[KeyPress]:
        if select.select([self._source.fileno()], [], [], 0)[0]:
            self._heard_at = time.monotonic()
            return self._source.read_keys()
        quiet = time.monotonic() - self._heard_at >= SECONDS_OF_A_SEQUENCE
        return self._source.flush_keys() if quiet else []

    def _take(self, keys: Sequence[KeyPress]) -> None:
        for key, following in zip_longest(keys, keys[1:]):
            if key.key == Keys.ControlC:
                self.interrupt()
            elif key.key == Keys.Escape:
                # A key that prompt_toolkit does not know is an ESC too, with the rest of its sequence behind.
                self._stopped |= following is None or following.data not in ("[", "O")
        store_typeahead(self._source, [key for key in keys if not isinstance(key.key, Keys) or key.key in TYPED_AHEAD])


def _has_surrogates(line: str) -> bool:
    # What prompt_toolkit cannot decode it hands on as surrogates, which no tokenizer and no file takes.
    return any("\ud800" <= character <= "\udfff" for character in line)


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings
