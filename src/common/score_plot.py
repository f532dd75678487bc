"""The plot of a direction run's scores, for its report and for those that show several runs."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Row = Mapping[str, Any]


def score_by_layer(rows: Sequence[Row]) -> "Figure":
    """AUC with the bands of both controls above d′, by layer, a line for each direction. rows: of scores.jsonl."""
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    first = [row for row in rows if row["k"] == 0]
    for name, color in (("shuffled", "128,128,128"), ("random", "16,122,87")):
        _band(figure, first, name, color)
    for k in sorted({row["k"] for row in rows}):
        of_k = [row for row in rows if row["k"] == k]
        layers = [row["layer"] for row in of_k]
        for place, measure, label in ((1, "auc", "AUC"), (2, "d_prime", "d′")):
            line = go.Scatter(x=layers, y=[row[measure] for row in of_k], name=f"{label}, direction {k}",
                              mode="lines+markers")  # fmt: skip
            figure.add_trace(line, row=place, col=1)
    figure.update_yaxes(title_text="AUC, held out", row=1, col=1)
    figure.update_yaxes(title_text="d′, held out", row=2, col=1)
    figure.update_xaxes(title_text="layer", row=2, col=1)
    return figure.update_layout(height=620)


def _band(figure: "Figure", rows: Sequence[Row], name: str, color: str) -> None:
    from plotly import graph_objects as go

    known = [row for row in rows if row[f"{name}_auc"] is not None]
    layers = [row["layer"] for row in known]
    label = {"random": "random directions, 95 %", "shuffled": "shuffled labels, 95 %"}[name]
    low, high = ([row[f"{name}_auc_{end}"] for row in known] for end in ("low", "high"))
    hidden = {"mode": "lines", "line": {"width": 0}, "legendgroup": name}
    figure.add_trace(go.Scatter(x=layers, y=high, showlegend=False, **hidden), row=1, col=1)
    figure.add_trace(
        go.Scatter(x=layers, y=low, name=label, fill="tonexty", fillcolor=f"rgba({color},0.22)", **hidden), row=1, col=1
    )
