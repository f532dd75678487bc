"""Plotly figures of the app and of reports. What names say is escaped, since plotly reads markup in texts."""

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from src.common.html_report import escape
from src.viz import data

MOST_POINTS = 2000
"""Of a group in a violin, of all in a scatter; of more, so many are drawn by a fixed seed."""
MOST_GROUPS = 40
LABEL_LENGTH = 40
HEIGHT = 430
MEASURES: Mapping[str, str] = {
    "avg_entropy": "entropy (nats)",
    "avg_entropy_output": "entropy of the answer (nats)",
    "avg_entropy_thinking": "entropy of the thinking (nats)",
    "avg_top_k_mass": "top-k mass",
    "avg_top_k_mass_output": "top-k mass of the answer",
    "avg_top_k_mass_thinking": "top-k mass of the thinking",
    "num_tokens": "tokens",
    "num_thinking_tokens": "thinking tokens",
    "think_end_position": "index of the token that ends the thinking",
    "kl_per_token": "KL per token (nats)",
    "mean_projection": "projection",
    "distinct_2": "distinct-2",
}


def title_of(measure: str) -> str:
    """A measure in words, its column's name where there are none."""
    return MEASURES.get(measure, measure)


def boxes(frame: pd.DataFrame, by: str, measure: str) -> go.Figure:
    """
    Quartiles of `measure` for each group with the mean as a dashed line; whiskers end at the 5th and 95th of 100. Rows
    of several runs, tasks, models or arms are never one box: each has a colour.
    """
    figure = go.Figure()
    valued, order = _valued(frame, by, measure)
    for colour, rows in _by_colour(valued, by):
        grouped = rows[measure].groupby(rows[by])
        ranks = grouped.quantile([0.05, 0.25, 0.5, 0.75, 0.95]).unstack()
        ranks = ranks.reindex([name for name in order if name in ranks.index])
        figure.add_trace(
            go.Box(
                x=[_label(name) for name in ranks.index], q1=ranks[0.25], median=ranks[0.5], q3=ranks[0.75],
                lowerfence=ranks[0.05], upperfence=ranks[0.95], mean=grouped.mean().reindex(ranks.index), boxmean=True,
                name=_label(colour),
            )
        )  # fmt: skip
    return _laid_out(figure, by, measure).update_layout(boxmode="group")


def violins(frame: pd.DataFrame, by: str, measure: str) -> go.Figure:
    """The distribution of `measure` for each group and colour of `boxes`, its mean as a dashed line."""
    figure = go.Figure()
    valued, order = _valued(frame, by, measure)
    for colour, rows in _by_colour(valued[valued[by].isin(order)], by):
        some = pd.concat([_sampled(of_group) for _, of_group in rows.groupby(by)])
        names = [_label(name) for name in some[by]]
        figure.add_trace(go.Violin(x=names, y=some[measure], name=_label(colour), meanline_visible=True, points=False))
    order = [_label(name) for name in order]
    return _laid_out(figure, by, measure).update_layout(violinmode="group", xaxis_categoryarray=order)


def _valued(frame: pd.DataFrame, by: str, measure: str) -> tuple[pd.DataFrame, list[str]]:
    """Rows with a value, as float, their group as text, and the groups to show, the lowest mean first."""
    valued = frame[frame[measure].notna()]
    valued = valued.assign(**{measure: valued[measure].astype(float), by: data.labels(valued, by)})
    return valued, list(valued.groupby(by)[measure].mean().sort_values().index)[:MOST_GROUPS]


def _by_colour(valued: pd.DataFrame, by: str) -> list[tuple[str, pd.DataFrame]]:
    names = data.apart(valued, by)
    if not names:
        return [("", valued)]
    parts = valued.groupby([data.labels(valued, name) for name in names], sort=False)
    return [(" · ".join(values), rows) for values, rows in parts]


def _laid_out(figure: go.Figure, by: str, measure: str) -> go.Figure:
    return figure.update_layout(
        xaxis_title=by, yaxis_title=_axis(measure), height=HEIGHT, template="plotly_white",
        margin={"t": 20}, showlegend=len(figure.data) > 1, xaxis_type="category",
    )  # fmt: skip


def _axis(measure: str) -> str:
    return escape(title_of(measure))


def _label(name: object) -> str:
    text = str(name)
    return escape(text if len(text) <= LABEL_LENGTH else f"{text[:LABEL_LENGTH]}…")


def _sampled(values: pd.Series | pd.DataFrame) -> pd.Series | pd.DataFrame:
    return values if len(values) <= MOST_POINTS else values.sample(MOST_POINTS, random_state=0)


def heat(table: pd.DataFrame) -> go.Figure:
    """Pearson's r of pairs, columns first, second, r as `correlations` gives them."""
    names = list(dict.fromkeys([*table["first"], *table["second"]]))
    known = {(row.first, row.second): row.r for row in table.itertuples()}
    cells = [[1.0 if a == b else known.get((a, b), known.get((b, a))) for a in names] for b in names]
    labels = [_axis(name) for name in names]
    figure = go.Figure(go.Heatmap(z=cells, x=labels, y=labels, zmin=-1, zmax=1, colorscale="RdBu", reversescale=True))
    return figure.update_layout(height=HEIGHT + 80, margin={"t": 20})


def points(frame: pd.DataFrame, x: str, y: str, by: str) -> go.Figure:
    """One measure over another, a colour a group."""
    figure = go.Figure()
    both = _sampled(frame[frame[x].notna() & frame[y].notna()])
    for name, rows in both.groupby(data.labels(both, by)):
        figure.add_trace(
            go.Scattergl(x=rows[x], y=rows[y], mode="markers", name=_label(name), marker={"size": 5, "opacity": 0.6})
        )
    return figure.update_layout(
        xaxis_title=_axis(x), yaxis_title=_axis(y), height=HEIGHT, template="plotly_white", margin={"t": 20}
    )


def differences(pairs: pd.DataFrame, measure: str, first: str, second: str) -> go.Figure:
    """First minus second, pair by pair, in order of size; the prompt shows under the pointer."""
    table = pairs.sort_values("difference").reset_index(drop=True)
    dots = go.Scatter(
        x=list(range(1, len(table) + 1)), y=table["difference"], mode="markers",
        hovertext=[escape(str(text)[:120]) for text in table["prompt"]], hoverinfo="text+y",
    )  # fmt: skip
    figure = go.Figure(dots).add_hline(y=0, line_dash="dot")
    title = f"{_axis(measure)}: {_label(first)} − {_label(second)}"
    return figure.update_layout(
        xaxis_title="pairs, in order", yaxis_title=title, height=HEIGHT, template="plotly_white", margin={"t": 20}
    )


def doses(table: pd.DataFrame, measure: str) -> go.Figure:
    """Mean and 95 % interval by coefficient, a line for each run's steered rows and one for its random controls."""
    figure = go.Figure()
    several = table["run"].nunique() > 1
    for (run, control), rows in table.groupby(["run", "control"]):
        name = "random control" if control else "steered"
        bars = None
        if rows[["low", "high"]].notna().all(axis=None):
            bars = {"array": rows["high"] - rows["mean"], "arrayminus": rows["mean"] - rows["low"]}
        label = f"{_label(run)}: {name}" if several else name
        line = go.Scatter(x=rows["coefficient"], y=rows["mean"], error_y=bars, mode="lines+markers", name=label)
        figure.add_trace(line)
    return figure.update_layout(
        xaxis_title="coefficient", yaxis_title=_axis(measure), height=HEIGHT, template="plotly_white",
        margin={"t": 20}, showlegend=True,
    )  # fmt: skip
