"""Where an Optuna study keeps its trials: a journal in the run's folder, or a database that several processes share."""

import time
from pathlib import Path

import optuna
import sqlalchemy
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import SQLAlchemyError

from src.common.errors import InputError
from src.common.jsonl import repair_torn_tail
from src.common.secrets import without_passwords

JOURNAL = "study.journal"
ATTEMPTS = 5
SQLITE_SECONDS = 60
"""To wait for a database that another process is writing to."""
BEATS_PER_STALE = 4
"""Signs of life in the time after which a process is held for dead."""


def open_storage(
    url: str | None, folder: Path, stale_seconds: float, *, is_own: bool = True
) -> JournalStorage | RDBStorage:
    """
    The storage of --storage, a journal in `folder` unless given. is_own: whether the folder is this run's, which holds
    it alone: a line that a kill has torn is taken out. Raises InputError for a storage that cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if url is None:
        if is_own:
            repair_torn_tail(folder / JOURNAL)
        return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    beat = max(1, int(stale_seconds / BEATS_PER_STALE))
    waits = {"connect_args": {"timeout": SQLITE_SECONDS}} if url.startswith("sqlite") else {}
    for attempt in range(ATTEMPTS):
        try:
            storage = RDBStorage(
                url, engine_kwargs=waits, heartbeat_interval=beat, grace_period=max(beat + 1, int(stale_seconds))
            )
            if url.startswith("sqlite"):
                _lock_as_begun(storage)
            return storage
        except (ValueError, ImportError, OSError) as error:
            raise InputError(_told(url, error)) from error
        except SQLAlchemyError as error:
            # Two processes that begin at once both make the tables, and the second finds them there.
            if attempt == ATTEMPTS - 1:
                raise InputError(_told(url, error)) from error
            time.sleep(1.0)
    raise AssertionError("the last attempt returns or raises")


def _lock_as_begun(storage: RDBStorage) -> None:
    """
    Has a transaction of SQLite hold the database from its first statement. Optuna reads a trial's state FOR UPDATE,
    which SQLite does not know, before it writes the next: of two processes both would take the same trial.
    https://docs.sqlalchemy.org/en/20/dialects/sqlite.html#pysqlite-sqlite3-sql-driver-dbapi-transaction-control
    """
    sqlalchemy.event.listen(
        storage.engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None)
    )
    sqlalchemy.event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    storage.engine.dispose()


def _told(url: str, error: Exception) -> str:
    return without_passwords(f"--storage {url}: {str(error).splitlines()[0]}")
