"""compare.html: scores with their intervals, paired differences, and the samples on which cells disagree."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from src.common.html_report import escape, facts, page, plot, table
from src.common.results import Row
from src.evaluation.summary import COLUMNS, DIFFERENCE_COLUMNS

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MOST_SAMPLES = 300
"""Samples that the report shows; results.jsonl holds all."""
NOTE = (
    "Bars: 95 % intervals over samples (Wilson where each sample has one score of 0 or 1, else bootstrap). Intervals "
    "that overlap may still belong to scores that differ: the samples are the same, so look at the differences below."
)
PAIRED = (
    "Second minus first on the same samples. Intervals: Newcombe's for paired shares, else bootstrap over samples. "
    "p: exact sign test, two-sided, not corrected for how many comparisons there are."
)


def report(
    title: str, summary: Sequence[Row], differences: Sequence[Row], cells: Mapping[str, Sequence[Row]],
    about: Mapping[str, Any],
) -> str:  # fmt: skip
    """The whole page. about: facts to show last."""
    shown = [name for name in COLUMNS if any(row[name] is not None for row in summary)]
    sections = [
        ("Scores", f"<p>{escape(NOTE)}</p>\n{plot(_figure(summary))}{table(summary, shown)}"),
        ("Differences", f"<p>{escape(PAIRED)}</p>\n{table(differences, DIFFERENCE_COLUMNS)}"),
        (f"Samples on which cells disagree (up to {MOST_SAMPLES}, the first repeat)", table(_disagreements(cells))),
        ("Settings", facts(about)),
    ]
    return page(title, sections)


def cell_name(row: Mapping[str, Any]) -> str:
    """A cell in a few words, without its task."""
    words = [row["model_id"], row["persona"] and f"as {row['persona']}", row["arm"] != "unsteered" and row["arm"]]
    return " · ".join(str(word) for word in words if word)


def _figure(summary: Sequence[Row]) -> "Figure":
    from plotly.graph_objects import Figure, Scatter

    figure = Figure(layout={"height": 140 + 40 * len(summary), "template": "plotly_white"})
    names = list(dict.fromkeys(cell_name(row) for row in summary))
    for task in dict.fromkeys(row["task"] for row in summary):
        rows = [row for row in summary if row["task"] == task and row["score"] is not None]
        reach = lambda row, end: 0 if row[end] is None else abs(row[end] - row["score"])  # noqa: E731
        figure.add_trace(
            Scatter(
                # Text of a model's or file's name may hold what plotly reads as markup.
                name=escape(task), mode="markers", x=[row["score"] for row in rows],
                y=[names.index(cell_name(row)) for row in rows],
                error_x={
                    "array": [reach(row, "ci_high") for row in rows],
                    "arrayminus": [reach(row, "ci_low") for row in rows],
                },
            )
        )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=[escape(name) for name in names], autorange="reversed",
        automargin=True,
    )  # fmt: skip
    figure.update_xaxes(title_text="mean score", range=[-0.02, 1.02])
    return figure


def _disagreements(cells: Mapping[str, Sequence[Row]]) -> list[Row]:
    samples: dict[tuple, list[Row]] = {}
    for rows in cells.values():
        for row in rows:
            if row["rep_idx"] == 0:
                samples.setdefault((row["task"], row["sample_id"]), []).append(row)
    found = []
    for (task, sample_id), rows in samples.items():
        if len({row["score"] for row in rows}) > 1 and len(found) < MOST_SAMPLES:
            given = {cell_name(row): f"{row['score']}: {row['answer'] or row['response']}" for row in rows}
            asked = {"task": task, "sample": sample_id, "prompt": rows[0]["prompt"], "target": rows[0]["target"]}
            found.append(asked | given)
    return found
