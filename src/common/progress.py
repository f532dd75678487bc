"""The bar of a command that generates or embeds: rows done, rows and tokens a second, time left."""

import sys
import time
from types import TracebackType
from typing import Self

SECONDS_BETWEEN_UPDATES = 0.5


class Progress:
    """A context manager; the rates count what this start added, not what it found."""

    def __init__(self, total: int | None, done: int, unit: str = "task") -> None:
        """total: None where it is not known."""
        from tqdm import tqdm

        self.tokens = 0
        self._started = self._shown = time.monotonic()
        self._bar = tqdm(
            total=total, initial=done, unit=unit, file=sys.stderr, dynamic_ncols=True, mininterval=0.2, smoothing=0
        )

    @property
    def rate(self) -> float:
        """Generated tokens a second since the start."""
        return self.tokens / max(1e-9, time.monotonic() - self._started)

    def add_row(self, n: int = 1) -> None:
        self._bar.update(n)

    def add_tokens(self, n: int) -> None:
        self.tokens += n
        if time.monotonic() - self._shown >= SECONDS_BETWEEN_UPDATES:
            self._shown = time.monotonic()
            self._bar.set_postfix_str(f"{self.rate:.0f} tokens/s", refresh=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.set_postfix_str(f"{self.rate:.0f} tokens/s", refresh=False)
        self._bar.close()
