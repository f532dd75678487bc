"""Files that appear whole: temporary name in the same folder, fsync, rename."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

TEMPORARY_SUFFIX = ".tmp"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@contextlib.contextmanager
def open_atomic(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """
    Opens a temporary file ("w" for UTF-8 text, "wb" for bytes) that takes the name `path` when the block ends. When the
    block raises, the temporary file is removed and whatever was at `path` stays.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX, dir=path.parent)
    temporary = Path(name)
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    try:
        with os.fdopen(handle, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read.
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text_atomic(path: Path, text: str) -> None:
    """Writes UTF-8 text whole or not at all."""
    with open_atomic(path) as file:
        file.write(text)


def write_json_atomic(path: Path, value: Any) -> None:
    """Writes indented JSON whole or not at all. Raises ValueError for NaN and infinity, which are not JSON."""
    write_text_atomic(path, encode_json(value, indent=2) + "\n")


def encode_json(value: Any, indent: int | None = None) -> str:
    """JSON text that UTF-8 can encode, readable where it can be. Raises ValueError for NaN and infinity."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    # A lone surrogate, which a tokenizer can produce, exists in UTF-8 JSON only as an escape.
    return text if not LONE_SURROGATE.search(text) else json.dumps(value, indent=indent, allow_nan=False)


def sync_files(folder: Path) -> None:
    """The files below a folder onto the disk itself."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safe_name(name: str) -> str:
    """A model's or dataset's name as part of a file name: `/` and each run of white space become `_`."""
    return re.sub(r"/|\s+", "_", name)
