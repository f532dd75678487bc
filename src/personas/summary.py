"""Means per persona and per category with their intervals, as a file and as a table in the terminal."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from src.ops.statistics import summarize

MEASURES = (
    "avg_entropy",
    "avg_entropy_output",
    "avg_entropy_thinking",
    "avg_top_k_mass",
    "avg_top_k_mass_output",
    "avg_top_k_mass_thinking",
    "num_tokens",
)
Row = dict[str, object]


def summarize_rows(rows: Sequence[Row], seed: int) -> dict[str, object]:
    """
    {"personas" | "categories": {name: {measure: {mean, std, n, ci_low, ci_high}}}, "overall": {measure: …}}.

    Entropies in nats, masses as probabilities. A measure that no row has is None. Rows of one prompt are one cluster
    of the bootstrap.
    """
    return {
        "personas": _grouped(rows, lambda row: row["persona"], seed),
        "categories": _grouped(rows, lambda row: row["category"], seed),
        "overall": _measures(rows, seed),
    }


def _grouped(rows: Iterable[Row], key: Callable[[Row], object], seed: int) -> dict[str, object]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[str(key(row))].append(row)
    return {name: _measures(members, seed) for name, members in groups.items()}


def _measures(rows: Sequence[Row], seed: int) -> dict[str, object]:
    return {measure: _measure(rows, measure, seed) for measure in MEASURES}


def _measure(rows: Sequence[Row], measure: str, seed: int) -> dict[str, float | int | None] | None:
    present = [row for row in rows if row[measure] is not None]
    summary = summarize([row[measure] for row in present], [row["prompt_id"] for row in present], seed)
    return summary._asdict() if summary else None


def print_tables(summary: dict[str, object], console: Console) -> None:
    """Categories, then personas, the most certain first."""
    for group, title in (("categories", "Category"), ("personas", "Persona")):
        table = Table(title=f"Token uncertainty by {title.lower()} (mean, 95 % interval)", title_justify="left")
        table.add_column(title, overflow="fold")
        for column in ("rows", "entropy (nats)", "top-k mass", "tokens"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, measures in sorted(summary[group].items(), key=_mean_entropy):
            n_rows = str(measures["num_tokens"]["n"])
            shown = [_shown(measures[m], digits) for m, digits in (("avg_entropy", 3), ("avg_top_k_mass", 3))]
            # Text, not markup: a persona's name may hold square brackets.
            table.add_row(Text(name), n_rows, *shown, _shown(measures["num_tokens"], 1))
        console.print(table)


def _mean_entropy(item: tuple[str, dict]) -> float:
    measure = item[1]["avg_entropy"]
    return measure["mean"] if measure else float("inf")


def _shown(measure: dict | None, digits: int) -> str:
    if measure is None:
        return "–"
    if measure["ci_low"] is None:
        return f"{measure['mean']:.{digits}f}"
    return f"{measure['mean']:.{digits}f} [{measure['ci_low']:.{digits}f}, {measure['ci_high']:.{digits}f}]"
