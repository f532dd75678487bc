"""A signal to stop, heeded between two steps, where a checkpoint can be made."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOGGER = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Which signal has asked for the end, if one has."""

    def __init__(self) -> None:
        self.name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Within the context SIGTERM and SIGUSR1 are only noted; a scheduler may send them several times."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.name is None:
            self.name = signal.Signals(number).name
            LOGGER.info("%s: stopping after this step, with a checkpoint", self.name)
