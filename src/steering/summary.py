"""Dose and response: means of every arm with their intervals, as a file and as a table in the terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from src.common.jsonl import round_measured
from src.ops.statistics import summarize
from src.steering.rows import MEASURED_FIELDS

Row = dict[str, object]
Summary = dict[str, dict]
MEASURES = (*MEASURED_FIELDS, "num_tokens")
SHOWN = {
    "mean_projection": "projection",
    "kl_per_token": "KL per token (nats)",
    "avg_entropy": "entropy (nats)",
    "distinct_2": "distinct-2",
    "num_tokens": "tokens",
}
"""Measures of the plots."""
TABLE = {
    "mean_projection": "projec-\ntion",
    "kl_per_token": "KL per\ntoken",
    "avg_entropy": "entropy\n(nats)",
    "distinct_2": "distinct\n-2",
}
SHARE = "share_"


def summarize_rows(rows: Sequence[Row], lists: Sequence[str], seed: int) -> Summary:
    """
    {"arms": {arm: {measure: {mean, std, n, ci_low, ci_high}}}}, arms in the order of the rows.

    KL and entropy in nats, projections in the unit of the hidden states. `share_<list>`: responses with more words of
    that list than of any other. 95 % intervals by bootstrap over prompts, whose repeats are one cluster. A measure that
    no row has is None.
    """
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(str(row["arm"]), []).append(row)
    return {"arms": {name: _measures(members, lists, seed) for name, members in arms.items()}}


def _measures(rows: Sequence[Row], lists: Sequence[str], seed: int) -> dict[str, object]:
    measured = {measure: _measure(rows, [row[measure] for row in rows], seed) for measure in MEASURES}
    shares = {
        f"{SHARE}{name}": _measure(rows, [float(row["most_words"] == name) for row in rows], seed) for name in lists
    }
    return measured | shares


def _measure(rows: Sequence[Row], values: Sequence[object], seed: int) -> dict[str, float | int | None] | None:
    present = [(value, row["prompt_id"]) for value, row in zip(values, rows, strict=True) if value is not None]
    summary = summarize([value for value, _ in present], [prompt for _, prompt in present], seed)
    if summary is None:
        return None
    return {name: v if isinstance(v, int) else round_measured(v) for name, v in summary._asdict().items()}


def print_table(summary: Summary, lists: Sequence[str], console: Console) -> None:
    """One line an arm, the intervals below the means; narrow enough for 80 columns."""
    table = Table(
        title="Dose and response: mean, and below it its 95 % interval", title_justify="left", box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0), collapse_padding=True,
    )  # fmt: skip
    table.add_column("Arm", no_wrap=True)
    # Of two lists the second one's share says nearly what the first one's does.
    shown = lists[:1] if len(lists) == 2 else lists
    columns = {**TABLE, **{f"{SHARE}{name}": f"mostly\n{name}" for name in shown}}
    for heading in ("\nrows", *columns.values()):
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for name, measures in summary["arms"].items():
        # Text, not markup: names are data.
        table.add_row(Text(name), str(measures["num_tokens"]["n"]), *(_shown(measures[m]) for m in columns))
    console.print(table)


def _shown(measure: dict | None) -> str:
    if measure is None:
        return "–"
    digits = 1 if abs(measure["mean"]) >= 10 else 2
    ends = (measure["ci_low"], measure["ci_high"])
    return f"{measure['mean']:.{digits}f}\n" + ("" if None in ends else "…".join(f"{end:.{digits}f}" for end in ends))
