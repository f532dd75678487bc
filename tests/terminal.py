"""A real pseudo-terminal with a process in it: keys go in, what the screen was sent comes out."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import tempfile
import termios
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

CODES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b[=>78]|\r")
ESC, UP, LEFT, CTRL_C, CTRL_D = b"\x1b", b"\x1b[A", b"\x1b[D", b"\x03", b"\x04"


class TerminalProcess:
    """A command in a terminal of its own; `text` is what it wrote so far, without control sequences."""

    def __init__(self, words: Sequence[str], cwd: Path, rows: int = 40, columns: int = 100) -> None:
        self.master, slave = pty.openpty()
        self.resize(rows, columns)
        environment = {**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            words, cwd=cwd, stdin=slave, stdout=slave, stderr=self._errors, env=environment,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self._written = b""
        self._seen = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def raw(self) -> bytes:
        return self._written

    @property
    def text(self) -> str:
        return CODES.sub(b"", self._written).decode("utf-8", "replace")

    @property
    def errors(self) -> str:
        """What went to standard error."""
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "replace")

    def send(self, keys: str | bytes) -> None:
        os.write(self.master, keys.encode() if isinstance(keys, str) else keys)

    def line(self, text: str) -> None:
        """Type a line and Enter; what `expect` then looks for comes after it."""
        self._seen = len(self.text)
        self.send(text + "\r")

    def expect(self, text: str, seconds: float = 120) -> str:
        """Wait until `text` is written after what was expected before; returns what was written up to it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            written = self.text
            place = written.find(text, self._seen)
            if place >= 0:
                before, self._seen = written[self._seen : place], place + len(text)
                return before
            assert self.process.poll() is None or text in self.text[self._seen :], f"ended: {self.errors}"
            time.sleep(0.02)
        raise AssertionError(f"{text!r} not in {self.text[self._seen :][-2000:]!r}")

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait(self, seconds: float = 60) -> int:
        return self.process.wait(seconds)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return
            if not data:
                return
            self._written += data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self.master)
        self._errors.close()
