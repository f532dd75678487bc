"""
The folder of a run as other processes see it: made, locked by one process at a time, and either fresh or the same
run's. A different configuration in it is refused with the differing keys and both values.
"""

import fcntl
import json
import os
import socket
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from src.common.errors import InputError
from src.common.files import TEMPORARY_SUFFIX

CONFIG, PROVENANCE, DONE, LOCK, SHARDS = "config.json", "provenance.json", "DONE", ".lock", "shards"
# What a folder may hold that has no config.json yet: a first start that was killed, and workers' folders.
BEFORE_CONFIG = {LOCK, PROVENANCE, "logs", SHARDS}

# What asking an API leaves even where no question had an answer.
BESIDE_ROWS = {"failures.jsonl", "api-costs.jsonl", "cache", "prompt-history"}


def make_folder(folder: Path, may_hold: Sequence[str] = ()) -> None:
    """
    Makes the folder and shows that it can be written. `may_hold`: patterns of files that are no reason to refuse it.
    Raises InputError where it cannot, and where files of somebody else are in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CONFIG).exists():
            read_run(folder)
        else:
            _refuse_other_files(folder, may_hold)
        (folder / LOCK).open("a").close()
    except OSError as error:
        raise InputError(f"--output_dir {folder}: {error.strerror}; choose a folder that you can write") from error


def _refuse_other_files(folder: Path, may_hold: Sequence[str]) -> None:
    names = [path.name for path in folder.iterdir()]
    foreign = [name for name in names if not _is_ours(name) and not any(fnmatch(name, each) for each in may_hold)]
    if foreign:
        raise InputError(
            f"--output_dir {folder}: it has no {CONFIG} but holds {', '.join(sorted(foreign)[:3])}"
            f"{' …' if len(foreign) > 3 else ''}; choose a new or an empty folder"
        )


def has_results(folder: Path) -> bool:
    """Whether the run in the folder has written anything of its own yet, be it a single row."""
    own = {CONFIG, DONE, *BEFORE_CONFIG, *BESIDE_ROWS} - {SHARDS}
    return any(path.name not in own and (path.is_dir() or path.stat().st_size > 0) for path in folder.iterdir())


def _is_ours(name: str) -> bool:
    return name in BEFORE_CONFIG or (name.startswith(".") and name.endswith(TEMPORARY_SUFFIX))


def lock_folder(folder: Path) -> IO[str]:
    """
    Takes the folder for this process, until the returned file is closed or the process ends, however it ends.
    Raises InputError where another process has it.
    """
    file = (folder / LOCK).open("r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = file.read().strip()
        file.close()
        raise InputError(
            f"--output_dir {folder}: in use by {holder or 'another process'}; wait for it, or choose another folder"
        ) from error
    except OSError as error:
        file.close()
        raise InputError(
            f"--output_dir {folder}: {error.strerror}; choose a file system that can lock files"
        ) from error
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    What config.json ({"command", "config"}) and provenance.json of a run folder hold.
    Raises InputError where one is missing or was written by something else.
    """
    return _read_object(folder / CONFIG, {"command", "config"}), _read_object(
        folder / PROVENANCE, {"inputs", "sessions"}
    )


def _read_object(path: Path, keys: set[str]) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict) or not keys <= value.keys():
        raise InputError(f"{path}: has no {' and '.join(sorted(keys))}; {path.parent} is not a run folder")
    return value


def read_json(path: Path) -> Any:
    """One of a run folder's JSON files. Raises InputError where it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {path.parent} is not a run folder") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}; {path.parent} is not a run folder") from error


def comparable(config: Mapping[str, Any], row_fields: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """
    What must be equal for a run to go on: every field that affects rows (its default where an older config lacks it),
    with the path of an input file replaced by what the file holds, and the input files that no field names.
    """
    values = {name: config.get(name, default) for name, default in row_fields.items()}
    named = {path for value in values.values() for path in (value if isinstance(value, list) else [value])}
    others = {path: _content(path, inputs) for path in inputs if path not in named}
    return {name: _content(value, inputs) for name, value in values.items()} | others


def _content(value: Any, inputs: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_content(item, inputs) for item in value]
    return f"sha256 {inputs[value]}" if isinstance(value, str) and value in inputs else value


def refuse_differences(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises InputError naming each key whose values differ, with both."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if keys:
        told = "; ".join(f"{key} was {_shown(old.get(key))}, is now {_shown(new.get(key))}" for key in keys)
        raise InputError(f"--output_dir {folder}: it holds another run: {told}; choose another --output_dir")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:99]}…"
