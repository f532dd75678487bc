"""A chat without a terminal: a line of standard input is a question or a command, answers go to standard output."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from src.common.errors import InputError


class Pipe:
    """Ends at the first line that is wrong: what follows it would be answered otherwise than was meant."""

    def __init__(self) -> None:
        self._number = 0
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")

    def lines(self) -> Iterator[str]:
        """Lines of standard input, blank ones left out. Raises InputError for one that is not UTF-8."""
        for data in sys.stdin.buffer:
            self._number += 1
            try:
                line = data.decode("utf-8-sig" if self._number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"standard input:{self._number}: not UTF-8 at byte {error.start}; expected text"
                ) from error
            if line.strip():
                yield line

    @contextmanager
    def answering(self) -> Iterator[Callable[[], bool]]:
        """Nobody is there to stop an answer; Ctrl-C ends the command."""
        yield lambda: False

    def write(self, text: str, style: str = "") -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def say(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(f"· {line}\n")

    def refuse(self, error: InputError) -> None:
        """Raises it with the line's number."""
        raise InputError(f"standard input:{self._number}: {error}") from error

    def columns(self) -> None:
        """There are none."""
