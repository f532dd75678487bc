"""Scores and differences in the terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from src.common.results import Row
from src.evaluation.report import cell_name


def print_tables(summary: Sequence[Row], differences: Sequence[Row], console: Console) -> None:
    """A table of the cells, and one of the differences where there are any."""
    has_risk = any(row["auc"] is not None or row["brier"] is not None for row in summary)
    head = ["task", "model", "n", "score", "95 % interval", *(["AUC", "Brier", "calibration"] if has_risk else [])]
    table = _table("Scores", head)
    for row in summary:
        risk = [_number(row[name]) for name in ("auc", "brier", "calibration_error")] if has_risk else []
        cells = [str(row["task"]), cell_name(row), _count(row), _number(row["score"]), _interval(row), *risk]
        table.add_row(*map(Text, cells))
    console.print(table)
    if differences:
        table = _table(
            "Differences on the same samples", ["task", "second − first", "n", "difference", "95 % interval", "p"]
        )
        for row in differences:
            what = f"{row['second']} − {row['first']}"
            fixed = ", ".join(
                str(row[name]) for name in ("model_id", "persona", "arm") if row[name] not in (None, "unsteered")
            )
            named = f"{what} ({fixed})" if fixed else what
            number = _number(row["difference"], "+.3f")
            cells = [str(row["task"]), named, str(row["n_samples"]), number, _interval(row), _number(row["p"])]
            table.add_row(*map(Text, cells))
        console.print(table)


def _table(title: str, head: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
    return table


def _count(row: Row) -> str:
    return f"{row['n']} ({row['unscored']} unscored)" if row["unscored"] else str(row["n"])


def _number(value: object, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)


def _interval(row: Row) -> str:
    return "–" if row["ci_low"] is None else f"{row['ci_low']:.3f} … {row['ci_high']:.3f}"
