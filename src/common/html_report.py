"""
Self-contained HTML reports: escaped text, tables that sort and filter, plotly plots with plotly.js inline. Nothing is
loaded from anywhere, and nothing that a model wrote can become markup or script.

    page("My run", [("Settings", facts(config)), ("Rows", table(rows))])
"""

import html
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from src.common.html_parts import PAGE, PLOT_SCRIPT, STYLE, TABLE_SCRIPT

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Escaped text cannot hold this, so that finding it in a section means that the section holds a plot.
PLOT_MARK = '<div class="plot">'


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole HTML page of (heading, HTML) sections; headings are escaped, the HTML comes from the functions below."""
    body = "\n".join(f"<section><h2>{escape(heading)}</h2>\n{content}</section>" for heading, content in sections)
    scripts = f"<script>{TABLE_SCRIPT}</script>"
    if PLOT_MARK in body:
        from plotly.offline import get_plotlyjs

        scripts += f"\n<script>{get_plotlyjs()}</script>\n<script>{PLOT_SCRIPT}</script>"
    return PAGE.format(title=escape(title), style=STYLE, body=body, scripts=scripts)


def escape(text: Any) -> str:
    """Any value as HTML text, safe between tags and in quoted attributes; a lone surrogate becomes `\\udXXX`."""
    return html.escape(str(text).encode("utf-8", "backslashreplace").decode(), quote=True)


def script_json(value: Any) -> str:
    """JSON that is safe inside a <script> element: no `<`, no `&`, nothing outside ASCII."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def text_block(text: str) -> str:
    """Text as it is, line breaks and all."""
    return f"<pre>{escape(text)}</pre>\n"


def facts(values: Mapping[str, Any]) -> str:
    """Names and values, one pair a line."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(shown_value(value))}</td></tr>" for name, value in values.items()
    )
    return f'<table class="facts">{rows}</table>\n'


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """
    A table that sorts by a click on a column's head and shows the rows that hold the words of its filter. Without
    `columns`: every key of any row, in the order of first appearance.
    """
    names = list(columns) if columns is not None else list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f'<th><button type="button">{escape(name)}</button></th>' for name in names)
    body = "\n".join("<tr>" + "".join(_cell(row.get(name)) for name in names) + "</tr>" for row in rows)
    return (
        '<div class="table"><input type="search" placeholder="filter rows" aria-label="filter rows">'
        f'<span class="count">{len(rows)}</span><div class="scroll"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div></div>\n"
    )


def _cell(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f'<td class="number">{value}</td>' if is_number else f"<td><div>{escape(shown_value(value))}</div></td>"


def shown_value(value: Any) -> str:
    """A value in words: text as it is, everything else as JSON, a dash for none."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def plot(figure: "Figure") -> str:
    """A plotly figure. Its data stay in the page as JSON; the page brings plotly.js along once."""
    data = script_json(json.loads(figure.to_json()))
    return f'{PLOT_MARK}<script type="application/json">{data}</script></div>\n'
