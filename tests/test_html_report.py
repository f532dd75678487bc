"""A report is whole in itself, and nothing that a model wrote becomes markup or script."""

import json
from html.parser import HTMLParser

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.common.html_report import PLOT_MARK, escape, facts, page, plot, script_json, table, text_block

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "</pre></td></table><iframe>",
    '" onmouseover="alert(1)',
    "'><svg/onload=alert(1)>",
    "<!--",
    "{title} {body} %s",
    "\u2028\u2029\ud800\x00",
    PLOT_MARK,
]


class Reader(HTMLParser):
    """Collects the tags with their attributes, and the text between them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    return reader


def report(text: str) -> str:
    rows = [{"id": "a", text: text, "n": 1.5}, {"id": text, "list": [text], "n": None}]
    return page(text, [(text, facts({text: text, "b": [text]})), ("Rows", table(rows)), ("Text", text_block(text))])


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_changes_no_tag(text: str) -> None:
    assert parsed(report(text)).tags == parsed(report("harmless")).tags


@given(st.text(alphabet=st.characters(exclude_categories=[])))
def test_no_text_changes_a_tag_and_the_page_is_utf8(text: str) -> None:
    html = report(f"x{text}")  # never empty and never one of the other columns' names
    html.encode("utf-8")
    assert parsed(html).tags == parsed(report("harmless")).tags


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\r\x00")))
def test_escaped_text_reads_as_it_was(text: str) -> None:
    assert "".join(parsed(f"<p>{escape(text)}</p>").text) == text


@given(st.text() | st.lists(st.sampled_from(HOSTILE)))
def test_json_in_a_script_is_the_same_json_and_ends_no_script(value: object) -> None:
    text = script_json(value)
    assert json.loads(text) == value
    assert text.isascii() and not set("<>&") & set(text)


def test_a_table_has_a_cell_for_each_column_of_each_row() -> None:
    rows = [{"a": 1, "b": "x"}, {"b": None, "c": True}]
    html = table(rows)
    assert html.count("<td") == 6 and html.count("<th>") == 3
    assert '<td class="number">1</td>' in html and "<td><div>true</div></td>" in html and html.count("–") == 3
    assert table(rows, columns=["b"]).count("<td") == 2
    assert table([]).count("<td") == 0


def test_only_a_page_with_a_plot_brings_plotly_along_and_once() -> None:
    drawn = plot(go.Figure(go.Bar(x=["</script><b>"], y=[1])))
    assert len(page("t", [("h", text_block(PLOT_MARK))])) < 20_000
    html = page("t", [("h", drawn), ("i", drawn)])
    assert 1_000_000 < len(html) < 8_000_000
    assert [tag for tag, _ in parsed(html).tags].count("script") == 5
    assert "</script><b>" not in html


def test_a_plot_keeps_its_data() -> None:
    figure = go.Figure(go.Scatter(x=[1, 2], y=[3.5, None], text=["<a>", "\u2028"]), layout={"title": {"text": "T & U"}})
    data = "".join(parsed(plot(figure)).text).strip()
    assert go.Figure(json.loads(data)) == figure


def test_nothing_is_loaded_from_anywhere() -> None:
    html = page("t", [("h", plot(go.Figure(go.Bar(y=[1]))) + table([{"a": 1}]))])
    for tag, attributes in parsed(html).tags:
        names = dict(attributes)
        assert "src" not in names and "href" not in names, (tag, names)
        assert not [name for name in names if name.startswith("on")]
    assert "default-src &#x27;none&#x27;" in html or "default-src 'none'" in html


def test_light_and_dark() -> None:
    html = page("t", [])
    assert "prefers-color-scheme: dark" in html and "color-scheme: light dark" in html
