"""Log records to a file with UTC times, and the sparse ones of our own code to stderr."""

import logging
import sys
import time
from pathlib import Path

from src.common.secrets import withhold

FORMAT = "%(asctime)s [%(levelname)s] (%(name)s) %(message)s"
# A command run with `-m` logs as __main__.
OUR_LOGGERS = ("src", "__main__")
# A record with this attribute stays out of the terminal: `LOGGER.info(text, extra={FILE_ONLY: True})`.
FILE_ONLY = "file_only"


class WithholdingFormatter(logging.Formatter):
    """Takes keys out of whole records, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return withhold(super().format(record))


def start_logging(log_path: Path | None) -> list[logging.Handler]:
    """
    Our INFO records and everybody's warnings go to stderr and, with UTC times, to `log_path` if one is given.
    Returns the handlers, for `stop_logging`.
    """
    to_terminal = logging.StreamHandler(sys.stderr)
    to_terminal.setFormatter(WithholdingFormatter("%(message)s"))
    to_terminal.addFilter(lambda record: not hasattr(record, FILE_ONLY))
    handlers: list[logging.Handler] = [to_terminal]
    if log_path is not None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(log_path, encoding="utf-8", errors="backslashreplace")
        formatter = WithholdingFormatter(FORMAT)
        formatter.converter = time.gmtime
        to_file.setFormatter(formatter)
        handlers.append(to_file)
    for handler in handlers:
        logging.getLogger().addHandler(handler)
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    return handlers


def stop_logging(handlers: list[logging.Handler]) -> None:
    """Removes and closes the handlers that `start_logging` returned."""
    for handler in handlers:
        logging.getLogger().removeHandler(handler)
        handler.close()
