"""
What a search found, as report.html and as tables in the terminal.

A trial: {"id", "params", "stage": kl | odds | short | full (the last it reached), "kl", "kl_first" (nats), "behaviour"
(responses that show it, of "n_behaviour"; before stage full at least so many, at stage kl nothing is known),
"log_odds", "seconds" ("all", and by stage), "on_front"}; None for what its stage does not give.
Measures: {"before" | "after": {measure: {"mean", "ci_low", "ci_high", "n"}}}.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from src.abliteration.report_plots import FULL, Row, front_figure, history_figure, lowest_share, weights_figure
from src.common.html_report import escape, facts, page, plot, table
from src.common.jsonl import round_measured

Measures = Mapping[str, Mapping[str, Mapping[str, Any] | None]]
MEASURES = {
    "behaviour": "behaviour, target (share)",
    "behaviour_control": "behaviour, control (share)",
    "kl_control": "KL per token, control (nats)",
    "kl_target": "KL per token, target (nats)",
    "kl_first_control": "KL of first token, control",
    "kl_first_target": "KL of first token, target",
    "distinct_2_target": "distinct-2, target",
    "distinct_2_control": "distinct-2, control",
    "tokens_target": "tokens, target",
    "tokens_control": "tokens, control",
    "perplexity": "perplexity of --validate_text",
}
"""What measures are called; others are shown by their own names."""
MOST_RESPONSES = 200
"""Of each side in the page; the file holds all."""
NOTE = (
    "Behaviour: share of the responses to target prompts that show it. KL: of the edited from the base model's "
    "distribution, KL(base ‖ edited) per token of the base model's own response to control prompts. Both here are of "
    "the search split, on which the trials were chosen: what the chosen one does is in the table before and after, "
    "measured on prompts that the search never saw. Grey: trials that a gate stopped before the full-length responses, "
    "drawn at what they show at least; those that their KL stopped were not asked for a response and are not drawn."
)


class Reported(NamedTuple):
    """What the page shows."""

    title: str
    trials: Sequence[Row]
    """In the order in which they ended."""
    chosen_id: object
    """The id of the trial whose edit was taken; None for none."""
    rule: str
    """By which it was chosen, in words."""
    weights: Mapping[str, Sequence[float]]
    """Component → edit weight of each layer, from 0."""
    measures: Measures
    """Of the report split."""
    responses: Sequence[Row]
    """{"id", "prompt", "side": target | control, "before", "after"}."""
    settings: Mapping[str, Any]


def report(given: Reported) -> str:
    """The page, self-contained; whatever a model or a user wrote is escaped."""
    before = (given.measures.get("before") or {}).get("behaviour")
    share_before = before["mean"] if before else None
    front = plot(front_figure(given.trials, given.chosen_id, share_before))
    return page(
        given.title,
        [
            ("In short", facts(_in_short(given))),
            ("Behaviour and damage", f"<p>{escape(NOTE)}</p>\n{front}"),
            ("Before and after, on the report split", table(before_after_rows(given.measures))),
            ("Best so far", plot(history_figure(given.trials, given.chosen_id))),
            ("Edit weight by layer and component", plot(weights_figure(given.weights))),
            (f"Responses side by side (up to {MOST_RESPONSES} a side)", table(_side_by_side(given.responses))),
            ("Trials", table(_trial_rows(given.trials))),
            ("Settings", facts(given.settings)),
        ],
    )


def _in_short(given: Reported) -> dict[str, Any]:
    chosen = next((trial for trial in given.trials if trial["id"] == given.chosen_id), None)
    stages = [trial["stage"] for trial in given.trials]
    return {
        "trials": f"{len(stages)}, of which {stages.count('full')} with full-length responses",
        "chosen": "none" if chosen is None else str(given.chosen_id),
        "rule": given.rule,
        **({} if chosen is None else {"parameters": chosen["params"]}),
    }


def before_after_rows(measures: Measures) -> list[dict[str, Any]]:
    """A row a measure: {"measure", "before", "before low", "before high", "before n", "after", …}; None for nothing."""
    rows = []
    for name in _names(measures):
        row: dict[str, Any] = {"measure": MEASURES.get(name, name)}
        for side in ("before", "after"):
            found = (measures.get(side) or {}).get(name) or {}
            named = {side: "mean", f"{side} low": "ci_low", f"{side} high": "ci_high"}
            row |= {column: round_measured(found.get(key)) for column, key in named.items()}
            row[f"{side} n"] = found.get("n")
        rows.append(row)
    return rows


def _names(measures: Measures) -> list[str]:
    named = dict.fromkeys(name for side in ("before", "after") for name in measures.get(side) or {})
    known = [name for name in MEASURES if name in named]
    return [*known, *(name for name in named if name not in MEASURES)]


def _side_by_side(responses: Sequence[Row]) -> list[dict[str, Any]]:
    columns = ("side", "id", "prompt", "before", "after")
    sides = {side: [row for row in responses if row["side"] == side] for side in ("target", "control")}
    assert sum(map(len, sides.values())) == len(responses), f"sides { ({row['side'] for row in responses}) }"
    return [{name: row[name] for name in columns} for some in sides.values() for row in some[:MOST_RESPONSES]]


def _trial_rows(trials: Sequence[Row]) -> list[dict[str, Any]]:
    rows = []
    for trial in trials:
        known = {name: trial[name] for name in ("id", "stage", "on_front")}
        # A bound below is no measurement: in a column with counts it would sort and read as one.
        is_measured, is_known = trial["stage"] == FULL, lowest_share(trial) is not None
        known["behaviour"] = trial["behaviour"] if is_measured else None
        known["at least"] = trial["behaviour"] if is_known and not is_measured else None
        known["of"] = trial["n_behaviour"]
        known |= {name: round_measured(trial[name]) for name in ("kl", "kl_first", "log_odds")}
        rows.append(known | {"seconds": round_measured(trial["seconds"]["all"])} | dict(trial["params"]))
    return rows


def print_front(trials: Sequence[Row], console: Console, chosen_id: object = None) -> None:
    """The Pareto front, the smallest KL first, within 80 columns; * marks the chosen trial."""
    columns = ("trial", "behaviour", "share", "KL (nats)", "first token", "seconds")
    found = _terminal_table("Pareto front, on the search split", columns)
    for trial in sorted((t for t in trials if t["on_front"]), key=lambda t: t["kl"]):
        mark = " *" if chosen_id is not None and trial["id"] == chosen_id else ""
        numbers = (lowest_share(trial), trial["kl"], trial["kl_first"], trial["seconds"]["all"])
        counts = f"{trial['behaviour']}/{trial['n_behaviour']}"
        # Text, not markup: an id is data.
        found.add_row(Text(f"{trial['id']}{mark}"), counts, *map(_short, numbers))
    console.print(found)


def print_before_after(measures: Measures, console: Console) -> None:
    """Every measure with its 95 % interval, base model and edited, within 80 columns."""
    title = "Before and after, on the report split (95 % intervals below)"
    found = _terminal_table(title, ("", "before", "after", "n"))
    for row in before_after_rows(measures):
        sides = (_stacked(row[side], row[f"{side} low"], row[f"{side} high"]) for side in ("before", "after"))
        found.add_row(Text(row["measure"], overflow="fold"), *sides, counts(row))
    console.print(found)


def counts(row: Row) -> str:
    """How many were measured, of a row of `before_after_rows`: two numbers where before and after differ."""
    numbers = dict.fromkeys(str(row[f"{side} n"]) for side in ("before", "after") if row[f"{side} n"] is not None)
    return ", ".join(numbers) or "–"


def interval(mean: float | None, low: float | None, high: float | None) -> str:
    """ "0.45 [0.31, 0.6]", without the interval where there is none, – for no mean."""
    return _short(mean) + ("" if low is None or high is None else f" [{_short(low)}, {_short(high)}]")


def _stacked(mean: float | None, low: float | None, high: float | None) -> str:
    # Side by side, means and intervals of small numbers would not fit.
    return _short(mean) + ("" if low is None or high is None else f"\n{_short(low)}…{_short(high)}")


def _terminal_table(title: str, columns: Iterable[str]) -> Table:
    found = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
    for i, column in enumerate(columns):
        found.add_column(column, justify="right" if i else "left", no_wrap=i > 0)
    return found


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
