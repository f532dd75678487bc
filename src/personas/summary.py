"""Means per persona and per category with their intervals, as a file and as a table in the terminal."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from src.common.jsonl import round_measured
from src.ops.statistics import summarize
from src.personas.rows import MEASURED_FIELDS, PROJECTION

MEASURES = (*MEASURED_FIELDS, "num_tokens")
ROWS_AT_EACH_END = 15
"""Of a longer table only its two ends are printed; the file holds all."""
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
    measures = [m for m in MEASURES if m != PROJECTION or any(PROJECTION in row for row in rows)]
    return {measure: _measure(rows, measure, seed) for measure in measures}


def _measure(rows: Sequence[Row], measure: str, seed: int) -> dict[str, float | int | None] | None:
    present = [row for row in rows if row.get(measure) is not None]
    summary = summarize([row[measure] for row in present], [row["prompt_id"] for row in present], seed)
    if summary is None:
        return None
    return {name: v if isinstance(v, int) else round_measured(v) for name, v in summary._asdict().items()}


def print_tables(summary: dict[str, object], console: Console) -> None:
    """Categories, then personas, the most certain first."""
    for group, title in (("categories", "Category"), ("personas", "Persona")):
        heading = f"Token uncertainty by {title.lower()}: mean [95 % interval]"
        table = Table(title=heading, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column(title, no_wrap=True, overflow="ellipsis", min_width=16)
        is_projected = any(PROJECTION in measures for measures in summary[group].values())
        columns = ["rows", "entropy (nats)", "top-k mass", "tokens", *(["proj."] if is_projected else [])]
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        ordered = sorted(summary[group].items(), key=_mean_entropy)
        n_left_out = max(0, len(ordered) - 2 * ROWS_AT_EACH_END)
        for i, (name, measures) in enumerate(ordered):
            if n_left_out and i == ROWS_AT_EACH_END:
                table.add_row(f"… {n_left_out} more", *["…"] * len(columns))
            if not ROWS_AT_EACH_END <= i < ROWS_AT_EACH_END + n_left_out:
                table.add_row(*_cells(name, measures))
        console.print(table)


def _cells(name: str, measures: dict[str, dict]) -> list[Text | str]:
    shown = [_interval(measures[measure]) for measure in ("avg_entropy", "avg_top_k_mass")]
    tokens, measured = measures["num_tokens"], measures["avg_entropy"]
    n_measured = measured["n"] if measured else 0
    # An empty answer has no token to measure; a mean over fewer rows than there are must say so.
    n_rows = str(tokens["n"]) if n_measured == tokens["n"] else f"{n_measured} of {tokens['n']}"
    # Text, not markup: a persona's name may hold square brackets.
    # Its mean alone: 80 columns hold no further interval; the file has it.
    projected = [_mean_shown(measures[PROJECTION])] if PROJECTION in measures else []
    return [Text(name), n_rows, *shown, f"{tokens['mean']:.0f}", *projected]


def _mean_entropy(item: tuple[str, dict]) -> float:
    measure = item[1]["avg_entropy"]
    return measure["mean"] if measure else float("inf")


def _mean_shown(measure: dict | None) -> str:
    return "–" if measure is None else f"{measure['mean']:.1f}"


def _interval(measure: dict | None) -> str:
    if measure is None:
        return "–"
    interval = "" if measure["ci_low"] is None else f" [{measure['ci_low']:.2f}, {measure['ci_high']:.2f}]"
    return f"{measure['mean']:.2f}{interval}"
