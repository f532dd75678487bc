"""The rows of a dataset on a hub, or of a folder that `datasets` reads, streamed, each with its number, from 1."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from src.common.errors import InputError
from src.common.row_files import ColumnCheck, Row

if TYPE_CHECKING:
    from datasets import IterableDataset


def hub_rows(source: str, check: ColumnCheck, revision: str | None = None) -> Iterator[Row]:
    """
    The rows of `hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]`, streamed: nothing is downloaded beyond what is read. NAME may be a
    local folder. A row is {column: value}, with COLUMN's value also under "prompt". revision: a commit, branch or tag.
    Raises InputError: unknown name, configuration, split or column; a hub that cannot be reached; unreadable data.
    """
    name, config, split, column = _hub_parts(source)
    _, rows = open_hub_split(source, name, config, split, revision)
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            if number == 1:
                _check_hub_columns(source, list(row), column, check)
            yield f"{source}:{number}", {**row, "prompt": row[column]} if column else row
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}:{number + 1}: not readable ({_first_line(error)}); expected rows") from None


def _hub_parts(source: str) -> tuple[str, str | None, str | None, str | None]:
    name, *rest = source.removeprefix("hub:").split(":")
    if not name or len(rest) > 3:
        raise InputError(f"{source}: not a hub dataset; expected hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]")
    config, split, column = (part or None for part in [*rest, "", "", ""][:3])
    return name, config, split, column


def open_hub_split(
    source: str, name: str, config: str | None, split: str | None, revision: str | None = None
) -> tuple[str, "IterableDataset"]:
    """
    A split's name and its rows, streamed; without a name `train`, or the only one. source: what to call it in errors.
    Raises InputError: unknown name, configuration or split; a hub that cannot be reached; unreadable data.
    """
    import datasets

    try:
        splits = datasets.load_dataset(name, config, revision=revision, streaming=True)
    except ConnectionError as error:
        remedy = "expected a reachable hub, a dataset fetched with src.download_dataset, or a local file or folder"
        raise InputError(f"{source}: {_first_line(error)}; {remedy}") from None
    except (OSError, ValueError) as error:
        expected = "hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]" if source.startswith("hub:") else "a dataset's name"
        raise InputError(f"{source}: {_first_line(error)}; expected {expected}") from None
    wanted = split or ("train" if len(splits) > 1 else next(iter(splits)))
    if wanted not in splits:
        raise InputError(f"{source}: no split {wanted!r}; expected one of: {', '.join(map(str, splits))}")
    return str(wanted), splits[wanted]


def _check_hub_columns(source: str, columns: list[str], column: str | None, check: ColumnCheck) -> None:
    if column is None:
        check(source, columns)
    elif column not in columns:
        raise InputError(f"{source}: no column {column!r}; expected one of: {', '.join(columns)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
