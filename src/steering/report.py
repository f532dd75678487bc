"""report.html of a steering run: dose and response, the controls beside it, and the responses side by side."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from src.common.html_report import escape, facts, page, plot, table
from src.models.arms import Arm
from src.steering.summary import SHARE, SHOWN, Summary

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter

MOST_PROMPTS = 100
"""Prompts whose responses the report shows; the file holds all."""
NOTE = (
    "KL per token: of the steered from the unsteered distribution on the unsteered response, KL(unsteered ‖ steered). "
    "Distinct-2: distinct over all pairs of neighbouring tokens, a sign of coherence. Projections "
    "are read behind the interventions: at a layer that is acted on they hold what was put there, so only those at a "
    "later layer (--project_onto FILE:LAYER) say something of the model. Bars: 95 % intervals over prompts."
)
Row = Mapping[str, Any]


def report(
    title: str,
    arms: Sequence[Arm],
    summary: Summary,
    rows: Sequence[Row],
    lists: Sequence[str],
    about: Mapping[str, Any],
) -> str:
    """The whole page. lists: names of word lists. about: facts to show last."""
    measures = {**{f"{SHARE}{name}": f"share of answers mostly {name}" for name in lists}, **SHOWN}
    plots = "".join(plot(_figure(arms, summary, measure, name)) for measure, name in measures.items())
    return page(
        title,
        [
            ("Dose and response", f"<p>{escape(NOTE)}</p>\n{plots}"),
            ("Arms", table(_arm_rows(summary))),
            (
                f"Responses side by side (up to {MOST_PROMPTS} prompts, the first repeat)",
                table(_side_by_side(arms, rows)),
            ),
            ("Settings", facts(about)),
        ],
    )


def _figure(arms: Sequence[Arm], summary: Summary, measure: str, name: str) -> "Figure":
    from plotly.graph_objects import Figure

    is_grid = all(arm.coefficient is not None for arm in arms) and len({arm.coefficient for arm in arms}) > 2
    figure = Figure(layout={"title": {"text": name}, "height": 380, "template": "plotly_white"})
    reference = [arm for arm in arms if arm.is_reference]
    for is_control, label in ((False, "steered"), (True, "random control")):
        some = [arm for arm in arms if arm.is_control == is_control and not arm.is_reference]
        if some:
            shown = sorted([*some, *reference], key=lambda arm: arm.coefficient or 0)
            figure.add_trace(_trace(shown, summary, measure, label, is_grid))
    figure.update_xaxes(title_text="coefficient" if is_grid else "arm")
    figure.update_yaxes(title_text=name)
    return figure


def _trace(arms: Sequence[Arm], summary: Summary, measure: str, label: str, is_grid: bool) -> "Scatter":
    from plotly.graph_objects import Scatter

    found = [(arm, summary["arms"][arm.name][measure]) for arm in arms]
    found = [(arm, numbers) for arm, numbers in found if numbers is not None]
    means = [numbers["mean"] for _, numbers in found]
    ends = [(numbers["ci_low"], numbers["ci_high"]) for _, numbers in found]
    bars = None
    if all(low is not None for low, _ in ends):
        bars = {
            "array": [high - mean for mean, (_, high) in zip(means, ends, strict=True)],
            "arrayminus": [mean - low for mean, (low, _) in zip(means, ends, strict=True)],
        }
    x = [arm.coefficient if is_grid else arm.name for arm, _ in found]
    return Scatter(x=x, y=means, error_y=bars, name=label, mode="lines+markers" if is_grid else "markers")


def _arm_rows(summary: Summary) -> list[dict[str, Any]]:
    return [
        {"arm": name, "measure": measure} | numbers
        for name, measures in summary["arms"].items()
        for measure, numbers in measures.items()
        if numbers is not None
    ]


def _side_by_side(arms: Sequence[Arm], rows: Sequence[Row]) -> list[dict[str, Any]]:
    prompts: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["rep_idx"] == 0 and (row["prompt_id"] in prompts or len(prompts) < MOST_PROMPTS):
            shown = prompts.setdefault(row["prompt_id"], {"prompt_id": row["prompt_id"], "prompt": row["prompt"]})
            shown[row["arm"]] = row["response"]
    columns = ("prompt_id", "prompt", *(arm.name for arm in arms))
    return [{name: shown.get(name) for name in columns} for shown in prompts.values()]
