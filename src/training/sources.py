"""
Datasets as people bring them: one JSON file of named lists, a folder with a file or several a split, or a single file.
Every row comes with its split and its place (`file:line`).
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from src.common.errors import InputError
from src.common.json_rows import json_lists, json_rows
from src.common.row_files import Row, arrow_rows, jsonl_rows, parquet_rows, read_text, require_file

SPLITS = ("train", "validation", "test")
NAMES = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
         "dev": "validation", "eval": "validation", "test": "test"}  # fmt: skip
TABLES = (".jsonl", ".ndjson", ".parquet", ".arrow")
SUFFIXES = (".json", *TABLES)
FORMATS = (
    "a .json file of train / validation / test lists, a .jsonl, .parquet or .arrow file, or a folder with "
    "train.json, validation.jsonl, test-00000-of-00001.parquet or the like"
)


@dataclass(frozen=True)
class Source:
    """A dataset on disk."""

    files: tuple[Path, ...]
    """All files that are read, in order."""
    splits: dict[str, Callable[[], Iterator[Row]]]
    """Split → its rows with their places, read anew at each call; only splits that are there, `train` first."""


def open_source(path: Path) -> Source:
    """
    A dataset of any format. Raises InputError: nothing there, an unknown format or split, an empty split, two formats
    for one split.
    """
    if path.is_dir():
        return _folder(path)
    require_file(path)
    if path.suffix.lower() == ".json" and _begins_with(path, "{"):
        return _json_of_splits(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: not a format for datasets; expected {FORMATS}")
    return Source((path,), {"train": partial(_rows_of, (path,), "train")})


def _begins_with(path: Path, mark: str) -> bool:
    return read_text(path).lstrip()[:1] == mark


def _json_of_splits(path: Path) -> Source:
    lists = json_lists(path)
    splits = {}
    for name, rows in lists.items():
        split = NAMES.get(name)
        if split is None or split in splits:
            raise InputError(f"{path}: the list {name!r}; expected each of {', '.join(SPLITS)} at most once")
        if not rows:
            raise InputError(f"{path}: the split {name!r} is empty; expected at least one row, or leave it out")
        splits[split] = partial(iter, rows)
    return Source((path,), _in_order(path, splits))


def _in_order(path: Path, splits: dict[str, Callable[[], Iterator[Row]]]) -> dict[str, Callable[[], Iterator[Row]]]:
    if "train" not in splits:
        raise InputError(f"{path}: there is no train split in it; expected {FORMATS}")
    return {name: splits[name] for name in SPLITS if name in splits}


def _folder(folder: Path) -> Source:
    by_split = _split_files(folder)
    for split, files in by_split.items():
        if len({file.suffix.lower() for file in files}) > 1:
            raise InputError(
                f"{folder}: {split} is there in two formats ({', '.join(f.name for f in files)}); keep one"
            )
    splits = {split: partial(_rows_of, tuple(files), split) for split, files in by_split.items()}
    splits = _in_order(folder, splits)
    return Source(tuple(file for split in splits for file in by_split[split]), splits)


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """Split → files, from the names of files, or of the folders that they are in."""
    found: dict[str, list[Path]] = {}
    nameless = []
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        if file.suffix.lower() not in SUFFIXES or any(part.startswith(".") for part in relative.parts):
            continue
        split = _split_of(relative)
        if split and (file.suffix.lower() in TABLES or len(relative.parts) == 1):
            found.setdefault(split, []).append(file)
        elif file.suffix.lower() in TABLES or _begins_with(file, "["):
            # No list: what is said about the other files, as `datasets` does about its own.
            (found.setdefault(split, []) if split else nameless).append(file)
    if not found and nameless and len({file.suffix.lower() for file in nameless}) == 1:
        return {"train": nameless}
    if nameless and found:
        raise InputError(f"{nameless[0]}: its name says no split; expected one of {', '.join(SPLITS)} in front")
    if not found:
        raise InputError(f"{folder}: no dataset in it; expected {FORMATS}")
    return found


def _split_of(relative: Path) -> str | None:
    """The split that a file's name, or the folder that it is in, begins with."""
    for name in (relative.stem, *(part for part in relative.parts[:-1])):
        word = re.match(r"[a-z]+(?![a-z])", name.lower())
        if word and word.group() in NAMES:
            return NAMES[word.group()]
    return None


def _rows_of(files: tuple[Path, ...], split: str) -> Iterator[Row]:
    is_empty = True
    for file in files:
        for row in _reader(file)(file):
            is_empty = False
            yield row
    if is_empty:
        raise InputError(f"{files[0]}: the split {split!r} is empty; expected at least one row, or leave it out")


def _reader(file: Path) -> Callable[[Path], Iterator[Row]]:
    readers = {
        ".json": json_rows, ".jsonl": jsonl_rows, ".ndjson": jsonl_rows,
        ".parquet": partial(parquet_rows, check=_any), ".arrow": partial(arrow_rows, check=_any),
    }  # fmt: skip
    return readers[file.suffix.lower()]


def _any(place: str, columns: list[str]) -> None:
    """Columns are looked at row by row."""
