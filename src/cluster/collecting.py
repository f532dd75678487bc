"""The numbers that a finished run left, whichever command it was."""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.common.errors import InputError
from src.common.jsonl import read_jsonl

SUMMARIES = ("summary.json", "evaluation.json")
TABLE, METRICS = "summary.csv", "metrics.jsonl"
ALL = "overall"
"""The part of a summary that is about all rows; beside it the others are details."""
SEPARATOR = "."


def numbers_of(folder: Path) -> dict[str, float]:
    """
    Name → number: of summary.json and evaluation.json every number (of a mean with its interval the mean), of
    summary.csv each row's numeric columns behind what tells its rows apart: the text columns that vary (for a path,
    which may be this run's own, its number) and, where they do not do, numeric ones from the left; of metrics.jsonl the
    last value of each.
    Raises InputError for a file that is broken.
    """
    found: dict[str, float] = {}
    for name in SUMMARIES:
        if (folder / name).exists():
            value = _read(folder / name)
            found |= dict(_flat("", value.get(ALL, value) if isinstance(value, dict) else value))
    if (folder / TABLE).exists():
        found |= dict(_table(folder / TABLE))
    if (folder / METRICS).exists():
        for _, row in read_jsonl(folder / METRICS):
            found |= {f"last{SEPARATOR}{key}": value for key, value in row.items() if _is_number(value)}
    return found


def curves_of(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Of metrics.jsonl, which a run may be writing, every measure that is a loss: (step, value)."""
    found: dict[str, list[tuple[float, float]]] = {}
    if (folder / METRICS).exists():
        for _, row in read_jsonl(folder / METRICS, in_progress=True):
            for key, value in row.items():
                if "loss" in key and _is_number(value) and _is_number(row.get("step")):
                    found.setdefault(key, []).append((row["step"], value))
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: {error}; expected the JSON that the run wrote") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if _is_number(value):
        yield name, value
    elif isinstance(value, Mapping):
        if _is_number(value.get("mean")):
            yield name, value["mean"]
        elif "mean" not in value:
            for key, each in value.items():
                yield from _flat(f"{name}{SEPARATOR}{key}" if name else str(key), each)


def _table(path: Path) -> Iterator[tuple[str, float]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {key: [row[key] or "" for row in rows] for key in (rows[0] if rows else ())}
    measures = [key for key, texts in columns.items() if any(texts) and all(map(_is_numeric, filter(None, texts)))]
    varying = [key for key, texts in columns.items() if len(set(texts)) > 1]
    labels = [key for key in varying if key not in measures]
    for key in measures:
        if len({tuple(columns[label][at] for label in labels) for at in range(len(rows))}) == len(rows):
            break
        # Rows that differ in a number alone, as in a dose: left of what was measured stands what it was measured of.
        labels += [key] if key in varying else []
    for at in range(len(rows)):
        words = [_label(key, columns[key], at, key in measures) for key in labels]
        for key in measures:
            text = columns[key][at]
            if key not in labels and text and math.isfinite(float(text)):
                yield SEPARATOR.join((*filter(None, words), key)), float(text)


def _label(name: str, texts: Sequence[str], at: int, is_number: bool) -> str:
    if is_number:
        return f"{name} {texts[at]}"
    return f"{name} {list(dict.fromkeys(texts)).index(texts[at]) + 1}" if "/" in texts[at] else texts[at]


def _is_numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
