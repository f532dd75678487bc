"""A page with the points of a reduction, to hover over, to filter and to colour by any column."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from src.common.html_report import PLOT_MARK, facts, page, plot, script_json
from src.embedding.scatter_script import CONTROLS, SCRIPT

MOST_CHARACTERS = 300
Row = Mapping[str, Any]


def scatter_page(
    title: str, rows: Sequence[Row], axes: str, color_by: str | None, told: Mapping[str, Any], config: Mapping[str, Any]
) -> str:
    """rows: of results.jsonl. told: what the method says of the picture. axes: their name, without a number."""
    figure = go.Figure(layout={"xaxis_title": f"{axes} 1", "yaxis_title": f"{axes} 2", "height": 720,
                               "hovermode": "closest", "uirevision": "kept"})  # fmt: skip
    drawing = plot(figure)
    assert PLOT_MARK in drawing, "the page would come without plotly.js"
    points = f'<script type="application/json" class="points">{script_json(_points(rows, color_by))}</script>'
    content = f'<div class="scatter">\n{CONTROLS}{drawing}{points}</div>\n<script>{SCRIPT}</script>\n'
    return page(title, [("Points", content), ("What it shows", facts(told)), ("Settings", facts(config))])


def _points(rows: Sequence[Row], color_by: str | None) -> dict[str, Any]:
    names = column_names(rows)
    return {
        "x": [row["x"] for row in rows],
        "y": [row["y"] for row in rows],
        "ids": [_plain(row["id"]) for row in rows],
        "texts": [_plain(row["text"]) for row in rows],
        "columns": {name: [_plain(_value(row, name)) for row in rows] for name in names},
        "color_by": color_by,
    }


def column_names(rows: Sequence[Row]) -> list[str]:
    """What points can be coloured by: cluster, and every field of any row in the order of first appearance."""
    return list(dict.fromkeys(["cluster", *(name for row in rows for name in row["metadata"])]))


def _value(row: Row, name: str) -> Any:
    # Of two columns of this name the one found here is shown; the rows file holds both.
    return row["cluster"] if name == "cluster" else row["metadata"].get(name)


def _plain(value: Any) -> Any:
    """A number, or text that is not too long for a page."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"
