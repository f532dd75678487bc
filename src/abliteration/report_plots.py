"""The plots of the report, as plotly figures; texts are escaped, since plotly reads markup in them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from src.common.html_report import escape

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Row = Mapping[str, Any]
LEAST_KL = 1e-4
"""Nats: smaller divergences are drawn here, since the axis is logarithmic."""
FULL = "full"


def lowest_share(trial: Row) -> float | None:
    """The share of a trial's responses that show the behaviour; before stage full at least; None for unknown."""
    count, n = trial["behaviour"], trial["n_behaviour"]
    # A share taken for a count would be drawn as next to nothing.
    assert isinstance(count, int) and 0 <= count <= n, f"trial {trial['id']}: behaviour {count!r} of {n!r}"
    return None if trial["stage"] == "kl" or not n else count / n


def front_figure(trials: Sequence[Row], chosen_id: object, share_before: float | None) -> "Figure":
    """Trials by KL and behaviour, where it is known; the front as a staircase, the base model's share dashed."""
    from plotly.graph_objects import Figure, Scatter

    drawn = [trial for trial in trials if lowest_share(trial) is not None]
    front = sorted((trial for trial in drawn if trial["on_front"]), key=lambda trial: trial["kl"])
    groups = {
        "stopped by a gate, at least": ([t for t in drawn if t["stage"] != FULL], {"color": "#b0b0b0", "size": 6}),
        "full length": ([t for t in drawn if t["stage"] == FULL], {"color": "#1d4ed8", "size": 7}),
        "chosen": ([t for t in drawn if t["id"] == chosen_id], {"color": "#c2410c", "size": 15, "symbol": "star"}),
    }
    figure = Figure(layout={"height": 480, "template": "plotly_white", "margin": {"t": 30}})
    if front:
        line = {"shape": "hv", "color": "#1d4ed8", "width": 1.5}
        x, y = [_at(trial) for trial in front], [lowest_share(trial) for trial in front]
        figure.add_trace(Scatter(x=x, y=y, mode="lines", line=line, name="front", hoverinfo="skip"))
    for name, (some, marker) in groups.items():
        x, y, texts = [_at(t) for t in some], [lowest_share(t) for t in some], [_hover(t) for t in some]
        figure.add_trace(Scatter(x=x, y=y, mode="markers", marker=marker, name=name, hoverinfo="text", hovertext=texts))
    if share_before is not None:
        figure.add_hline(
            y=share_before, line_dash="dash", line_color="#777", annotation_text="base model, report split"
        )
    figure.update_xaxes(title_text=f"KL per token (nats; below {LEAST_KL:g} drawn there)", type="log")
    return figure.update_yaxes(title_text="behaviour (share of responses)", rangemode="tozero")


def _at(trial: Row) -> float:
    return max(trial["kl"], LEAST_KL)


def _kl(trial: Row) -> float:
    return trial["kl"]


def _hover(trial: Row) -> str:
    return escape(
        f"trial {trial['id']}: behaviour {trial['behaviour']} of {trial['n_behaviour']}, KL {trial['kl']}, "
        f"stage {trial['stage']}"
    )


def history_figure(trials: Sequence[Row], chosen_id: object) -> "Figure":
    """
    How the search came to its choice, over the trials with full-length responses: the lowest behaviour so far at no
    more KL than the chosen trial's, and the lowest KL so far at no more behaviour than its. Without a chosen trial:
    the lowest of each.
    """
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    full = [(i, trial) for i, trial in enumerate(trials) if trial["stage"] == FULL]
    chosen = next((trial for trial in trials if trial["id"] == chosen_id), None)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for place, measure, other, label in ((1, lowest_share, _kl, "behaviour"), (2, _kl, lowest_share, "KL (nats)")):
        bound = float("inf") if chosen is None else other(chosen)
        x, y = [], []
        for i, trial in full:
            if other(trial) <= bound:
                x.append(i + 1)
                y.append(min([measure(trial), *y[-1:]]))
        line = {"shape": "hv"}
        figure.add_trace(Scatter(x=x, y=y, mode="lines+markers", line=line, showlegend=False), row=place, col=1)
        figure.update_yaxes(title_text=f"lowest {label}", rangemode="tozero", row=place, col=1)
    figure.update_xaxes(title_text="trials so far", range=[0.5, len(trials) + 0.5], row=2, col=1)
    return figure.update_layout(height=460, template="plotly_white", margin={"t": 30})


def weights_figure(weights: Mapping[str, Sequence[float]]) -> "Figure":
    """The edit weight of every layer: one bar a component."""
    from plotly.graph_objects import Bar, Figure

    bars = [Bar(x=list(range(len(each))), y=list(each), name=escape(name)) for name, each in weights.items()]
    figure = Figure(bars, layout={"height": 360, "template": "plotly_white", "margin": {"t": 30}, "barmode": "group"})
    figure.update_xaxes(title_text="layer")
    return figure.update_yaxes(title_text="edit weight")
