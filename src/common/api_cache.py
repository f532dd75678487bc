"""
Answers on disk: one SQLite file, a row a question. SQLite's own rollback journal rather than its write-ahead log, which
does not work between machines that share a file system.
"""

import json
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from src.common.api_types import Answer
from src.common.errors import InputError

FILE_NAME = "answers.sqlite"
SECONDS_TO_WAIT = 120.0
"""For another process that writes."""


class AnswerCache:
    """Key → answers. Several processes may use one file; every method may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError where the folder cannot be written or the file is no database."""
        self.path = folder / FILE_NAME
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=SECONDS_TO_WAIT, check_same_thread=False)
            with self._database:
                self._database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answers TEXT)")
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"{self.path}: {error}; choose another --cache_dir, or --noenable_cache") from error

    def get(self, key: str) -> list[Answer] | None:
        """The answers to a question, None where it was not asked yet."""
        with self._lock:
            row = self._database.execute("SELECT answers FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else [Answer(**values) for values in json.loads(row[0])]

    def put(self, key: str, answers: Sequence[Answer]) -> None:
        """Keeps the answers; they are on disk when this returns. What another process put there first stays."""
        # ASCII: a lone surrogate in an answer exists only as an escape.
        text = json.dumps([asdict(answer) for answer in answers])
        with self._lock, self._database:
            self._database.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, text))

    def close(self) -> None:
        """Lets go of the file."""
        self._database.close()
