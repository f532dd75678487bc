"""The plots of the report, as plotly figures; what a prompt says is escaped, since plotly reads markup in texts."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from torch import Tensor

from src.common.html_report import escape

COLORS = {"target": "#c2410c", "control": "#1d4ed8"}
Row = Mapping[str, Any]


def histograms(by_layer: Mapping[int, Mapping[str, Sequence[float]]], shown: int) -> go.Figure:
    """
    Projections of both classes, one layer at a time, chosen from a list. by_layer: layer → name of a group of rows, its
    class first → projections; groups that are not held out wait in the legend.
    """
    figure = go.Figure()
    for layer, groups in by_layer.items():
        for name, values in groups.items():
            held = "held out" in name
            figure.add_trace(
                go.Histogram(
                    x=[round(value, 4) for value in values],
                    name=name,
                    visible=_seen(held, layer == shown),
                    marker_color=COLORS[name.split()[0]],
                    opacity=0.6 if held else 0.3,
                    nbinsx=40,
                    bingroup=f"layer {layer}",
                    meta=layer,
                )
            )
    figure.update_layout(barmode="overlay", xaxis_title="projection on the direction", yaxis_title="examples")
    return _with_choice(figure, list(by_layer), shown, lambda trace: "held out" in trace.name)


def scatter(
    by_layer: Mapping[int, Tensor], sides: Sequence[str], texts: Sequence[str], shown: int, axes: str
) -> go.Figure:
    """Two coordinates of each example, (n, 2), one layer at a time; the text shows under the pointer."""
    figure = go.Figure()
    for layer, points in by_layer.items():
        for side in COLORS:
            chosen = [i for i, each in enumerate(sides) if each == side]
            figure.add_trace(
                go.Scatter(
                    x=[round(float(points[i, 0]), 3) for i in chosen],
                    name=side,
                    mode="markers",
                    meta=layer,
                    y=[round(float(points[i, 1]), 3) for i in chosen],
                    visible=layer == shown,
                    hoverinfo="text",
                    marker={"color": COLORS[side], "size": 6, "opacity": 0.75},
                    hovertext=[escape(texts[i][:120]) for i in chosen],
                )
            )
    figure.update_layout(xaxis_title=f"{axes} 1", yaxis_title=f"{axes} 2", height=560)
    return _with_choice(figure, list(by_layer), shown, lambda trace: True)


def cosines(matrix: Tensor, layers: Sequence[int]) -> go.Figure:
    """Cosines between the first directions of the layers, (n, n)."""
    values = [[round(float(value), 3) for value in row] for row in matrix]
    heat = go.Heatmap(z=values, x=list(layers), y=list(layers), zmin=-1, zmax=1, colorscale="RdBu", reversescale=True)
    return go.Figure(heat).update_layout(xaxis_title="layer", yaxis_title="layer", height=620, width=720)


def _seen(held: bool, at_shown: bool) -> bool | str:
    return (True if held else "legendonly") if at_shown else False


def _with_choice(figure: go.Figure, layers: Sequence[int], shown: int, is_main: Any) -> go.Figure:
    """A list of the layers above the figure; each trace knows its layer as `meta`."""
    if len(layers) < 2:
        return figure
    buttons = [
        {
            "label": f"layer {layer}",
            "method": "restyle",
            "args": [{"visible": [_seen(is_main(trace), trace.meta == layer) for trace in figure.data]}],
        }
        for layer in layers
    ]
    menu = {"buttons": buttons, "active": list(layers).index(shown), "x": 0, "xanchor": "left", "y": 1.15}
    return figure.update_layout(updatemenus=[menu])
