"""Run folders below a root, and their rows as data frames. Nothing outside the root is read."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from src.common.errors import InputError
from src.common.jsonl import read_jsonl
from src.common.run_folder import CONFIG, read_json

RESULTS = ("judged.jsonl", "results.jsonl", "results.json", "responses.jsonl", "summary.jsonl")
"""
Files of rows, the first that is there is taken: judged rows hold what was judged with its scores; results.json is an
older tool's, one list; summary.jsonl is an experiment's, a row a run.
"""
SCORES = "scores.jsonl"
NO_RUNS_IN = {"logs", "cache", "model", "adapter", "captures", "checkpoints"}
DEEPEST = 6
GROUPS = ("run", "step", "task", "model_id", "side", "category", "persona", "arm")
"""Columns by which rows are grouped, those that are there."""
FACTOR = "factor."
"""What the columns of an experiment's factors begin with."""
ONE_IS_NO_CHOICE = ("step", "task", "model_id", "side")
APART = ("run", "step", "task", "model_id", "arm")
"""Columns of which two values never go into one mean unless it is asked for."""
NONE = "(none)"
"""The label of rows without a value, beside others that have one."""


class Found(NamedTuple):
    """What lies below a root."""

    runs: list[str]
    """Folders with a run or with results, relative to the root, in order of name."""
    n_links: int
    """Symbolic links to folders, which are not followed."""


def find_runs(root: Path) -> Found:
    """The run folders below `root`. Raises InputError where there is no such folder."""
    if not root.is_dir():
        raise InputError(f"--root {root}: no such folder; expected the folder that your runs are in")
    runs, n_links = [], 0
    for name, folders, files in os.walk(root):
        folder = Path(name)
        if any(file in files for file in (CONFIG, *RESULTS)):
            runs.append(str(folder.relative_to(root)))
        links = [each for each in folders if (folder / each).is_symlink()]
        n_links += len(links)
        is_deep = len(folder.relative_to(root).parts) >= DEEPEST
        folders[:] = [f for f in sorted(folders) if not is_deep and f not in NO_RUNS_IN and f not in links]
    return Found(sorted(runs), n_links)


def inside(root: Path, name: str) -> Path:
    """The path `root`/`name`. Raises InputError where it, its links followed, lies outside `root`."""
    # Path.resolve raises something of its own at links that lead to one another.
    path = Path(os.path.realpath(root / name))
    if not path.is_relative_to(root.resolve()):
        raise InputError(f"{name}: lies outside {root}; --root must be a folder that all runs are in")
    return path


def results_file(root: Path, run: str) -> Path | None:
    """The file of a run's rows, None where it has none. Raises InputError as `inside`."""
    names = (name for name in RESULTS if (root / run / name).exists())
    name = next(names, None)
    return None if name is None else inside(root, f"{run}/{name}")


def scores(root: Path, run: str) -> list[dict[str, Any]]:
    """The scores of a run's directions, a row a layer and direction; none where it has none."""
    if not (root / run / SCORES).exists():
        return []
    return [row for _, row in read_jsonl(inside(root, f"{run}/{SCORES}"), in_progress=True)]


def read_frame(path: Path) -> pd.DataFrame:
    """
    The rows of a file of results, a column a field; fields that hold lists or objects as JSON text. A last line that is
    being written is left out. Raises InputError for a file that cannot be read as rows.
    """
    if path.suffix == ".json":
        frame = _frame(_listed(path))
    else:
        frame = _fast(path)
        if frame is None:
            frame = _frame(row for _, row in read_jsonl(path, in_progress=True))
    # As objects, a column without any value would make one of text out of another run's numbers beside it.
    return frame.astype({name: float for name in frame if frame[name].isna().all()})


def _listed(path: Path) -> list[dict[str, Any]]:
    value = read_json(path)
    rows = value.get("results") if isinstance(value, dict) else value
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: expected a JSON list of rows")
    return rows


def _fast(path: Path) -> pd.DataFrame | None:
    """The rows as Arrow reads them; None where it cannot, or where it would take text for something else."""
    import pyarrow as pa
    from pyarrow import json as arrow_json

    # A row must lie within one block or two.
    options = arrow_json.ReadOptions(block_size=1 << 26)
    try:
        table = arrow_json.read_json(path, read_options=options)
    except pa.ArrowInvalid:
        return None
    # Arrow takes text that looks like a date for a date.
    plain = all(pa.types.is_string(t) or pa.types.is_null(t) or _is_number(pa, t) for t in table.schema.types)
    return table.to_pandas() if plain else None


def _is_number(pa: Any, kind: Any) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _frame(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame.from_records([{name: _cell(value) for name, value in row.items()} for row in rows])


def _cell(value: Any) -> Any:
    if isinstance(value, list | dict):
        return json.dumps(value)
    # A lone surrogate, which a tokenizer can produce, is in no UTF-8.
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def together(frames: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The rows of several runs, each with its run's name as `run`."""
    if not frames:
        return pd.DataFrame({"run": []})
    marked = [frame.assign(run=name) for name, frame in frames.items()]
    return marked[0] if len(marked) == 1 else pd.concat(marked, ignore_index=True)


def groups_in(frame: pd.DataFrame) -> list[str]:
    """The columns by which the rows can be grouped."""
    factors = [name for name in frame if str(name).startswith(FACTOR)]
    there = [name for name in (*GROUPS, *factors) if name in frame and frame[name].notna().any()]
    return [name for name in there if name not in ONE_IS_NO_CHOICE or frame[name].nunique(dropna=False) > 1]


def first_group(groups: Sequence[str]) -> str:
    """The one that says most at first sight."""
    return next((name for name in ("category", "arm") if name in groups), groups[0])


def labels(frame: pd.DataFrame, name: str) -> pd.Series:
    """The column's values as text, `(none)` where there is none, so that no row falls out of what is grouped."""
    return frame[name].where(frame[name].notna(), None).astype("str").fillna(NONE)


def apart(frame: pd.DataFrame, by: str) -> list[str]:
    """The columns besides `by` whose values must not go into one mean: those of APART that vary."""
    return [name for name in APART if name != by and name in frame and frame[name].nunique(dropna=False) > 1]


def chosen(frame: pd.DataFrame, wanted: dict[str, Sequence[str]]) -> pd.DataFrame:
    """The rows whose columns hold one of the wanted labels; a column for which nothing is wanted is not looked at."""
    for name, values in wanted.items():
        if values and name in frame:
            frame = frame[labels(frame, name).isin(list(values))]
    return frame


def numeric(frame: pd.DataFrame) -> list[str]:
    """Columns of numbers with at least one of them, counters and seeds left out."""
    counters = {"id", "seed", "rep_idx", "turn", "prompt_id", "run"}
    return [name for name in _numbers(frame) if name not in counters and frame[name].notna().any()]


def _numbers(frame: pd.DataFrame) -> Iterator[str]:
    for name in frame.columns:
        if pd.api.types.is_numeric_dtype(frame[name]) and not pd.api.types.is_bool_dtype(frame[name]):
            yield str(name)
