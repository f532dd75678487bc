"""The summary in the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """A line a rubric: means with intervals or counts, rows, what is unscored, agreement."""
    table = Table(title="Judgements by rubric", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("rubric", "measure", "value", "rows", "unscored", "agreement (α, exact)"):
        table.add_column(column)
    for name, measures in summary["rubrics"].items():
        shared = [str(measures["rows"]), str(measures["unscored"]), _agreement(measures["agreement"])]
        values = [(key, value) for key, value in measures.items() if key not in ("rows", "unscored", "agreement")]
        for key, value in values or [("–", None)]:
            table.add_row(Text(name), Text(key), _shown(value), *shared)
    console.print(table)


def _shown(value: Any) -> str:
    if not isinstance(value, Mapping):
        return "–" if value is None else str(value)
    interval = "" if value["ci_low"] is None else f" [{value['ci_low']:.2f}, {value['ci_high']:.2f}]"
    return f"{value['mean']:.2f}{interval}"


def _agreement(agreement: Mapping[str, Any] | None) -> str:
    if agreement is None:
        return "–"
    alpha = agreement["krippendorff_alpha"]
    return f"{'–' if alpha is None else f'{alpha:.2f}'}, {agreement['exact']:.2f}"
