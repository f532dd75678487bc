"""The rows of a dataset in order, streamed: `take` the next ones, or `skip` them without decoding where that can be."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

from src.common.errors import InputError
from src.common.hub_rows import hub_rows
from src.common.json_rows import json_rows
from src.common.jsonl import decode_row
from src.common.provenance import hash_inputs
from src.common.row_files import Row, csv_rows, parquet_rows, require_file

JSONL, OTHERS = (".jsonl", ".ndjson"), (".parquet", ".csv", ".json")
IN_FOLDERS = (".parquet", *JSONL, ".csv")
"""Not .json: beside data such files are cards and settings."""
HUB_NAME = re.compile(r"^[\w-][\w.-]*/[\w.-]+$")
"""Without the prefix hub:, which a name without an owner needs."""
SPLITS = {
    **{"train": "train", "training": "train", "test": "test"},
    **{"validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"},
}
"""What files of a split are called, and the split."""


class SourceRow(NamedTuple):
    """A row with where it stands."""

    place: str
    source: str
    """The file's name, below the folder where one was given; or hub:NAME."""
    value: object


class RowStream(Protocol):
    """What a source opens as."""

    def take(self, count: int) -> list[SourceRow]:
        """The next rows, fewer only at the end."""

    def skip(self, count: int) -> int:
        """Passes over the next rows; how many there were."""


@dataclass(frozen=True)
class Source:
    """A dataset: local files in order, or what the `datasets` library knows, of the hub or a folder."""

    name: str
    files: tuple[Path, ...]
    folder: Path | None = None
    hub: str | None = None
    """As hub:NAME[:SUBSET[:SPLIT]]; `files` are those of a local folder then, none of the hub."""
    commit: str | None = None
    """Of the hub's repository."""

    def open(self) -> "Chain":
        """A stream from the first row on. Raises InputError as the readers of `src.common.row_files`."""
        if self.hub:
            return Chain([("", _Iterated(hub_rows(self.hub, _any_columns, self.commit), self.hub))])
        return Chain([(str(path), _opened(path, self._shown(path))) for path in self.files])

    def count(self) -> int | None:
        """Its rows, where they can be counted without decoding them."""
        if self.hub:
            return None
        counts = [_count(path) for path in self.files]
        return None if None in counts else sum(counts)

    def content(self) -> dict[str, str]:
        """What identifies its rows: the sha256 of each file by its shown name; the hub's name and commit."""
        hashes = hash_inputs(self.files)
        named = {"hub": self.hub, "commit": self.commit}
        found = {name: value for name, value in named.items() if value}
        return found | {self._shown(path): hashes[str(path)] for path in self.files}

    def _shown(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix() if self.folder else path.name


def find_source(dataset_path: str, subset: str | None, split: str | None, revision: str | None = None) -> Source:
    """
    The dataset that a path or a name means; of a hub dataset the commit that `revision` is now. Raises InputError: no
    such file, a folder without data, with data of several kinds or of another split, an unknown format, a subset or
    revision of local files, a hub that does not answer.
    """
    path = Path(dataset_path).expanduser()
    if dataset_path.startswith("hub:") or (not path.exists() and _may_be_hub(dataset_path)):
        name = dataset_path.removeprefix("hub:")
        return _hub_source(name, subset, split, revision)
    if revision:
        raise InputError(f"--dataset_revision {revision}: {dataset_path} is local; only hub datasets have revisions")
    if subset:
        raise InputError(f"--subset {subset}: {dataset_path} is local; only hub datasets have subsets")
    if path.is_dir():
        files = _files_of(path)
        _refuse_other_splits(path, files, split)
        return Source(path.resolve().name, tuple(files), folder=path)
    require_file(path)
    if path.suffix.lower() not in (*JSONL, *OTHERS):
        raise InputError(f"--dataset_path {path}: not a format for rows; expected .parquet, .jsonl, .csv or .json")
    return Source(path.stem, (path,))


def _hub_source(name: str, subset: str | None, split: str | None, revision: str | None) -> Source:
    source = Source(name, (), hub=":".join(["hub", name, subset or "", split or ""]).rstrip(":"))
    # What else the name may hold is told by the reader.
    folder = Path(name.split(":")[0]).expanduser()
    if folder.is_dir():
        if revision:
            raise InputError(f"--dataset_revision {revision}: {folder} is a folder; only the hub has revisions")
        return replace(source, folder=folder, files=tuple(sorted(p for p in folder.rglob("*") if p.is_file())))
    from src.models.hub import dataset_facts

    return replace(source, commit=dataset_facts(name.split(":")[0], revision, "--dataset_path").commit)


def _refuse_other_splits(folder: Path, files: Sequence[Path], split: str | None) -> None:
    """Files that are named by another split are not rows of this one."""
    for path in files if split else []:
        words = re.findall("[a-z]+", path.relative_to(folder).as_posix().lower())
        found = {SPLITS[word] for word in words if word in SPLITS}
        if found and SPLITS.get(split.lower(), split) not in found:
            raise InputError(
                f"--split {split}: {path} is named by the split {min(found)}, and all files of a folder are embedded; "
                f"give --dataset_path the file or the folder of the split"
            )


def _may_be_hub(name: str) -> bool:
    return bool(HUB_NAME.match(name)) and Path(name).suffix.lower() not in (*JSONL, *OTHERS)


def _files_of(folder: Path) -> list[Path]:
    found = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in IN_FOLDERS and not path.name.startswith(".")
    )
    kinds = sorted({".jsonl" if path.suffix.lower() in JSONL else path.suffix.lower() for path in found})
    if not found:
        raise InputError(f"--dataset_path {folder}: no {', '.join(IN_FOLDERS)} file in it; expected files of one kind")
    if len(kinds) > 1:
        raise InputError(f"--dataset_path {folder}: it holds files of several kinds, {' and '.join(kinds)}; name one")
    return found


def _any_columns(place: str, names: list[str]) -> None:
    pass


class Chain:
    """The rows of several streams, one after another."""

    def __init__(self, parts: Sequence[tuple[str, RowStream]]) -> None:
        self._parts = list(parts)
        self._ahead: list[SourceRow] = []

    def take(self, count: int) -> list[SourceRow]:
        """The next rows, fewer only at the end."""
        rows, self._ahead = self._ahead[:count], self._ahead[count:]
        while len(rows) < count and self._parts:
            more = self._parts[0][1].take(count - len(rows))
            rows += more
            if not more:
                self._parts.pop(0)
        return rows

    def skip(self, count: int) -> int:
        """Passes over the next rows; how many there were."""
        passed = min(count, len(self._ahead))
        self._ahead = self._ahead[passed:]
        while passed < count and self._parts:
            more = self._parts[0][1].skip(count - passed)
            passed += more
            if not more:
                self._parts.pop(0)
        return passed

    def is_at_end(self) -> bool:
        """Whether no row is left."""
        if not self._ahead:
            self._ahead = self.take(1)
        return not self._ahead


def _opened(path: Path, shown: str) -> RowStream:
    match path.suffix.lower():
        case ".parquet":
            return _Parquet(path, shown)
        case ".csv":
            return _Iterated(csv_rows(path, _any_columns), shown)
        case ".json":
            return _Iterated(json_rows(path), shown)
    return _Jsonl(path, shown)


class _Iterated:
    """Rows of a reader that decodes each."""

    def __init__(self, rows: Iterator[Row], shown: str) -> None:
        self._rows, self._shown = rows, shown

    def take(self, count: int) -> list[SourceRow]:
        return [SourceRow(place, self._shown, value) for place, value in islice(self._rows, count)]

    def skip(self, count: int) -> int:
        return sum(1 for _ in islice(self._rows, count))


class _Jsonl:
    """Lines are decoded only when they are taken; blank ones are no rows."""

    def __init__(self, path: Path, shown: str) -> None:
        self._path, self._shown = path, shown
        self._lines = self._filled()

    def _filled(self) -> Iterator[tuple[int, bytes]]:
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line

    def take(self, count: int) -> list[SourceRow]:
        placed = ((f"{self._path}:{number}", line) for number, line in islice(self._lines, count))
        return [SourceRow(place, self._shown, decode_row(line, place)) for place, line in placed]

    def skip(self, count: int) -> int:
        return sum(1 for _ in islice(self._lines, count))


class _Parquet:
    """Row groups that are passed over are not read."""

    def __init__(self, path: Path, shown: str) -> None:
        self._path, self._shown = path, shown
        self._next = 0
        self._rows: Iterator[Row] | None = None
        self._total: int | None = None

    def take(self, count: int) -> list[SourceRow]:
        if self._rows is None:
            self._rows = parquet_rows(self._path, _any_columns, start=self._next)
        rows = [SourceRow(place, self._shown, value) for place, value in islice(self._rows, count)]
        self._next += len(rows)
        return rows

    def skip(self, count: int) -> int:
        if self._total is None:
            self._total = _count_parquet(self._path)
        passed = min(count, self._total - self._next)
        self._next += passed
        self._rows = None
        return passed


def _count(path: Path) -> int | None:
    if path.suffix.lower() == ".parquet":
        return _count_parquet(path)
    if path.suffix.lower() in JSONL:
        with path.open("rb") as file:
            return sum(1 for line in file if line.strip())
    return None


def _count_parquet(path: Path) -> int:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(path).num_rows
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}:1: not readable as Parquet ({error}); expected a Parquet file") from None
